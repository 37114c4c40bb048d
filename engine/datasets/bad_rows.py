"""Rows of a dataset that cannot be read: they stop whoever reads, or are left out and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from engine.errors import InputError

__all__ = ["BadRows", "OnBadRow"]

OnBadRow: TypeAlias = Literal["stop", "skip"]
"""What a row that cannot be read does."""
NAMED = 10
"""Rows that are named to the person; the others are only counted."""


class BadRows:
    """Takes what is wrong with a row, as ``Dataset`` gives it; raises it where rows are to stop."""

    def __init__(self, on_bad_row: OnBadRow) -> None:
        self._on_bad_row = on_bad_row
        self._named: list[str] = []
        self._say: Callable[[str], object] = self._named.append
        self.count = 0
        """How many were left out."""
        self.log: Callable[[InputError], object] | None = None
        """Hears of each."""

    def tell(self, say: Callable[[str], object]) -> None:
        """Name the first ones by ``say``: those that were met, and those that will be."""
        for name in self._named:
            say(name)
        self._say = say

    def note(self, line: str) -> None:
        """Say something else about the rows, now or as soon as somebody listens."""
        self._say(line)

    def beforehand(self, wrong: InputError) -> None:
        """Of a look at the rows that does not count."""
        if self._on_bad_row == "stop":
            raise InputError(f"{wrong}; --on-bad-row skip leaves such rows out") from wrong

    def __call__(self, wrong: InputError) -> None:
        self.beforehand(wrong)
        self.count += 1
        if self.count <= NAMED:
            self._say(f"left out: {wrong}")
        if self.log is not None:
            self.log(wrong)
