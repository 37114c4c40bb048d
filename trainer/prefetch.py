"""The micro-batches of the steps to come, made in a thread while the device works.

What a step needs is a pure function of its number, so the thread only runs ahead of it: nothing
depends on how far it got, and nothing is saved of it. On a GPU the tensors lie in page-locked
memory, so that their copies run beside the computation.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

__all__ = ["ahead"]

T = TypeVar("T")

_DEPTH = 2
"""Steps that are held ready at most."""


def ahead(make: Callable[[int], T], steps: range) -> Iterator[T]:
    """``make(step)`` for every one of ``steps`` in order, each made before it is asked for.

    Raises:
        Exception: what ``make`` raised, when its step is asked for.
    """
    ready: queue.Queue[T | BaseException] = queue.Queue(_DEPTH)
    enough = threading.Event()

    def run() -> None:
        for step in steps:
            try:
                made: T | BaseException = make(step)
            except BaseException as exc:  # noqa: BLE001 - raised again where it is asked for
                made = exc
            while not enough.is_set():
                try:
                    ready.put(made, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if enough.is_set() or isinstance(made, BaseException):
                return

    thread = threading.Thread(target=run, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in steps:
            made = ready.get()
            if isinstance(made, BaseException):
                raise made
            yield made
    finally:
        enough.set()
