"""A bound on the time that hostile input may take, wide enough for a busy machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

MOST_S = 15.0
"""CPU seconds. A megabyte takes some tenths of a second to read in linear time, and minutes in one
that grows with the square of its length."""


@contextmanager
def in_linear_time() -> Iterator[None]:
    """Fails where the block takes as long as only the square of a long input can take."""
    began = time.process_time()
    yield
    assert time.process_time() - began < MOST_S
