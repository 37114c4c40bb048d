"""Which accepted rows came and which went when a run was decided again.

What is kept of the rows before is 24 bytes each: where they stand, and a hash of their fields. The
rows themselves are then read from the run as it is now, which still has those that it refuses.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from engine.recipes.base import telling_text
from engine.records import Decision, Record
from engine.store import RunReader
from engine.text import shorten

__all__ = ["Accepted", "Changes"]

SHOWN = 5
"""Rows of each kind that are named; the others are counted."""
CHARACTERS = 70
"""Of a row, in one line of a terminal."""
END = (2**62, 0, 0)
"""Behind all rows."""

Key = tuple[int, int, int]
"""Request, piece and the hash of a row's fields."""


@dataclass(slots=True, kw_only=True)
class Changes:
    """What deciding again did to the accepted rows; one that is another at its place does both."""

    come: int = 0
    go: int = 0
    shown: list[str] = field(default_factory=list)
    """A line for each of the first rows that come and go."""

    def __str__(self) -> str:
        return f"{self.come:,} come, {self.go:,} go"

    def lines(self) -> Iterator[str]:
        """Some of the rows, for a person."""
        yield from self.shown
        if (more := self.come + self.go - len(self.shown)) > 0:
            yield f"  and {more:,} more"


class Accepted:
    """The accepted rows of a run as they are now."""

    def __init__(self, run: RunReader) -> None:
        self._keys = array("q")
        for key, _ in _keys(run):
            self._keys.extend(key)

    def __iter__(self) -> Iterator[Key]:
        one = iter(self._keys)
        return zip(one, one, one, strict=True)

    def compared_with(self, now: RunReader) -> Changes:
        """What has changed since."""
        changes = Changes()
        come: list[str] = []
        go: list[str] = []
        before, after = iter(self), _keys(now)
        old, (new, row) = next(before, END), next(after, (END, None))
        while old != END or new != END:
            if old != new:
                if old[:2] <= new[:2]:
                    changes.go += 1
                    if len(go) < SHOWN:
                        go.append(_gone(now, old))
                if new[:2] <= old[:2]:
                    changes.come += 1
                    if len(come) < SHOWN and row is not None:
                        come.append(_line("+", row, ""))
            was = old
            if was[:2] <= new[:2]:
                old = next(before, END)
            if new[:2] <= was[:2]:
                new, row = next(after, (END, None))
        changes.shown = [*come, *go]
        return changes


def _keys(run: RunReader) -> Iterator[tuple[Key, Decision]]:
    for row in run.decisions(accepted=True):
        yield (row.index, row.position, _hash(row.record)), row


def _hash(record: Record | None) -> int:
    digest = hashlib.blake2b(_plain(record), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _plain(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # half of a surrogate pair, or an integer of any size
        return repr(value).encode(errors="surrogatepass")


def _gone(now: RunReader, key: Key) -> str:
    row = now.decision(key[0], key[1])
    if row is None:
        return f"  - {key[0]}.{key[1]}  (no longer decided on, or read otherwise)"
    return _line("-", row, row.reason or "another row is there now")


def _line(sign: str, row: Decision, why: str) -> str:
    text = shorten(telling_text(row.record or {}) or row.detail, CHARACTERS)
    return f"  {sign} {row.index}.{row.position}  {text}{f'  ({why})' if why else ''}"
