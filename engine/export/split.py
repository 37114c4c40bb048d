"""Train and validation rows that no near-duplicate straddles.

A random split of generated instructions measures memory: of two rows that nearly say the same, one
is trained on and the other is asked. Here a validation row has no row outside its own group with

* a ROUGE-L F of ``ROUGE_LINK`` or more between what is compared of them, or
* a cosine of ``COSINE_LINK`` or more between their embeddings, where the run has them.

Rows that were made of the same input row stay together as well.

The run store already holds the ten nearest earlier texts of every row, so the groups are
what those links connect. A row all of whose ten are that close may have more that the store does
not name (*crowded*), so whatever is close to a crowded row is trained on. And instead of following
cosines through the whole set, which costs its square, only groups without any outside neighbour are
taken: the cost is that of the validation part times the set.

The price: validation rows stand further apart than the average row, and a set that is all alike may
give fewer of them than were asked for; the dataset card says how many and from how many groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq

from engine.dedup.rouge import tokenize
from engine.errors import ConfigError
from engine.kept import recipe_of
from engine.languages import ENGLISH
from engine.recipes.guard import RecipeFault, compared_text
from engine.records import Decision
from engine.stages import samples_of
from engine.store import RunReader
from engine.text import as_word

__all__ = ["COSINE_LINK", "ROUGE_LINK", "Split", "split"]

ROUGE_LINK = 0.6
COSINE_LINK = 0.8
NEIGHBOURS = 10
"""As many nearest texts as the store keeps of a row."""
MAX_ROWS = 10_000
"""A validation part beyond this tells nothing more."""
SPARE = 3
"""Candidates looked at for each row wanted."""
BLOCK = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Which of the accepted rows, counted from 0 in plan order, validate."""

    mask: NDArray[np.bool_]  # (N,)
    groups: int
    """Groups that the validation rows come from."""
    largest: int
    """Rows of the largest group of all."""
    by_meaning: bool
    """Whether embeddings were compared as well."""

    @property
    def rows(self) -> int:
        return int(self.mask.sum())

    def validates(self, number: int) -> bool:
        return bool(self.mask[number])


def split(run: RunReader, share: float) -> Split:
    """About ``share`` of the rows (at most 10,000) for validation. A function of the rows alone.

    Raises ConfigError where the run, or one of its rows, has no neighbours to tell by, or ``share``
    is no share.
    """
    if not 0 < share < 1:
        raise ConfigError(f"--validation {share}: give a share between 0 and 1, for example 0.02")
    if run.manifest.decision.get("rouge_threshold") is None:
        raise ConfigError(
            "--validation needs a run that compared its rows by ROUGE-L: give the recipe `compare`,"
            f" then: woolmill redecide {as_word(run.folder)} --recipe FILE --rouge-threshold 0.7 (1"
            " keeps all but the same text)"
        )
    links, order, crowded = _read(run)
    group = links.roots()
    sizes = np.bincount(group, minlength=len(group))
    wanted = min(round(len(group) * share), MAX_ROWS)
    members: dict[int, list[int]] = {}
    for row in order:
        members.setdefault(int(group[row]), []).append(row)
    barred = {int(group[row]) for row in crowded}
    candidates: list[list[int]] = []
    for root, rows in members.items():
        if sum(map(len, candidates)) >= wanted * SPARE:
            break
        if len(rows) <= max(1, wanted // 4) and root not in barred:
            candidates.append(rows)
    looked_at = sorted(row for rows in candidates for row in rows)
    close = _close_to_crowded(run, looked_at, crowded)
    more, by_meaning = _close_by_meaning(run, looked_at, group)
    close |= more
    mask = np.zeros(len(group), np.bool_)
    taken = groups = 0
    for rows in candidates:
        if taken + len(rows) <= wanted and close.isdisjoint(rows):
            mask[rows] = True
            taken, groups = taken + len(rows), groups + 1
    largest = int(sizes.max(initial=0))
    return Split(mask=mask, groups=groups, largest=largest, by_meaning=by_meaning)


class _Links:
    """Rows joined into groups: union by the lower root, with paths halved."""

    def __init__(self) -> None:
        self._parent: list[int] = []

    def add(self) -> int:
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def join(self, one: int, other: int) -> None:
        a, b = self._root(one), self._root(other)
        self._parent[max(a, b)] = min(a, b)

    def _root(self, row: int) -> int:
        parent = self._parent
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    def roots(self) -> NDArray[np.int64]:
        """The group of each row, named by its first row: (N,)."""
        return np.fromiter(map(self._root, range(len(self._parent))), np.int64)


def _read(run: RunReader) -> tuple[_Links, list[int], list[int]]:
    """Links between rows, the rows in an order of chance, and the crowded ones."""
    links = _Links()
    row_of: dict[bytes, int] = {}
    chance: list[bytes] = []
    crowded: list[int] = []
    samples = samples_of(run)
    latest = -1
    for text, decision in _texts(run):
        digest = _digest(text)
        row = links.add()
        # Rows that are not compared differ by their place only.
        chance.append(digest if text else _digest(f"{decision.index}.{decision.position}"))
        most_similar = decision.most_similar
        if decision.mean_similarity is None:
            raise ConfigError(
                f"--validation tells rows apart by the nearest of each, and row {decision.index}."
                f"{decision.position} has none: beyond the first million they are not looked for; "
                "export without it, and take the rows to validate with from another run"
            )
        if samples is not None:
            if row and decision.index // samples == latest:
                links.join(row, row - 1)
            latest = decision.index // samples
        near = [other for other, score in most_similar.items() if score >= ROUGE_LINK]
        for other in near:
            if (earlier := row_of.get(_digest(other))) is not None:
                links.join(row, earlier)
        if len(near) >= NEIGHBOURS:
            crowded.append(row)
        row_of[digest] = row
    return links, sorted(range(len(chance)), key=chance.__getitem__), crowded


def _texts(run: RunReader) -> Iterator[tuple[str, Decision]]:
    """What was compared of each accepted row, empty for nothing; and the decision on it."""
    recipe = recipe_of(run)
    if recipe is None:
        raise ConfigError(
            "--validation needs the run's recipe, which says what rows are compared by, and it is "
            "not here any more; name it with: woolmill redecide "
            f"{as_word(run.folder)} --recipe FILE"
        )
    for decision in run.decisions(accepted=True):
        record = decision.record
        assert record is not None
        try:
            text = compared_text(recipe, record)
        except RecipeFault as error:
            row = f"{decision.index}.{decision.position}"
            raise ConfigError(f"row {row}: the recipe's compared(row) failed ({error})") from error
        yield text or "", decision


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:12]


