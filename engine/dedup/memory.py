"""Arrays that grow with an index, without making an insert wait."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["reserve", "room"]

RESERVE = 256 << 20
"""Bytes of address space that an array starts with: room for some million items before anything
must be copied. Pages cost nothing until they are written to."""


def reserve(dtype: Any, nbytes: int = RESERVE) -> NDArray[Any]:
    """Zeros. Mapped here as numpy asks for huge pages, and an insert waits for each of them."""
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype)


def room(array: NDArray[Any], size: int) -> NDArray[Any]:
    """The array itself where it has ``size`` elements, else a copy with twice as many."""
    if size <= len(array):
        return array
    larger = reserve(array.dtype, max(2 * array.nbytes, size * array.itemsize))
    larger[: len(array)] = array
    return larger
