"""Arrays that grow with an index, without making an insert wait."""

from __future__ import annotations

import mmap
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError, UnavailableError

__all__ = ["Part", "check_ends", "full", "reserve", "room"]


class Part(NamedTuple):
    """An array with room to grow, and how many of its elements are in use."""

    array: NDArray[Any]
    size: int

    @property
    def used(self) -> NDArray[Any]:
        return self.array[: self.size]


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


def room(array: NDArray[Any], size: int, used: int | None = None) -> NDArray[Any]:
    """The array itself where it (or each of its rows) has ``size`` elements, else a larger copy of
    the first ``used`` of them: to copy a zero takes memory that the zero did not.
    """
    had = array.shape[-1]
    if size <= had:
        return array
    rows = len(array) if array.ndim == 2 else 0
    larger = reserve(array.dtype, rows, max(2 * had, size) * array.itemsize)
    used = had if used is None else used
    larger[..., :used] = array[..., :used]
    return larger


def check_ends(ends: NDArray[Any], length: int) -> None:
    """Raises ValueError where ``ends`` (N + 1,) do not divide an array of so many elements into N
    parts: 0, then where each part ends.
    """
    if not len(ends) or ends[0] or ends[-1] != length or (ends[1:] < ends[:-1]).any():
        raise ValueError("parts do not lie one after the other")


def full(held: str) -> ConfigError:
    """The error for an index that holds as much as it can number."""
    return ConfigError(
        f"the near-duplicate index is full: it holds {held}, and 32 bits can number no more; "
        "what is accepted so far is kept: go on in a new run, or with a part of the rows"
    )