def _close_to_crowded(run: RunReader, rows: list[int], crowded: list[int]) -> set[int]:
    """Those of ``rows`` that a crowded row is close to, though its ten may not name them."""
    if not crowded:
        return set()
    needed = {*rows, *crowded}
    language = run.manifest.decision.get("language", ENGLISH)
    words_of = {
        row: tokenize(text, language) for row, (text, _) in enumerate(_texts(run)) if row in needed
    }
    packed = [words_of[row] for row in crowded]
    lengths = np.array([len(words) for words in packed])
    close = set()
    for row in rows:
        words = words_of[row]
        m = len(words)
        # F = 2 LCS / (m + n), and the subsequence is no longer than the shorter text.
        possible = 2 * np.minimum(lengths, m) >= ROUGE_LINK * (lengths + m) - 1e-9
        for i in np.flatnonzero(possible):
            most = ROUGE_LINK * (m + len(packed[i])) / 2 - 1e-9
            if LCSseq.similarity(words, packed[i], score_cutoff=int(np.ceil(most))):
                close.add(row)
                break
    return close


def _close_by_meaning(
    run: RunReader, rows: list[int], group: NDArray[np.int64]
) -> tuple[set[int], bool]:
    """Those of ``rows`` that have a neighbour by cosine outside their group, and whether there were
    vectors to tell.
    """
    wanted = set(rows)
    vectors = {
        number: vector
        for number, (_, vector) in enumerate(run.accepted(vectors=True))
        if number in wanted and vector is not None
    }
    if not vectors:
        return set(), False
    numbers = np.fromiter(vectors, np.int64)
    ours = _unit(np.stack(list(vectors.values())))
    close = np.zeros(len(numbers), np.bool_)
    everything = enumerate(run.accepted(vectors=True))
    while block := [(i, v) for i, (_, v) in islice(everything, BLOCK) if v is not None]:
        theirs = group[[i for i, _ in block]]
        cosines = ours @ _unit(np.stack([v for _, v in block])).T
        close |= ((cosines >= COSINE_LINK) & (group[numbers][:, None] != theirs)).any(axis=1)
    return set(numbers[close].tolist()), True


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), np.float32)
