"""Train and validation rows that no near-duplicate straddles.

A random split of generated instructions measures memory: of two rows that nearly say the same, one
is trained on and the other is asked. Here rows that go back to the same input row stay together,
and a group of them may validate only if, of all rows of the dataset outside the group,

* none has a ROUGE-L F of ``ROUGE_LINK``, or what is given, or more with one of its rows,
* none asks the same in the same words, and
* none has a cosine of ``COSINE_LINK`` or more, where the run has embeddings.

What is compared is what the recipe compares; where that is nothing, what the user's turns say. Each
group is compared with those before it and those behind it, in two passes over an index of its own,
so it does not matter what the run itself compared.

The price: validation rows stand further apart than the average row, and a dataset that is all alike
gives fewer of them than were asked for, or none, which is an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
from numpy.typing import NDArray

from engine.dedup.rouge import RougeIndex
from engine.dedup.texts import Texts
from engine.errors import ConfigError
from engine.export.chat import asked
from engine.export.choice import Choice
from engine.export.rows import rows
from engine.kept import recipe_of
from engine.languages import ENGLISH, MIXED
from engine.recipes.base import Recipe
from engine.recipes.guard import RecipeFault, compared_text
from engine.records import Record
from engine.stages import Lineage
from engine.store import RunReader
from engine.text import counted

__all__ = ["COSINE_LINK", "ROUGE_LINK", "Split", "split"]

ROUGE_LINK = 0.6
COSINE_LINK = 0.8
MAX_GROUPS = 10_000
"""A validation part beyond this tells nothing more."""
SPARE = 3
"""Groups looked at by their meaning for each one wanted: that costs their rows times all rows."""
BLOCK = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Which of the rows validate, by their number among the accepted ones, from 0 in plan order."""

    mask: NDArray[np.bool_]  # (N,)
    groups: int
    """Of rows that go back to the same input row: how many validate."""
    wanted: int
    """How many the share is."""
    threshold: float
    """The ROUGE-L F from which rows resemble each other."""
    by_meaning: bool
    """Whether embeddings were compared as well."""

    @property
    def rows(self) -> int:
        return int(self.mask.sum())

    def validates(self, number: int) -> bool:
        return bool(self.mask[number])


def split(
    run: RunReader,
    share: float,
    choice: Choice,
    lineage: Lineage,
    *,
    threshold: float = ROUGE_LINK,
    among_all: bool = False,
) -> Split:
    """About ``share`` of the chosen rows for validation: of the groups that go back to the same
    input row, one at least and at most 10,000. A function of the rows alone.

    ``among_all``: which rows validate follows from all rows of the run, so that all exports with
    the same share hold out the same input rows.

    Raises ConfigError where no row can validate, or ``share`` is no share.
    """
    if not 0 < share < 1:
        raise ConfigError(f"--validation {share}: give a share between 0 and 1, for example 0.02")
    count = run.counts().accepted
    chosen = np.zeros(count, np.bool_)
    chosen[: choice.count] = choice.sorted is None
    if choice.sorted is not None:
        chosen[choice.sorted.order] = True
    if not chosen.any():
        raise ConfigError(f"--validation {share}: there is no row to hold out; export more")
    read = _read(run, np.ones(count, np.bool_) if among_all else chosen, lineage)
    groups = list(_in_an_order_of_chance(read))
    wanted = min(max(round(len(groups) * share), 1), MAX_GROUPS)
    near = _near(read, _language(run), threshold)
    candidates: list[list[int]] = []
    looked_at: list[int] = []
    for members in groups:
        if len(candidates) >= wanted * SPARE:
            break
        if not near[members].any():
            candidates.append(members)
            looked_at += members
    close, by_meaning = _close_by_meaning(run, read, looked_at)
    mask, taken = np.zeros(count, np.bool_), 0
    for members in candidates:
        if taken < wanted and close.isdisjoint(members):
            mask[read.numbers[members]] = True
            taken += 1
    mask &= chosen
    total, held_out = int(chosen.sum()), int(mask.sum())
    if not held_out and taken:
        raise ConfigError(
            f"--validation {share}: none of these {counted(total, 'row')} is of one of the "
            f"{counted(taken, 'input row')} that this share of the whole run holds out; export more"
        )
    if not held_out:
        raise ConfigError(
            f"--validation {share}: no row can be held out of these {total:,}: each resembles"
            f" another one (a ROUGE-L F of {threshold} or more, a cosine of {COSINE_LINK} or more,"
            " or the same question); validate with other rows, or where all follow one pattern, "
            "with a higher --validation-threshold"
        )
    if held_out == total:
        raise ConfigError(
            f"--validation {share}: all of these {counted(total, 'row')} would be held out, and "
            "none left to train on; export rows of more input rows"
        )
    return Split(
        mask=mask,
        groups=taken,
        wanted=wanted,
        threshold=threshold,
        by_meaning=by_meaning,
    )


