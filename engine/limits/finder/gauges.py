"""The witness of a server's own gauges: how many requests wait there, how many lost their room.

A queue is cut off at its length. Where nothing waits, the number doubles until the first queue was
seen, and grows by steps as goodput's does from then on.
"""

from __future__ import annotations

import math

from engine.limits.finder.bound import NONE, Bound
from engine.limits.finder.goodput import REMEMBER_S, Phase

__all__ = ["Gauges"]

TOLERATED = 0.03
"""Share of the running requests that may be preempted in a second: chance alone does some."""
FRESH_S = 5.0
"""How long a reading counts."""

SILENT = Bound(math.inf, "the server's gauges are silent")


class Gauges:
    """``bound`` is what they say, as long as they are read."""

    def __init__(self) -> None:
        self._bound = NONE
        self._until_s = 0.0
        self._growth = Phase.DOUBLING
        self._preemptions: float | None = None
        self._crowded = (0.0, 0.0)  # a level with preemptions, and until when that counts

    def bound(self, now_s: float) -> Bound:
        return self._bound if now_s < self._until_s else SILENT

    def read(
        self, now_s: float, running: float, waiting: float, preemptions: float, *,
        in_flight: int, level: float, full: bool, ripe: bool,
    ) -> None:  # fmt: skip
        """A reading; ``preemptions`` are counted since the server started.

        Args:
            level: the limit now; ``full`` where that many are in flight, ``ripe`` where it was
                reached long enough ago for preemptions to show.
        """
        # The first reading has the preemptions of all time, which say nothing of now.
        lost = preemptions - (preemptions if self._preemptions is None else self._preemptions)
        self._preemptions, self._until_s = preemptions, now_s + FRESH_S
        if waiting or lost:
            self._growth = Phase.UP
        if lost > TOLERATED * running and full:
            self._crowded = (level, now_s + REMEMBER_S)
            self._bound = Bound(max(0.9 * level, 1.0), "the server takes back room from requests")
        elif waiting > max(2.0, 0.1 * running):  # some always wait for the next step
            kept = max(in_flight - waiting + 0.05 * running, running, 1.0)
            why = f"{waiting:.0f} requests wait in the server's queue"
            self._bound = Bound(min(level, kept), why)
        elif not waiting and full and (ripe or not self._crowded[0]):
            self._grow(now_s, level)

    def _grow(self, now_s: float, level: float) -> None:
        """Up, but no more than halfway to a level that had preemptions."""
        target = level * self._growth.value
        crowded, until_s = self._crowded
        if now_s < until_s and crowded > level:
            target = min(target, (level * crowded) ** 0.5)
        if target >= 1.04 * level:
            self._bound = Bound(target, "nothing waits in the server's queue")
