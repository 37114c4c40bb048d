"""Near-duplicates by ROUGE-L: exactly Alpaca's decision, without comparing with everything.

Two texts of m and n tokens with F above t share at least t(m+n)/2 tokens in order. Three
consequences sort out nearly all items before a subsequence is computed: the two share one of their
rarest tokens (the prefix filter of Chaudhuri et al. 2006), their lengths are close, and few of
their tokens have no partner. What is left is computed with one machine word per 64 tokens.

None of this rounds. F is evaluated in floating point as ``rouge_score`` does it, and the bounds are
found by evaluating it: where 2L/(m+n) is 0.7, half of the length pairs give 0.7000000000000001.

The price: some 90 to 130 bytes an item, and one lock around each call (the GIL is free meanwhile).

All this is for texts of up to ``long.LONG`` tokens. Longer ones are compared as ``long`` does it;
they have no tokens in the arrays here, so that they are nobody's nearest and add 0 to a mean.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rapidfuzz.distance import LCSseq

from engine.dedup.memory import Part, full, reserve, room
from engine.languages import ENGLISH, language_of, tokens_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.dedup.threads import Scratch

__all__ = ["Hit", "Nearest", "RougeIndex", "rouge_l", "rouge_l_of_tokens", "tokenize"]

EPOCH_STARTS = (4_096, 65_536)
"""Numbers of items at which the tokens' counts are looked at anew (see ``kernels``). An old order
gets stale where the vocabulary drifts; each order more costs a lookup per token and query."""
SPREAD_FROM = 500_000
"""Items from which on a batch is looked up by several threads before it is decided. Below, that
costs more than it spares: two threads break even here, and take 0.60 of the time at a million."""
MOST_MASKS = 128 << 20
"""Bytes that the masks of texts that are scanned together may take."""


@dataclass(frozen=True, slots=True)
class Hit:
    """An item of an index, and how closely it resembles the text or vector asked about."""

    item: int
    score: float


@dataclass(frozen=True, slots=True)
class Nearest:
    """The nearest items, best first (ties: the earlier item), and the mean score over all items."""

    hits: tuple[Hit, ...]
    mean: float


def tokenize(text: str, language: str = ENGLISH) -> list[str]:
    """The tokens that are compared. In English lower-cased runs of ``[a-z0-9]``: ``rouge_score``'s
    default tokenizer, without stemming. In other languages as ``languages.tokens_of`` says.
    """
    return tokens_of(text, language)


def f_measure(lcs: int, m: int, n: int) -> float:
    """ROUGE-L F of texts of m and n tokens whose longest common subsequence has ``lcs``."""
    if lcs == 0:
        return 0.0
    precision, recall = lcs / m, lcs / n
    return 2 * precision * recall / (precision + recall)


def rouge_l(a: str, b: str, language: str = ENGLISH) -> float:
    """ROUGE-L F-measure of two texts; 0 where one has no tokens."""
    return rouge_l_of_tokens(tokenize(a, language), tokenize(b, language))


def rouge_l_of_tokens(a: Sequence[str], b: Sequence[str]) -> float:
    """ROUGE-L F-measure of two texts that ``tokenize`` has cut."""
    return f_measure(LCSseq.similarity(a, b), len(a), len(b))


class RougeIndex:
    """Texts so far, searched for the one with the highest ROUGE-L F above ``threshold``.

    >>> index = RougeIndex(threshold=0.7)
    >>> index.add("Name three primary colours.")
    0
    >>> index.find("Name the three primary colours")
    Hit(item=0, score=0.888888888888889)
    >>> index.nearest("Name a colour", k=1).mean
    0.2857142857142857

    ``language`` says how texts are cut: a code of ``engine.languages``, English by default. In any
    other, letters of scripts without spaces are compared one by one. ``threshold`` is the
    language's where it is not given: 0.7, and 0.75 where most tokens are single characters.

    >>> index = RougeIndex(language="zh")
    >>> index.add("写一首关于秋天的诗。")
    0
    >>> index.find("写一首关于秋天的歌")
    Hit(item=0, score=0.8888888888888888)

    ``threads`` read the index at once where it is large; what is found does not depend on them. A
    text without any token is nobody's near-duplicate. Calls from several threads are safe and
    take turns. Raises ValueError for a threshold or language that there is not.
    """

    def __init__(
        self, threshold: float | None = None, language: str = ENGLISH, *, threads: int = 1
    ) -> None:
        usual = language_of(language).rouge_threshold
        threshold = usual if threshold is None else threshold
        if not 0 < threshold <= 1:
            raise ValueError(f"a ROUGE-L threshold lies in (0, 1], not at {threshold}")
        # numba takes long to import, and a run without ROUGE-L does not need it.
        from engine.dedup import admit, checks, kernels, long, scan
        from engine.dedup.threads import Threads
        from engine.dedup.vocabulary import Vocabulary

        self.threshold = float(threshold)
        self.language = language
        self._admit = admit
        self._checks = checks
        self._long = long
        self._long_texts = long.LongTexts(self.threshold)
        self._caught_up = 0
        """Items of which the long texts have those that they could resemble."""
        self._kernels = kernels
        self._scan = scan
        self._lock = threading.Lock()
        self._threads = Threads(threads)
        self._size = 0
        self._epoch = 0
        self._vocabulary = Vocabulary(language)
        self._tokens = reserve(np.uint32)
        # By item; see kernels.
        self._starts = reserve(np.uint32)
        self._signatures = reserve(np.uint64)
        # Chunks of postings, up to an end. A place of 0 means none.
        self._postings = reserve(np.uint32)
        self._end = 1
        # By token.
        self._counts = reserve(np.uint32)
        self._levels = reserve(np.uint8, kernels.EPOCHS)
        self._heads = reserve(np.uint32, kernels.EPOCHS)
        self._room = len(self._signatures)
        """Elements that every array has; this one has the longest, so the fewest."""

    def __len__(self) -> int:
        return self._size

    def like(self) -> RougeIndex:
        """An empty one of the same settings."""
        return RougeIndex(self.threshold, self.language, threads=self._threads.count)

    def find(self, text: str) -> Hit | None:
        """The item with the highest F above the threshold (ties: the earliest), or None."""
        with self._lock:
            item, f = self._find(self._vocabulary.ids(text))
        return Hit(item, f) if item >= 0 else None

    def _find(self, ids: NDArray[np.uint32]) -> tuple[int, float]:
        item, f = -1, self.threshold
        scratch = self._threads.scratch
        if len(ids) <= self._long.LONG:
            item, f = self._kernels.find(ids, *self._searched(scratch), 0)
        else:
            self._catch_up()
        if self._long_texts and len(ids) >= self._long_texts.least:
            other, other_f = self._long_texts.find(ids, scratch.rows[: len(self._vocabulary)])
            if other >= 0 and (item < 0 or (-other_f, other) < (-f, item)):
                return other, other_f
        return item, f

    def _searched(
        self, scratch: Scratch
    ) -> tuple[int, int, float, Any, Any, Any, Any, Any, Any, Any, Any, Any]:
        """The arguments of ``kernels.find`` from ``known`` to ``seen``: numbers, then arrays."""
        return (
            len(self._vocabulary),
            self._epoch + 1,
            self.threshold,
            scratch.limits,
            self._tokens,
            self._starts,
            self._levels,
            self._heads,
            self._signatures,
            self._postings,
            scratch.rows,
            scratch.seen,
        )

    def _catch_up(self) -> None:
        """Add what a long text could resemble to the long texts. They come seldom, so not before
        one does.
        """
        lengths = np.diff(self._starts[self._caught_up : self._size + 1].astype(np.int64))
        for item in (np.flatnonzero(lengths >= self._long_texts.least) + self._caught_up).tolist():
            text = self._tokens[self._starts[item] : self._starts[item + 1]]
            self._long_texts.add(item, text)
        self._caught_up = self._size

    def add(self, text: str) -> int:
        """Add one text; returns its id, counted from 0."""
        with self._lock:
            return self._add(text)

    def _add(self, text: str) -> int:
        item = self._size
        ids = self._vocabulary.ids(text, learn=True)
        if len(ids) > self._long.LONG:
            self._catch_up()
            self._long_texts.add(item, ids)
            self._caught_up = item + 1
            ids = ids[:0]
        self._make_ready(len(ids))
        self._end = self._kernels.insert(
            ids,
            item,
            self._epoch,
            self.threshold,
            self._tokens,
            self._starts,
            self._counts,
            self._levels,
            self._heads,
            self._signatures,
            self._postings,
            self._end,
        )
        self._size += 1
        return item

    def admit(self, texts: Sequence[str], limit: int | None = None) -> list[Hit | None]:
        """``find`` for each text in turn, and ``add`` where it finds nothing, at a third of the
        price.

        After ``limit`` additions the rest is left; the list is then shorter.
        """
        found: list[Hit | None] = []
        goal = self._size + (len(texts) if limit is None else limit)
        with self._lock:
            data = [self._vocabulary.letters(text) for text in texts]
            while len(found) < len(texts) and self._size < goal:
                start = end = len(found)
                least = self._long_texts.least if self._long_texts else self._long.LONG + 1
                while end < len(texts) and (len(data[end]) + 1) // 2 < least:
                    end += 1
                if end > start:
                    found += self._admit_short(data[start:end], goal)
                else:
                    found.append(self._admit_one(texts[start]))
        return found

    def extend(self, texts: Sequence[str]) -> None:
        """``add`` each text, at a third of the price."""
        most = 2 * self._long.LONG  # bytes that are never more than ``LONG`` tokens
        with self._lock:
            data = [self._vocabulary.letters(text) for text in texts]
            start = 0
            for end, letters in enumerate([*data, bytes(most + 1)]):
                if len(letters) > most:
                    if end > start:
                        self._admit_short(data[start:end], self._size + end - start, True)
                    if end < len(data):
                        self._add(texts[end])
                    start = end + 1

    def _admit_one(self, text: str) -> Hit | None:
        item, f = self._find(self._vocabulary.ids(text))
        if item >= 0:
            return Hit(item, f)
        self._add(text)
        return None

    def _admit_short(
        self, data: list[bytes], goal: int, is_decided: bool = False
    ) -> list[Hit | None]:
        """Of texts that no long one is like; until there are ``goal`` items. All are added where
        it is decided that they are.
        """
        letters = np.frombuffer(b"".join(data), np.uint8)
        bounds = np.cumsum([0, *map(len, data)])
        items = np.empty(len(data), np.int64)
        scores = np.empty(len(data), np.float64)
        since = done = 0
        if self._size >= SPREAD_FROM and self._threads.count > 1 and not is_decided:
            since = self._size
            self._look(letters, bounds, items, scores)
        while done < len(data) and self._size < goal:
            self._make_ready((len(data[done]) + 1) // 2)
            judged, self._size, self._vocabulary.size, self._end = self._admit.admit(
                letters,
                bounds[done:],
                max(map(len, data)),
                self._size,
                min([goal, *EPOCH_STARTS[self._epoch :]]),
                min(self._room, self._kernels.MOST),
                self._epoch,
                self.threshold,
                *self._vocabulary.table(len(data[done])),
                self._threads.scratch.limits,
                self._tokens,
                self._starts,
                self._counts,
                self._levels,
                self._heads,
                self._signatures,
                self._postings,
                self._end,
                self._threads.scratch.rows,
                self._threads.scratch.seen,
                items[done:],
                scores[done:],
                since,
                is_decided,
            )
            done += judged
        found = zip(items[:done].tolist(), scores[:done].tolist(), strict=True)
        return [Hit(item, f) if item >= 0 else None for item, f in found]

    def _look(
        self,
        letters: NDArray[np.uint8],
        bounds: NDArray[np.int64],
        items: NDArray[np.int64],
        scores: NDArray[np.float64],
    ) -> None:
        """Fill ``items`` and ``scores`` with what the texts resemble of all that there is now."""
        ids = np.empty(len(letters) + len(bounds), np.uint32)
        places = np.empty(len(bounds), np.int64)
        table = self._vocabulary.table(int(np.diff(bounds).max()))
        self._admit.cut_all(letters, bounds, *table, ids, places)

        def work(scratch: Scratch, first: int) -> None:
            self._admit.look(
                ids,
                places,
                first,
                self._threads.count,
                *self._searched(scratch),
                items,
                scores,
            )

        self._threads.map(work, range(self._threads.count))

    def nearest(self, text: str, k: int = 10) -> Nearest:
        """The k items with the highest F, and the mean F over all items (0 when there are none).

        The mean is the exact sum rounded once, over the number of items.
        """
        with self._lock:
            ids = self._vocabulary.ids(text)
            if len(ids) > self._long.LONG:
                ids = ids[:0]
            return self._nearest(self._threads.scratch, [ids], [self._size], k)[0]

    def neighbours(self, items: Sequence[int], k: int = 10) -> list[Nearest]:
        """``nearest`` for each of ``items`` among the items before it; sixteen at once cost little
        more than one.
        """
        found = [Nearest((), 0.0)] * len(items)
        with self._lock:
            texts = [self._tokens[self._starts[i] : self._starts[i + 1]] for i in items]

            def work(scratch: Scratch, chosen: list[int]) -> list[Nearest]:
                return self._nearest(
                    scratch, [texts[i] for i in chosen], [items[i] for i in chosen], k
                )

            batches = list(self._batches(texts))
            for chosen, batch in zip(batches, self._threads.map(work, batches), strict=True):
                for i, nearest in zip(chosen, batch, strict=True):
                    found[i] = nearest
        return found

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that it holds as flat arrays. What is added to in places is copied; the rest stays as
        it is while texts are added.
        """
        with self._lock:
            size, known, epochs = self._size, len(self._vocabulary), self._epoch + 1
            words = self._vocabulary.arrays()
            return {
                "words": words["letters"],
                "word_ends": words["ends"],
                "tokens": self._tokens[: int(self._starts[size])],
                "starts": self._starts[: size + 1],
                "signatures": self._signatures[:size],
                "postings": self._postings[: self._end].copy(),
                "counts": self._counts[:known].copy(),
                "levels": self._levels[:epochs, :known].copy().reshape(-1),
                "heads": self._heads[:epochs, :known].copy().reshape(-1),
                **{f"long_{name}": array for name, array in self._long_texts.arrays().items()},
            }

    def take(self, arrays: Mapping[str, Part]) -> None:
        """Hold what an index of the same threshold and language had, where this one is empty.

        Raises ValueError where something is in them that would lead out of an array, or for ever
        around. That they are what was there before, a checksum must say.
        """
        with self._lock:
            vocabulary = self._vocabulary
            vocabulary.take(arrays["words"], arrays["word_ends"])
            known, size = len(vocabulary), arrays["signatures"].size
            levels, heads = arrays["levels"].used, arrays["heads"].used
            epochs = len(heads) // known if known else 1
            self._checks.check(arrays, size, known, epochs)
            self._long_texts.take(arrays, size, known)
            for name in ("tokens", "starts", "signatures", "postings", "counts"):
                setattr(self, f"_{name}", arrays[name].array)
            self._size, self._end, self._epoch = size, arrays["postings"].size, epochs - 1
            self._caught_up = self._long_texts.last + 1
            self._room = 0
            self._make_ready(0)
            self._levels[:epochs, :known] = levels.reshape(epochs, known)
            self._heads[:epochs, :known] = heads.reshape(epochs, known)

    @property
    def nbytes(self) -> int:
        """Bytes in use, the texts as token ids and the vocabulary included."""
        scratch = self._threads.nbytes_an_item
        by_token = self._counts.itemsize + scratch
        by_token += (self._epoch + 1) * (self._levels.itemsize + self._heads.itemsize)
        by_item = self._starts.itemsize + self._signatures.itemsize + scratch
        tokens = int(self._starts[self._size])
        return (
            self._vocabulary.nbytes
            + self._long_texts.nbytes
            + len(self._vocabulary) * by_token
            + self._size * by_item
            + tokens * self._tokens.itemsize
            + self._end * self._postings.itemsize
        )

    def _batches(self, texts: list[NDArray[np.uint32]]) -> Iterable[list[int]]:
        """Positions of texts to scan together: as many as there are lanes, of like length."""
        by_words: dict[int, list[int]] = {}
        for i, tokens in enumerate(texts):
            by_words.setdefault(_words(tokens), []).append(i)
        for words, alike in by_words.items():
            # A lane more is 32 rows of masks more for each word, all of 64 bytes a word.
            lanes = min(self._scan.LANES, max(1, MOST_MASKS // (32 * words * 64 * words)))
            yield from (alike[i : i + lanes] for i in range(0, len(alike), lanes))

    def _nearest(
        self, scratch: Scratch, texts: list[NDArray[np.uint32]], sizes: list[int], k: int
    ) -> list[Nearest]:
        k = min(k, max(sizes))
        if k <= 0:
            return [Nearest((), 0.0)] * len(texts)
        words = max(map(_words, texts))
        ids = np.concatenate(texts)
        rows = len(ids) + 1  # at most; counting those that differ costs more than the room
        items = np.empty((len(texts), k), np.int64)
        scores = np.empty((len(texts), k), np.float64)
        sums = np.empty((len(texts), 2), np.int64)
        self._scan.scan(
            ids,
            np.cumsum([0, *map(len, texts)]),
            np.array(sizes, np.int64),
            len(self._vocabulary),
            self._tokens,
            self._starts,
            scratch.rows,
            np.zeros(rows * words * self._scan.LANES, np.uint32),
            words,
            items,
            scores,
            sums,
        )
        nearest: list[Nearest] = []
        for q, size in enumerate(sizes):
            hits = tuple(map(Hit, items[q, :size].tolist(), scores[q, :size].tolist()))
            high, low = sums[q].tolist()
            nearest.append(Nearest(hits, ((high << 35) + low) / (1 << 70) / size if size else 0.0))
        return nearest

    def _make_ready(self, n: int) -> None:
        """For one more text of n tokens: its epoch, and room for whatever it needs. Raises
        ConfigError where its numbers would not fit into 32 bits.
        """
        if self._size in EPOCH_STARTS[self._epoch :]:
            self._epoch += 1
            self._kernels.freeze(self._epoch, self._counts, len(self._vocabulary), self._levels)
        size = self._end + n * (2 + self._kernels.CHUNK)
        size = max(size, int(self._starts[self._size]) + n, self._size + 2)
        size = max(size, len(self._vocabulary) + n + 1)
        if size > self._kernels.MOST:
            raise full(f"{self._size:,} texts")
        if size <= self._room:
            return
        size = min(max(size, 2 * self._room), self._kernels.MOST)
        items, known = self._size + 1, len(self._vocabulary)
        self._tokens = room(self._tokens, size, int(self._starts[self._size]))
        self._starts = room(self._starts, size, items)
        self._signatures = room(self._signatures, size, items)
        self._postings = room(self._postings, size, self._end)
        self._counts = room(self._counts, size, known)
        self._levels = room(self._levels, size, known)
        self._heads = room(self._heads, size, known)
        self._threads.make_room(size, items, known)
        self._room = size


def _words(tokens: NDArray[np.uint32]) -> int:
    """How many words of 32 bits a text takes in the scan."""
    return max(1, -(-len(tokens) // 32))
