"""The garbage collector of a process that makes much and drops little."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["seldom_collected"]

THRESHOLDS = (50_000, 10, 10)
"""``gc.set_threshold`` of a run: it has tens of thousands of objects in flight, and next to none of
them end in a cycle."""


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Keep the garbage collector from what was made so far, and let it look seldom at the rest.

    Libraries, seeds and models stay to the end; passing over them again and again took a fifth of
    the CPU.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
