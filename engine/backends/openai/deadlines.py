"""Time limits of many calls, with one timer for all of them.

A timer for each call costs more than the rest of its limit, and for a stream it would be set anew
with each event. Limits are long and calls short: the one timer is set for the earliest limit known
when it last ran, and nearly always finds that call over.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator

__all__ = ["Deadlines"]


class Deadlines:
    """The calls under way, each with the time of the loop's clock at which it times out."""

    def __init__(self) -> None:
        self._ends_s: dict[asyncio.Timeout, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._looks_at_s = math.inf

    def __len__(self) -> int:
        return len(self._ends_s)

    def __iter__(self) -> Iterator[asyncio.Timeout]:
        return iter(self._ends_s)

    def set(self, call: asyncio.Timeout, end_s: float) -> None:
        """Let ``call``, entered without a time of its own, time out at ``end_s``."""
        self._ends_s[call] = end_s
        if end_s < self._looks_at_s:
            self._look_at(end_s)

    def drop(self, call: asyncio.Timeout) -> None:
        """The call is over."""
        self._ends_s.pop(call, None)

    def expire(self) -> None:
        """Let every call time out now."""
        for call in list(self._ends_s):
            self._expire(call)

    def close(self) -> None:
        """No call times out any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _expire(self, call: asyncio.Timeout) -> None:
        del self._ends_s[call]
        if not call.expired():
            call.reschedule(asyncio.get_running_loop().time())

    def _look_at(self, at_s: float) -> None:
        self.close()
        self._looks_at_s = at_s
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(at_s, self._look) if at_s < math.inf else None

    def _look(self) -> None:
        now_s = asyncio.get_running_loop().time()
        for call in [call for call, end_s in self._ends_s.items() if end_s <= now_s]:
            self._expire(call)
        self._look_at(min(self._ends_s.values(), default=math.inf))
