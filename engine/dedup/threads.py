"""Threads for work that reads an index and leaves it as it is: the compiled loops free the GIL.

What a text is compared with does not depend on them, so neither does a decision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.dedup.kernels import LONG
from engine.dedup.memory import reserve, room

__all__ = ["Scratch", "Threads"]

MOST = 16
"""Threads that help: beyond, they wait for memory and not for each other's turn."""

Job = TypeVar("Job")
Done = TypeVar("Done")


class Scratch:
    """What a search writes to: each thread has its own. ``kernels.find`` says what each is.

    Attributes:
        rows: by token; all zeros between two calls.
        seen: a count, and one number for each item.
        limits: of short texts.
    """

    def __init__(self) -> None:
        self.rows: NDArray[np.uint32] = reserve(np.uint32)
        self.seen: NDArray[np.uint32] = reserve(np.uint32)
        self.limits = np.zeros((LONG, 2, LONG + 1), np.int64)

    def make_room(self, size: int, items: int, known: int) -> None:
        """For ``size`` tokens, and as many items, where ``items`` and ``known`` were in use."""
        self.seen = room(self.seen, size + 1, items)
        self.rows = room(self.rows, size, known)


class Threads:
    """Up to ``count`` of them, with the scratch of each; the first one's is the caller's."""

    def __init__(self, count: int) -> None:
        self.count = min(count, MOST)
        self.scratch = Scratch()
        self._others: list[Scratch] = []
        """Made when they are needed: most indexes never grow so large."""
        self._size = 0
        self._pool: ThreadPoolExecutor | None = None

    @property
    def nbytes_an_item(self) -> int:
        """Of all scratch there is, which has as many bytes for each token."""
        return self.scratch.seen.itemsize * (1 + len(self._others))

    def make_room(self, size: int, items: int, known: int) -> None:
        """As ``Scratch.make_room``, for each."""
        self._size = size
        for scratch in (self.scratch, *self._others):
            scratch.make_room(size, items, known)

    def map(self, function: Callable[[Scratch, Job], Done], jobs: Sequence[Job]) -> list[Done]:
        """What ``function`` makes of each job, in their order; job i is for thread i mod the number
        of threads.
        """
        if self.count == 1 or len(jobs) < 2:
            return [function(self.scratch, job) for job in jobs]
        if self._pool is None:
            others = [Scratch() for _ in range(self.count - 1)]
            for scratch in others:
                scratch.make_room(self._size, 0, 0)
            self._others = others
            self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="woolmill-decide")
        own = (self.scratch, *self._others)

        def work(number: int) -> list[Done]:
            return [function(own[number], job) for job in jobs[number :: self.count]]

        done: list[Done | None] = [None] * len(jobs)
        for number, some in enumerate(self._pool.map(work, range(self.count))):
            done[number :: self.count] = some
        return done  # type: ignore[return-value]
