"""A pace in requests a second, learnt from the refusals of a server that counts by the clock.

Between two refusals such a server took what it takes a minute, no less: that is the pace. It rises
a little while nothing is refused, and falls back to what was measured when something is.
"""

from __future__ import annotations

__all__ = ["Pace"]

FIRST_LATENCIES, FIRST_ANSWERS, UNSURE = 1.0, 10, 0.8
"""How much must lie between two refusals for a first measure, and the share of it that is kept."""
SURE_LATENCIES, SURE_S = 5.0, 5.0
"""How much must lie between them for any other, of which all but a hundredth is kept."""
RISE = 0.1
BURST_S = 0.1
"""How far a pace may be made up for after a lull."""


class Pace:
    """The pace of one server. All times are seconds of one monotonic clock.

    Attributes:
        by_clock: whether its refusals follow the clock, and not the number in flight.
        per_s: requests a second; None: not known, or not what holds the run back.
        next_s: when the next may go out.
    """

    def __init__(self) -> None:
        self.by_clock = False
        self.per_s: float | None = None
        self.next_s = 0.0
        self._measured_per_s = 0.0
        self._rise = RISE
        self._mark: tuple[float, int] | None = None  # a refusal, and what was accepted until then

    def sent(self, now_s: float) -> None:
        if self.per_s is not None:
            self.next_s = max(self.next_s, now_s - BURST_S) + 1 / self.per_s

    def refused(self, sent_at_s: float) -> None:
        """A request that went out at ``sent_at_s``: if it was under way at the mark, it had been
        taken for accepted.
        """
        if self._mark is not None and sent_at_s < self._mark[0]:
            self._mark = self._mark[0], self._mark[1] - 1

    def learn(self, now_s: float, accepted: int, latency_s: float) -> None:
        """At the first refusal of an episode, with all that was accepted so far."""
        since_s, before = self._mark or (now_s, accepted)
        self._mark = since_s, before
        if not self.by_clock:
            return
        seconds, taken = now_s - since_s, accepted - before
        sure_s = max(SURE_LATENCIES * latency_s, SURE_S)
        wanted_s = FIRST_LATENCIES * latency_s if self.per_s is None else sure_s
        if seconds >= wanted_s and taken >= FIRST_ANSWERS:
            # Some that are in flight will be refused; in a short time they count.
            share = 0.99 if seconds >= sure_s else UNSURE
            self.per_s = self._measured_per_s = share * taken / seconds
            self.next_s = now_s
            self._mark = now_s, accepted
        elif self.per_s is not None:
            self.per_s = self._measured_per_s  # it rose too soon
        self._rise = RISE

    def rise(self) -> None:
        """Nothing was refused for long: a tenth more, then a fifth, up to twice as much."""
        assert self.per_s is not None
        self.per_s *= 1 + self._rise
        self._rise = min(2 * self._rise, 1.0)

    def forget(self) -> None:
        self.by_clock, self.per_s, self._mark = False, None, None
