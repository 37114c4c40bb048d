"""A server that counts requests by the minute and does not say so.

When it refuses, it has nothing left. So between two refusals it took all that it takes in that
time, but for one request: with N taken in T seconds it takes less than (N + 1) / T. The measure is
a little too high where N is small, so that the next refusal comes after about as many requests as
all before it together.
"""

from __future__ import annotations

import math

from engine.limits.finder.bound import Bound

__all__ = ["PER_REFUSAL", "Rate"]

PER_REFUSAL = 160
"""Requests taken for each refusal that is risked, so that under one per cent are refused."""
RISE = 0.05
"""The first rise after a refusal at least; it doubles with each that goes well."""
SHORT_S = 1.0
"""Too short a time to measure: nothing is sent for so long, and no rise made for thrice that."""
IN_VAIN = 2
"""Refusals beyond those that a rate explains, after which there is none. It is known twice as well
each time that twice as much was taken, so it explains one for each doubling."""


class Rate:
    """All times are seconds of one monotonic clock; ``taken`` counts requests since the start.

    Attributes:
        per_s: requests a second; None: refusals do not follow the clock, as far as is known.
        next_s: when the next may go out.
        refusals: while the rate was never kept for long; and ``between``, what was taken meanwhile.
    """

    def __init__(self) -> None:
        self.per_s: float | None = None
        self.next_s = 0.0
        self.refusals = self.between = 0
        # When the refusal was that it is measured from, and how many had been taken; the latest.
        self._first = self._latest = (0.0, -PER_REFUSAL)
        self._rises, self._doubt, self._rise_s, self._rise_at = 0, 0.0, 0.0, 0

    def sent(self, now_s: float) -> None:
        if self.per_s is not None:
            # Evenly, but what waited for a moment may follow at once.
            self.next_s = max(self.next_s, now_s - 0.1) + 1 / self.per_s

    def since(self, taken: int) -> int:
        """How many were taken since the latest refusal."""
        return taken - self._latest[1]

    def mark(self, now_s: float, taken: int) -> None:
        """A refusal of which it is not known whether it follows the clock."""
        self._first = self._latest = (now_s, taken)
        self.refusals = self.between = 0

    def learn(self, now_s: float, taken: int, wait_s: float | None) -> bool:
        """A refusal that the clock may explain; ``wait_s`` is what the server asks for. False:
        there are too many of them, and it forgets what it knew.
        """
        since = self.since(taken)
        # The rate was kept for long: what is measured from here on is of the server as it is now.
        if since >= PER_REFUSAL:
            self.mark(*self._latest)
        self.between += max(since, 0)
        self.refusals += since > 0  # several in a row with nothing taken between are one
        if self.refusals > IN_VAIN + math.log2(1 + self.between):
            self.per_s = None
            return False
        self._latest = now_s, taken
        # Over the longest time there is: each further refusal makes the measure better.
        took_s, sum_ = now_s - self._first[0], max(taken - self._first[1], 0)
        if self.per_s is None or took_s >= SHORT_S:
            self.per_s = max(0.99 * (sum_ + 1) / max(took_s, 0.1), 1 / 30)
        silence_s = max(SHORT_S if took_s < SHORT_S else 0.1, 1 / self.per_s, wait_s or 0.0)
        self.next_s = max(self.next_s, now_s + silence_s)
        # With N taken the measure is too high or too low by one part in N, so it may rise by that.
        self._rises, self._doubt = 0, max(1 / (sum_ + 1), RISE)
        self._rise_s, self._rise_at = self.next_s, taken + min(4 * (sum_ + 1), PER_REFUSAL)
        return True

    def rise(self, now_s: float, taken: int) -> bool:
        """Whether nothing was refused for so long that it is a little higher now."""
        if self.per_s is None or now_s < self._rise_s + 3 * SHORT_S or taken < self._rise_at:
            return False
        self.per_s *= 1 + min(self._doubt * 2.0**self._rises, 1.0)
        self._rises, self._rise_s = self._rises + 1, now_s
        self._rise_at = taken + PER_REFUSAL // (self._rises + 1)
        return True

    def bound(self, latency_s: float) -> Bound:
        """A little more than the rate has in flight."""
        per_s = self.per_s or 0.0
        why = f"the server takes about {60 * per_s:,.0f} a minute; set --requests-per-min"
        return Bound(1.1 * per_s * latency_s + 1, why)
