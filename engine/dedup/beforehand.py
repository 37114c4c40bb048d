"""What a row must pass before it is compared: a row that is refused here keeps no other out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.datasets import Row
from engine.dedup.shared import SharedRuns

__all__ = ["EMPTY", "Checks", "Refusal"]

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


class Checks:
    """Looks at rows in their order.

    Args:
        require: fields in which something must stand.
        shared: rows to stay clear of; no text of a row may have a run of words with them in common.
    """

    def __init__(self, require: tuple[str, ...], shared: SharedRuns | None) -> None:
        self._require = require
        self._shared = shared
        self.unseen = set(require)
        """Required fields that no row had so far."""

    def __call__(self, row: Row) -> Refusal | None:
        """Why the row is refused; None: it may be compared."""
        self.unseen -= row.values.keys()
        for name in self._require:
            if _is_blank(row.values.get(name)):
                return Refusal(f"{EMPTY}:{name}")
        if self._shared is not None:
            for text in _texts(row.values):
                if (found := self._shared.find(text)) is not None:
                    return Refusal("shared_words", found.source, found.text, found.run)
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
