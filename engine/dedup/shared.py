"""Runs of words that texts have in common with rows to stay clear of: the usual look for questions
of a benchmark in training data (GPT-3's appendix C: runs of 8 to 13 words).

Only the hash of each run is kept beside its row, 12 bytes, and what it finds is confirmed in that
row's text: no run is missed, and none is found that is not there.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from engine.dedup.texts import Texts
from engine.languages import MIXED, tokens_of

__all__ = ["Shared", "SharedRuns"]


class Shared(NamedTuple):
    """A run of words that a text shares with a reference."""

    run: str
    text: str
    """Of the reference."""
    source: str


class SharedRuns:
    """References, and which of them has a run of ``words`` words with a text in common.

    All texts are cut as in a set of several languages, whatever they are written in: a question in
    English is found in a Chinese text too. There a character is a word.
    """

    def __init__(self, words: int) -> None:
        self.words = words
        self.short = 0
        """References of fewer words, in which there is no such run."""
        self._texts, self._sources = Texts(), Texts()
        self._hashes, self._items = array("q"), array("I")
        """Of each run, and the reference that it is in."""
        self._sorted = np.empty(0, np.int64)
        self._by_hash = np.empty(0, np.uint32)

    def __len__(self) -> int:
        """Runs of all references."""
        return len(self._hashes)

    def add(self, text: str, source: str) -> None:
        """Add a reference."""
        before, item = len(self._hashes), len(self._texts)
        self._hashes.extend(self._hashed(tokens_of(text, MIXED)))
        found = len(self._hashes) - before
        self._items.extend([item] * found)
        self.short += not found
        self._texts.append(text)
        self._sources.append(source)

    def find(self, text: str) -> Shared | None:
        """The first run of a text that a reference has too."""
        tokens = tokens_of(text, MIXED)
        hashes = np.fromiter(self._hashed(tokens), np.int64)
        self._sort()
        first, end = (np.searchsorted(self._sorted, hashes, side) for side in ("left", "right"))
        for place in np.flatnonzero(first < end):
            run = " ".join(tokens[place : place + self.words])
            for item in map(int, self._by_hash[first[place] : end[place]]):
                reference = self._texts[item]
                if f" {run} " in f" {' '.join(tokens_of(reference, MIXED))} ":
                    return Shared(run, reference, self._sources[item])
        return None

    def _hashed(self, tokens: Sequence[str]) -> Iterator[int]:
        """Of each run. Python's hashes are keyed anew in each process: nobody can choose texts of
        which many are the same.
        """
        for place in range(len(tokens) - self.words + 1):
            yield hash(" ".join(tokens[place : place + self.words]))

    def _sort(self) -> None:
        """Put the runs in the order of their hashes, where some came since."""
        if len(self._sorted) != len(self._hashes):
            hashes = np.array(self._hashes, np.int64)
            order = np.argsort(hashes, kind="stable")
            self._sorted, self._by_hash = hashes[order], np.array(self._items, np.uint32)[order]
