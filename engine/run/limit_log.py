"""Keeps in the run's store how the limits in flight changed and why, for ``woolmill view``."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

from engine.limits import News, Pool
from engine.store import RunStore
from engine.text import visible

__all__ = ["LimitLog"]

EVERY_S = 5.0
"""The least time between two commits: a limit may change many times a second."""
KEPT = 200
"""Changes in the store, all endpoints together: some 30 KB."""


class LimitLog:
    """The latest changes of all endpoints' limits, those of earlier sessions before them."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._news = News()
        self._changes: deque[dict[str, Any]] = deque(store.limits(), maxlen=KEPT)
        self._is_new = False
        self._due_s = 0.0

    def keep(self, pool: Pool, *, at_once: bool = False) -> None:
        """Write what is new, if it is time. Nobody waits for it: no result depends on it, and a
        disk that fails is said by those who do wait.
        """
        for endpoint, change in self._news.of(each.history for each in pool.snapshot()):
            self._changes.append(change.plain(visible(endpoint)))
            self._is_new = True
        now_s = time.monotonic()
        if self._is_new and (at_once or now_s >= self._due_s):
            self._is_new, self._due_s = False, now_s + EVERY_S
            self._store.keep_limits(list(self._changes)).add_done_callback(_let_go)


def _let_go(written: asyncio.Future[None]) -> None:
    if not written.cancelled():
        written.exception()
