"""Many texts as one array of bytes: eight bytes a text beside its letters.

A Python string takes 50 to 60 besides its own, and a place in a list; among ten million that is a
gigabyte.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.dedup.memory import Part, check_ends, reserve, room

__all__ = ["Texts"]


class Texts:
    """Texts by number, counted from 0, as they came."""

    def __init__(self) -> None:
        self._size = 0
        self._end = 0
        # Text i is letters[ends[i]:ends[i + 1]].
        self._letters = reserve(np.uint8)
        self._ends = reserve(np.int64)
        self._make_views()

    def _make_views(self) -> None:
        # One element of an array costs numpy three times what it costs a view of its memory.
        self._in_letters, self._in_ends = self._letters.data, self._ends.data

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, number: int) -> str:
        if not 0 <= number < self._size:
            raise IndexError(f"there is no text {number} among {self._size}")
        letters = self._in_letters[self._in_ends[number] : self._in_ends[number + 1]]
        return str(letters, "utf-8", "surrogatepass")

    def append(self, text: str) -> None:
        letters = text.encode("utf-8", "surrogatepass")  # JSON may carry half of a pair
        end = self._end + len(letters)
        self._make_room(end, self._size + 1)
        self._in_letters[self._end : end] = letters
        self._size += 1
        self._in_ends[self._size] = self._end = end

    def _make_room(self, letters: int, texts: int) -> None:
        if letters > len(self._letters) or texts >= len(self._ends):
            self._letters = room(self._letters, letters, self._end)
            self._ends = room(self._ends, texts + 1, self._size + 1)
            self._make_views()

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return self._end + (self._size + 1) * self._ends.itemsize

    def begins_with(self, others: Texts) -> bool:
        """Whether the first texts here are all those of ``others``."""
        size, end = others._size, others._end
        return np.array_equal(self._ends[: size + 1], others._ends[: size + 1]) and np.array_equal(
            self._letters[:end], others._letters[:end]
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The texts as flat arrays, which stay as they are while others are added."""
        return {"letters": self._letters[: self._end], "ends": self._ends[: self._size + 1]}

    def take(self, letters: Part, ends: Part) -> None:
        """Hold the texts of such arrays instead. Raises ValueError where they cannot be texts."""
        check_ends(ends.used, letters.size)
        self._letters, self._ends = letters.array, ends.array
        self._size, self._end = ends.size - 1, letters.size
        self._make_views()
