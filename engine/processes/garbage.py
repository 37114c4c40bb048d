"""The garbage collector of a process that makes much and drops little."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["seldom_collected"]

THRESHOLDS = (50_000, 10, 10)
"""``gc.set_threshold`` of a run: it has tens of thousands of objects in flight, and next to none of
them end in a cycle."""


_counting = threading.Lock()
_inside = 0
_before = gc.get_threshold()


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Keep the garbage collector from what was made so far, and let it look seldom at the rest.

    Libraries, seeds and models stay to the end; passing over them again and again took a fifth of
    the CPU. Where several runs of a process overlap, the first begins it and the last ends it.
    """
    global _inside, _before
    with _counting:
        _inside += 1
        if _inside == 1:
            _before = gc.get_threshold()
            gc.collect()
            gc.freeze()
            gc.set_threshold(*THRESHOLDS)
    try:
        yield
    finally:
        with _counting:
            _inside -= 1
            if _inside == 0:
                gc.set_threshold(*_before)
                gc.unfreeze()
