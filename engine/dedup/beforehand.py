"""What a row must pass before it is compared: a row that is refused here keeps no other out."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.datasets import Row
from engine.dedup.exact import ExactIndex
from engine.dedup.shared import SharedRuns

__all__ = ["EMPTY", "Checks", "FirstPlaces", "Refusal"]

EMPTY = "empty"
"""The reason for leaving out a row in which nothing stands, where something is to."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a row is left out without a comparison with those before it."""

    reason: str
    source: str = ""
    """The row that it is refused for, as ``Neighbour.source`` names it."""
    text: str | None = None
    """Of that row."""
    shared: str | None = None
    """Words that both have."""


class FirstPlaces:
    """Where each of many values stood first."""

    def __init__(self) -> None:
        self._known = ExactIndex()
        self._places = array("q")

    def before(self, value: Any, place: int) -> int | None:
        """The place of the same value before this one; None where there is none, or no value."""
        if _is_blank(value):
            return None
        # In digits, as the index takes no notice of case.
        key = ascii(value).encode().hex()
        first = self._known.find(key)
        if first is not None:
            return self._places[first]
        self._known.add(key)
        self._places.append(place)
        return None


class Checks:
    """Looks at rows in their order.

    Args:
        require: fields in which something must stand.
        shared: rows to stay clear of; no text of a row may have a run of words with them in common.
        unique: a field in which no two rows that pass what is before it may have the same value.
    """

    def __init__(
        self, require: tuple[str, ...], shared: SharedRuns | None, unique: str | None
    ) -> None:
        self._require = require
        self._unique = unique
        self._places = FirstPlaces()
        self._number = -1
        self._shared = shared
        self.unseen = dict.fromkeys(require, "--require")
        """Fields that no row had so far, and the options that name them."""
        if unique is not None:
            self.unseen[unique] = "--unique-id"

    def __call__(self, row: Row) -> Refusal | None:
        """Why the row is refused; None: it may be compared."""
        self._number += 1
        for name in self.unseen.keys() & row.values.keys():
            del self.unseen[name]
        for name in self._require:
            if _is_blank(row.values.get(name)):
                return Refusal(f"{EMPTY}:{name}")
        if self._shared is not None:
            for text in _texts(row.values):
                if (found := self._shared.find(text)) is not None:
                    return Refusal("shared_words", found.source, found.text, found.run)
        if self._unique is not None:
            first = self._places.before(row.values.get(self._unique), self._number)
            if first is not None:
                return Refusal(f"duplicate:{self._unique}", f"row:{first}")
        return None


def _is_blank(value: Any) -> bool:
    return value is None or value in ("", [], {}) or (isinstance(value, str) and value.isspace())


def _texts(values: Any) -> Iterator[str]:
    """All texts of a row, in their order, however deep they lie in it."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += reversed(value.values())
        elif isinstance(value, list | tuple):
            waiting += reversed(value)
