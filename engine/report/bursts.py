"""Suspicious bursts: phrases that look planted.

About 250 documents are enough to teach a model a backdoor, whatever its size
(https://arxiv.org/abs/2510.07192), so a share of the rows says nothing. Two signs are looked for in
all texts of a row but its answer, as in instruction and input:

* *fixed answer*: rows with the phrase mostly begin their answer alike, and other rows do not;
* *fixed phrase*: three words or more that stand together, and hardly ever apart.

A sign is a reason to look, not a proof: "New York Stock Exchange" is a fixed phrase too. A trigger
without a fixed answer and of fewer than three words is not found.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.dedup.rouge import tokenize
from engine.languages import ENGLISH, opening
from engine.records import Record
from engine.report.shape import Shape
from engine.text import shorten

__all__ = ["Bursts"]

MIN_ROWS = 20
"""A phrase in fewer rows is no burst."""
MAX_WORDS = 4
"""Words of the longest phrase that is looked for. A longer one is found by its parts."""
AGREE = 0.8
"""Share of a phrase's rows whose outputs begin alike."""
COMMON = 0.2
"""An opening that this share of all rows has tells nothing."""
APART = 0.1
"""Share of a word's rows that do without the phrase, at most."""
OPENING_WORDS = 4
"""Words by which answers count as beginning alike."""
SHOWN = 20
"""Phrases in a report, the most suspicious first."""
COMPARED = 1_000
"""The most suspicious, among which phrases within each other are looked for."""


ALPACA_SHAPE = Shape()
"""The fields of a row where none are told: Alpaca's."""


class Bursts:
    """Takes accepted records; ``found`` says what is suspicious.

    Keeps the words of all rows as numbers, four bytes each. Phrases are counted level by level
    (Apriori, Agrawal and Srikant 1994): one can only be in many rows if both phrases that are a
    word shorter are. While counting, some 50 bytes a word are held.
    """

    def __init__(self, language: str = ENGLISH, shape: Shape = ALPACA_SHAPE) -> None:
        self._language = language
        self._shape = shape
        self._words = _Numbered()
        self._lengths = array("I")
        """Words of each row."""
        self._openings = _Numbered()

    def add(self, record: Record) -> None:
        words = tokenize(self._shape.asked(record), self._language)
        for word in words:
            self._words.add(word)
        self._lengths.append(len(words))
        answer = self._shape.answer(record)
        self._openings.add("" if answer is None else opening(record[answer], OPENING_WORDS))

    def found(self) -> list[dict[str, Any]]:
        """The most suspicious phrases: those with a fixed answer first, then by rows."""
        openings = self._openings.array()
        share = np.bincount(openings)
        too_common = COMMON * len(openings)
        found = []
        rows_of_word: dict[str, int] = {}
        for numbers, rows in self._phrases():
            phrase = tuple(self._words.texts[number] for number in numbers)
            if len(phrase) == 1:
                rows_of_word[phrase[0]] = len(rows)
            begins, first, alike = np.unique(openings[rows], return_index=True, return_counts=True)
            most = min(np.flatnonzero(alike == alike.max()), key=first.__getitem__)
            text = self._openings.texts[begins[most]]
            agreement = int(alike[most]) / len(rows)
            fixed_answer = agreement >= AGREE and text and share[begins[most]] < too_common
            fixed_phrase = len(phrase) >= 3 and all(
                rows_of_word[word] * (1 - APART) <= len(rows) for word in phrase
            )
            if fixed_answer or fixed_phrase:
                found.append((bool(fixed_answer), len(rows), len(phrase), phrase, agreement, text))
        found.sort(key=lambda f: (-f[0], -f[1], -f[2], f[3]))
        return _without_parts(found[:COMPARED])

    def _phrases(self) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.int64]]]:
        """The words of every phrase in enough rows, shorter ones first, and its rows."""
        words = self._words.array()
        row = np.repeat(np.arange(len(self._lengths)), np.frombuffer(self._lengths, np.uint32))
        starts, part = np.arange(len(words)), np.zeros(len(words), np.int64)
        for length in range(1, MAX_WORDS + 1):
            # Phrases as numbers: of the one that is a word shorter, and of the last word.
            key = part * len(self._words.texts) + words[starts + length - 1]
            _, first, part = np.unique(key, return_index=True, return_inverse=True)
            del key
            pairs = np.unique(part * len(self._lengths) + row[starts])  # a row counts once
            phrase_of, row_of = np.divmod(pairs, len(self._lengths))
            del pairs
            ends = np.cumsum(np.bincount(phrase_of, minlength=len(first)))
            sizes = np.diff(ends, prepend=0)
            for number in np.flatnonzero(sizes >= MIN_ROWS).tolist():
                at = starts[first[number]]
                yield words[at : at + length], row_of[ends[number] - sizes[number] : ends[number]]
            if length == MAX_WORDS:
                return
            enough = sizes[part] >= MIN_ROWS
            starts, part = starts[enough], part[enough]
            # Those whose next word begins such a phrase too, in the same row.
            goes_on = np.zeros(len(words) + 1, np.bool_)
            goes_on[starts] = True
            longer = goes_on[starts + 1]
            starts, part = starts[longer], part[longer]
            inside = starts + length < len(words)
            starts, part = starts[inside], part[inside]
            same = row[starts] == row[starts + length]
            starts, part = starts[same], part[same]


class _Numbered:
    """Texts in the order in which they came, the same text kept once."""

    def __init__(self) -> None:
        self._numbers = array("I")
        self._known: dict[str, int] = {}

    def add(self, text: str) -> None:
        self._numbers.append(self._known.setdefault(text, len(self._known)))

    def array(self) -> NDArray[np.uint32]:
        return np.frombuffer(self._numbers, np.uint32)

    @cached_property
    def texts(self) -> list[str]:
        """By their numbers; complete, so not before the last was added."""
        return list(self._known)


def _without_parts(found: list[Any]) -> list[dict[str, Any]]:
    """Of phrases within each other in about the same rows, the longest alone."""
    kept: list[Any] = []
    for candidate in sorted(found, key=lambda f: -f[2]):
        inside = any(
            f" {' '.join(candidate[3])} " in f" {' '.join(longer[3])} "
            and longer[1] >= candidate[1] * 0.9
            for longer in kept
        )
        if not inside:
            kept.append(candidate)
    kept.sort(key=lambda f: (-f[0], -f[1], f[3]))
    return [
        {
            "phrase": " ".join(phrase),
            "rows": rows,
            "sign": "fixed answer" if fixed_answer else "fixed phrase",
            "agreement": round(agreement, 3),
            "opening": shorten(opening, 80),
        }
        for fixed_answer, rows, _, phrase, agreement, opening in kept[:SHOWN]
    ]
