"""Rows of a dataset that cannot be read: they stop whoever reads, or are left out and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

from engine.errors import InputError

__all__ = ["BAD_ROWS", "BadRowError", "BadRows", "OnBadRow", "Skip", "count_bad_rows"]

BAD_ROWS = "bad_rows.jsonl"
"""The file in a run's folder that names the rows of its input that were left out."""

OnBadRow: TypeAlias = Literal["stop", "skip"]
"""What a row that cannot be read does."""
NAMED = 10
"""Rows that are named to the person; the others are only counted."""
MOST_RAW = 2_000
"""Characters of a row that are kept of it."""


def count_bad_rows(folder: Path) -> int:
    """How many rows of its input the run in ``folder`` has left out."""
    try:
        with (folder / BAD_ROWS).open("rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


class BadRowError(InputError):
    """One row cannot be read; the next may be.

    Args:
        line: where it begins in ``path``, or its number, from 1.
        raw: the row as it stands there, as far as that is known.
        values: the same, where it was read and yet is of no use.
    """

    def __init__(
        self,
        message: str,
        path: Path,
        line: int,
        *,
        raw: bytes = b"",
        values: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.path = path
        self.line = line
        self.values = values
        self._raw = raw[: 4 * MOST_RAW]

    @property
    def raw(self) -> str:
        """The beginning of the row, for a person."""
        if not self._raw and self.values is not None:
            return json.dumps(self.values, ensure_ascii=False, default=str)[:MOST_RAW]
        return self._raw.decode(errors="replace").strip()[:MOST_RAW]


Skip = Callable[[BadRowError], None]
"""Takes what is wrong with a row that is left out."""


class BadRows:
    """Takes what is wrong with a row, as ``Dataset`` gives it; raises it where rows are to stop."""

    def __init__(self, on_bad_row: OnBadRow) -> None:
        self._on_bad_row = on_bad_row
        self._met: list[BadRowError] = []
        """Before there was anybody to tell."""
        self._hears: Callable[[BadRowError], object] = self._met.append
        self._notes: list[str] = []
        self._note: Callable[[str], object] = self._notes.append
        self.count = 0
        """How many were left out."""

    def tell(
        self, say: Callable[[str], object], log: Callable[[BadRowError], object] | None = None
    ) -> None:
        """Name the first ones by ``say``, and all to ``log``: those that were met, and those that
        will be.
        """
        told = 0

        def hear(wrong: BadRowError) -> None:
            nonlocal told
            told += 1
            if told <= NAMED:
                say(f"left out: {wrong}{'; more are only counted' if told == NAMED else ''}")
            if log is not None:
                log(wrong)

        for line in self._notes:
            say(line)
        for wrong in self._met:
            hear(wrong)
        self._notes.clear()
        self._met.clear()
        self._note, self._hears = say, hear

    def note(self, line: str) -> None:
        """Say something else about the rows, now or as soon as somebody listens."""
        self._note(line)

    def beforehand(self, wrong: BadRowError) -> None:
        """Of a look at the rows that does not count."""
        if self._on_bad_row == "stop":
            raise InputError(f"{wrong}; --on-bad-row skip leaves such rows out") from wrong

    def __call__(self, wrong: BadRowError) -> None:
        self.beforehand(wrong)
        self.count += 1
        self._hears(wrong)
