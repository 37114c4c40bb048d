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

from collections import Counter, defaultdict
from typing import Any

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


ALPACA_SHAPE = Shape()
"""The fields of a row where none are told: Alpaca's."""


class Bursts:
    """Takes accepted records; ``found`` says what is suspicious. Keeps the words of all rows."""

    def __init__(self, language: str = ENGLISH, shape: Shape = ALPACA_SHAPE) -> None:
        self._language = language
        self._shape = shape
        self._words: list[tuple[str, ...]] = []
        self._openings: list[str] = []
        self._known: dict[str, str] = {}

    def add(self, record: Record) -> None:
        known = self._known
        words = tokenize(self._shape.asked(record), self._language)
        self._words.append(tuple(known.setdefault(word, word) for word in words))
        answer = self._shape.answer(record)
        begins = "" if answer is None else opening(record[answer], OPENING_WORDS)
        self._openings.append(known.setdefault(begins, begins))

    def found(self) -> list[dict[str, Any]]:
        """The most suspicious phrases: those with a fixed answer first, then by rows."""
        rows_of_word: Counter[str] = Counter()
        for words in self._words:
            rows_of_word.update(set(words))
        rows_of = self._phrases({w for w, n in rows_of_word.items() if n >= MIN_ROWS})
        share = Counter(self._openings)
        found = []
        for phrase, rows in rows_of.items():
            if len(rows) < MIN_ROWS:
                continue
            opening, alike = Counter(self._openings[row] for row in rows).most_common(1)[0]
            agreement = alike / len(rows)
            fixed_answer = (
                agreement >= AGREE and opening and share[opening] < COMMON * len(self._words)
            )
            fixed_phrase = len(phrase) >= 3 and all(
                rows_of_word[word] * (1 - APART) <= len(rows) for word in phrase
            )
            if fixed_answer or fixed_phrase:
                found.append(
                    (bool(fixed_answer), len(rows), len(phrase), phrase, agreement, opening)
                )
        found.sort(key=lambda f: (-f[0], -f[1], -f[2], f[3]))
        return _without_parts(found)

    def _phrases(self, frequent: set[str]) -> dict[tuple[str, ...], list[int]]:
        """Rows of every phrase of frequent words; a row counts once."""
        counts: Counter[tuple[str, ...]] = Counter()
        for words in self._words:
            counts.update(_phrases(words, frequent))
        enough = {phrase for phrase, n in counts.items() if n >= MIN_ROWS}
        del counts
        rows_of: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for row, words in enumerate(self._words):
            for phrase in _phrases(words, frequent) & enough:
                rows_of[phrase].append(row)
        return rows_of


def _phrases(words: tuple[str, ...], frequent: set[str]) -> set[tuple[str, ...]]:
    found = set()
    for start in range(len(words)):
        for end in range(start + 1, min(start + MAX_WORDS, len(words)) + 1):
            if words[end - 1] not in frequent:
                break
            found.add(words[start:end])
    return found


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
