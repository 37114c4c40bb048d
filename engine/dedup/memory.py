"""Arrays that grow with an index, without making an insert wait."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["reserve", "room"]

RESERVE = 256 << 20
"""Bytes of address space that an array starts with: room for some million items before anything
must be copied. Pages cost nothing until they are written to."""


def reserve(dtype: Any, nbytes: int = RESERVE, *, huge_pages: bool = False) -> NDArray[Any]:
    """Zeros.

    Mapped here because numpy always asks for huge pages, and an insert waits some milliseconds for
    each of them. They are worth it only where a query reads all over the array.
    """
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype)


def room(array: NDArray[Any], size: int) -> NDArray[Any]:
    """The array itself where it has ``size`` elements, else a copy with twice as many."""
    if size <= len(array):
        return array
    larger = reserve(array.dtype, max(2 * array.nbytes, size * array.itemsize))
    larger[: len(array)] = array
    return larger
