"""Arrays that grow with an index, without making an insert wait."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import UnavailableError

__all__ = ["reserve", "room"]

RESERVE = 256 << 20
"""Bytes of address space that an array starts with: room for some million items before anything
must be copied. Pages cost nothing until they are written to."""


def reserve(dtype: Any, rows: int = 0, nbytes: int = RESERVE) -> NDArray[Any]:
    """Zeros (n,), or (rows, n), of ``nbytes`` in all or for each row.

    Mapped here as numpy asks for huge pages, and an insert waits for each of them. Raises
    UnavailableError where the process may not have so much address space.
    """
    nbytes *= max(rows, 1)
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as exc:
        raise UnavailableError(
            f"no memory: the near-duplicate index cannot reserve {nbytes >> 20} MiB of address "
            f"space ({exc.strerror}); raise the limit (ulimit -v), or switch the stage off"
        ) from exc
    array = np.frombuffer(pages, dtype)
    return array.reshape(rows, -1) if rows else array


def room(array: NDArray[Any], size: int) -> NDArray[Any]:
    """The array itself where it (or each of its rows) has ``size`` elements, else a larger copy."""
    had = array.shape[-1]
    if size <= had:
        return array
    rows = len(array) if array.ndim == 2 else 0
    larger = reserve(array.dtype, rows, max(2 * had, size) * array.itemsize)
    larger[..., :had] = array
    return larger
