"""ROUGE-L in a dataset of several scripts: an English row is compared as in a dataset of English
alone, and a Chinese one as in a Chinese one; not one with the other, as they share next to nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from engine.dedup.rouge import Hit, Nearest, RougeIndex
from engine.languages import ENGLISH, MIXED, language_of, unit_of

__all__ = ["ByScript", "Cut", "RougeByScript"]


class Cut(NamedTuple):
    """How a text is cut, and above which ROUGE-L F it is refused."""

    language: str
    unit: str
    """What most tokens are."""
    threshold: float


@dataclass(frozen=True, slots=True)
class ByScript:
    """How each text of a dataset is cut.

    Attributes:
        latin: texts in Latin letters.
        words: those of other scripts with spaces between words.
        characters: those of scripts without.
    """

    latin: Cut
    words: Cut
    characters: Cut

    @classmethod
    def alike(cls, language: str, threshold: float) -> ByScript:
        """All in one way."""
        unit = "words" if language_of(language).spaced else "characters"
        if language == MIXED:
            unit = "words, or characters where a script sets no spaces"
        return cls(*[Cut(language, unit, threshold)] * 3)

    @classmethod
    def each(cls, language: str, threshold: float | None = None) -> ByScript:
        """Those in Latin letters as in ``language``. Where no threshold is given, each unit has its
        own.
        """
        words = threshold or language_of(ENGLISH).rouge_threshold
        characters = threshold or language_of(MIXED).rouge_threshold
        return cls(
            Cut(language, "words", words),
            Cut(MIXED, "words", words),
            Cut(MIXED, "characters", characters),
        )

    def of(self, text: str) -> Cut:
        """How this text is cut."""
        if self.latin == self.characters:
            return self.latin
        is_latin, unit = unit_of(text)
        if is_latin:
            return self.latin
        return self.words if unit == "words" else self.characters


class RougeByScript:
    """As ``RougeIndex``: a text is searched for among those of the same ``Cut``. Items are numbered
    as they come, whatever their cut.
    """

    def __init__(self, cuts: ByScript, *, threads: int = 1) -> None:
        self.cuts = cuts
        self._threads = threads
        self._parts: dict[Cut, _Part] = {}
        self._by_item: list[_Part] = []
        self._places = array("I")
        """In the part of each item."""

    def __len__(self) -> int:
        return len(self._places)

    def find(self, text: str) -> Hit | None:
        """As ``RougeIndex.find``."""
        part = self._part(self.cuts.of(text))
        return part.hit(part.index.find(text))

    def admit(self, texts: Sequence[str], limit: int | None = None) -> list[Hit | None]:
        """As ``RougeIndex.admit``."""
        found: list[Hit | None] = []
        goal = len(self) + (len(texts) if limit is None else limit)
        for part, some in self._runs(texts):
            if len(self) == goal:
                break
            for hit in part.index.admit(some, goal - len(self)):
                found.append(part.hit(hit))
                if hit is None:
                    self._note(part)
        return found

    def extend(self, texts: Sequence[str]) -> None:
        """As ``RougeIndex.extend``."""
        for part, some in self._runs(texts):
            part.index.extend(some)
            for _ in some:
                self._note(part)

    def neighbours(self, items: Sequence[int], k: int = 10) -> list[Nearest]:
        """As ``RougeIndex.neighbours``; texts of another cut have nothing in common with it."""
        found: dict[int, Nearest] = {}
        for part in self._parts.values():
            own = [item for item in items if self._by_item[item] is part]
            places = [self._places[item] for item in own]
            for item, place, near in zip(
                own, places, part.index.neighbours(places, k), strict=True
            ):
                hits = tuple(Hit(part.items[hit.item], hit.score) for hit in near.hits)
                found[item] = Nearest(hits, near.mean * (place / item) if item else 0.0)
        return [found[item] for item in items]

    def _part(self, cut: Cut) -> _Part:
        """Made when its first text comes: an index reserves address space."""
        if cut not in self._parts:
            index = RougeIndex(cut.threshold, cut.language, threads=self._threads)
            self._parts[cut] = _Part(index, array("I"))
        return self._parts[cut]

    def _runs(self, texts: Sequence[str]) -> Iterator[tuple[_Part, list[str]]]:
        for cut, run in groupby(texts, self.cuts.of):
            yield self._part(cut), list(run)

    def _note(self, part: _Part) -> None:
        self._places.append(len(part.items))
        part.items.append(len(self._by_item))
        self._by_item.append(part)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The texts of one cut."""

    index: RougeIndex
    items: array[int]
    """Number of each of its items among all."""

    def hit(self, hit: Hit | None) -> Hit | None:
        return hit and Hit(self.items[hit.item], hit.score)
