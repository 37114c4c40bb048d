"""Whether refusals (429) follow the clock: the server counts requests a minute, not in flight."""

from __future__ import annotations

import math
from collections import deque

from engine.limits.finder.chance import MOST

__all__ = ["Clock"]

VARIED = 0.08
"""Logarithm of the ratio of two Retry-After that differ by more than what the pool adds to them: so
they follow the clock from the second refusal on."""
CONTRARY, SWAMPED = 6.0, 0.5
"""Evidence that refusals follow the clock, where a number in flight refuses none, weighed against
the most that are put down to chance; and the share that is refused then."""
LATEST = 10
"""Answers that show what a server takes at once."""


class Clock:
    """What the refusals of one server say about it; ``few`` is a handful in flight."""

    def __init__(self, few: int) -> None:
        self._few = few
        self._asked_s = 0.0  # the latest Retry-After, if short
        self._evidence = 0.0
        self._taken: deque[int] = deque(maxlen=LATEST)  # in flight with each of the latest answered

    def answered(self, in_flight: int) -> None:
        """A request was taken, with which so many were in flight."""
        self._taken.append(in_flight)
        self._evidence = max(self._evidence + math.log((1 - SWAMPED) / (1 - MOST)), 0.0)

    def counts_down(self, retry_after_s: float | None, latency_s: float) -> bool:
        """Whether refusals ask for different waits, each shorter than a latency: a clock's."""
        if retry_after_s is None or retry_after_s > latency_s:
            return False
        before_s, self._asked_s = self._asked_s or retry_after_s, retry_after_s
        return abs(math.log(retry_after_s / before_s)) > VARIED

    def refused(self, in_flight: int) -> bool:
        """A request was refused, with which so many were in flight. True: it is the clock, as a
        server that counts what is in flight would have taken it, and chance does not explain all of
        them. It was alone, or with no more than a handful that has just been taken.
        """
        taken = min(self._taken) if len(self._taken) == LATEST else 1
        if in_flight > max(min(taken, self._few), 1):
            return False
        self._evidence += math.log(SWAMPED / MOST)
        return self._evidence >= CONTRARY

    def look_anew(self) -> None:
        """The limit was cut: what was taken before says nothing of what is taken now."""
        self._taken.clear()