@dataclass(slots=True, kw_only=True)
class _Read:
    """What is known of the rows of the dataset, in plan order."""

    numbers: NDArray[np.int64]
    """Among all accepted rows."""
    group: NDArray[np.int64]
    """The first row of those that go back to the same input row, which are neighbours."""
    texts: Texts
    """What is compared of each; empty for nothing."""
    chance: list[bytes]
    asks_again: NDArray[np.bool_]
    """Rows of which another group asks the same."""


def _read(run: RunReader, chosen: NDArray[np.bool_], lineage: Lineage) -> _Read:
    recipe = recipe_of(run)
    numbers, group = list[int](), list[int]()
    texts, chance = Texts(), list[bytes]()
    questions: dict[bytes, int] = {}
    again: list[int] = []
    latest: tuple[int, int] | None = None
    for row in rows(run):
        if not chosen[row.number]:
            continue
        here = len(numbers)
        root = lineage.root(row.decision.index, row.decision.position)
        group.append(group[-1] if here and root == latest else here)
        latest = root
        numbers.append(row.number)
        question = asked(recipe, row.record)
        text = _compared(recipe, row.record, row.id) or question
        texts.append(text)
        # Rows of which nothing can be compared differ by their place only.
        chance.append(_digest(text or row.id))
        if question:
            first = questions.setdefault(_digest(question), here)
            if group[first] != group[here]:
                again += (first, here)
    asks_again = np.zeros(len(numbers), np.bool_)
    asks_again[again] = True
    return _Read(
        numbers=np.array(numbers, np.int64),
        group=np.array(group, np.int64),
        texts=texts,
        chance=chance,
        asks_again=asks_again,
    )


def _compared(recipe: Recipe | None, record: Record, id: str) -> str:
    """What the recipe compares of a row; empty for nothing."""
    if recipe is None:
        return ""
    try:
        return compared_text(recipe, record) or ""
    except RecipeFault as error:
        raise ConfigError(f"row {id}: the recipe's compared(row) failed ({error})") from error


def _language(run: RunReader) -> str:
    """How texts are cut: as the run does, where it compares by words at all."""
    decision = run.manifest.decision
    compares = decision.get("rouge_threshold") is not None
    return str(decision.get("language") or ENGLISH) if compares else MIXED


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:12]


def _in_an_order_of_chance(read: _Read) -> Iterable[list[int]]:
    """The rows of each group, the groups as the texts of their rows fall."""
    groups: dict[int, list[int]] = {}
    for row in sorted(range(len(read.chance)), key=read.chance.__getitem__):
        groups.setdefault(int(read.group[row]), []).append(row)
    return groups.values()


def _near(read: _Read, language: str, threshold: float) -> NDArray[np.bool_]:
    """Rows that a row of another group resembles by ROUGE-L, or asks the same as."""
    near = read.asks_again.copy()
    forwards = [list(members) for _, members in groupby(range(len(near)), read.group.__getitem__)]
    # Of two that resemble each other one comes behind the other, so each is found in one of the
    # two passes; the index says only which earlier one is nearest.
    for groups in (forwards, forwards[::-1]):
        index = RougeIndex(float(np.nextafter(threshold, 0)), language)  # F may be the threshold
        for members in groups:
            texts = [read.texts[row] for row in members]
            if not near[members].any():  # one is enough to bar a group
                near[members] = any(index.find(text) for text in texts)
            for text in texts:
                index.add(text)
    return near


def _close_by_meaning(run: RunReader, read: _Read, looked_at: list[int]) -> tuple[set[int], bool]:
    """Those of the rows looked at that have a neighbour by cosine outside their group, and whether
    there were vectors to tell.
    """
    wanted = set(looked_at)
    ours = {row: vector for row, vector in _vectors(run, read) if row in wanted}
    if not ours:
        return set(), False
    numbers = np.fromiter(ours, np.int64)
    unit = _unit(np.stack(list(ours.values())))
    close = np.zeros(len(numbers), np.bool_)
    everything = _vectors(run, read)
    while block := list(islice(everything, BLOCK)):
        theirs = read.group[[row for row, _ in block]]
        cosines = unit @ _unit(np.stack([vector for _, vector in block])).T
        close |= ((cosines >= COSINE_LINK) & (read.group[numbers][:, None] != theirs)).any(axis=1)
    return set(numbers[close].tolist()), True


def _vectors(run: RunReader, read: _Read) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The rows that have a vector, with it."""
    row_of = np.full(run.counts().accepted, -1, np.int64)
    row_of[read.numbers] = np.arange(len(read.numbers))
    for row, (_, vector) in zip(row_of.tolist(), run.accepted(vectors=True), strict=True):
        if vector is not None and row >= 0:
            yield row, vector


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), np.float32)
