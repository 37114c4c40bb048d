"""How many requests one endpoint should have in flight, found from what it does.

Three witnesses look at the same requests, and each says "at most this many, because …":

* **refusals** (429), a hosted API's way; those by chance are told from a limit's;
* **goodput**: a server that queues instead of refusing shows its knee in tokens a second;
* **gauges**, where the server publishes its queue (vLLM's ``/metrics``).

The limit is the least of the three, and ``history`` has each change with its reason. Goodput is
asked only where the other two say nothing: a number at which a server refuses, or a queue that it
shows, is known better than what follows from answers. The limit starts by doubling, and never grows
while the work at hand does not fill it.

Ideas from: TCP's slow start and CUBIC's plateau; Inspect AI's saturation gate and DataDesigner's
damping of bursts; Netflix's and Envoy's gradient limiters. ``benchmarks/bench_limits.py`` chose the
numbers.
"""

from __future__ import annotations

import math

from engine.limits.controller import Ticket
from engine.limits.finder.gauges import Gauges
from engine.limits.finder.goodput import Goodput
from engine.limits.finder.refusals import Refusals
from engine.limits.history import History, Witness

__all__ = ["Adaptive"]

SATURATED = 0.8
"""Share of the limit that must be in flight before its measure counts."""
CLIMB_S = 1.0
"""A larger limit is climbed to, so that a refusal on the way stops the rest: at most so long."""


class Adaptive:
    """The controller of ``--max-in-flight auto``; see the head of this file."""

    def __init__(self, *, start: float = 4.0, ceiling: float = 4096) -> None:
        self.ceiling = ceiling
        self.in_flight = self._sent = 0
        self.latency_s = 1.0
        self._target = min(start, ceiling)
        self._from = self._target  # the limit climbs from here to the target
        self._climb_s = self._climb_at_s = 0.0
        self._area = self._area_at_s = 0.0  # integral of in_flight over time
        self._full_at_s: float | None = None  # since when enough are in flight to measure
        self._refusals = Refusals()
        self._goodput = Goodput(self._target)
        self._gauges = Gauges()
        self.history = History(Witness.START, self._goodput.bound.why)

    # What the pool asks

    @property
    def paused_until_s(self) -> float:
        return self._refusals.paused_until_s

    def limit(self, now_s: float) -> float:
        if now_s >= self._climb_at_s + self._climb_s:
            return self._target
        share = max(now_s - self._climb_at_s, 0.0) / self._climb_s
        return self._from + (self._target - self._from) * share

    def has_room(self, now_s: float) -> bool:
        if now_s < self.paused_until_s:
            return False
        if self._refusals.resuming:
            self._refusals.resuming = False
            self._climb(now_s, self.in_flight + 1)
        return self.in_flight + 1 <= self.limit(now_s) and now_s >= self._refusals.rate.next_s

    def next_change_s(self, now_s: float) -> float | None:
        if now_s < self.paused_until_s:
            return self.paused_until_s
        if self.in_flight + 1 <= self.limit(now_s):
            return self._refusals.rate.next_s
        if now_s < self._climb_at_s + self._climb_s:
            return now_s + max(self._climb_s / max(self._target - self._from, 1.0), 0.01)
        return None

    # What the pool tells

    def admit(self, now_s: float) -> Ticket:
        self._count_area(now_s)
        self.in_flight += 1
        self._sent += 1
        if self._full_at_s is None and self._is_full:
            self._full_at_s = now_s
        ticket = Ticket(now_s, self._area, self.in_flight, self._sent)
        self._refusals.sent(now_s, ticket)
        return ticket

    def fail(self, now_s: float) -> None:
        self._count_area(now_s)
        self.in_flight -= 1

    def complete(self, ticket: Ticket, now_s: float, tokens: int) -> None:
        self.fail(now_s)
        took_s = max(now_s - ticket.at_s, 1e-6)
        self.latency_s += 0.1 * (took_s - self.latency_s)
        self._refusals.answered(now_s, ticket, self.latency_s)
        mean_in_flight = (self._area - ticket.area) / took_s
        if mean_in_flight < SATURATED * int(self._target):
            self._goodput.look_anew(now_s)  # it is the work that lacks
        elif self._asks_goodput and self._full_at_s is not None:
            self._goodput.look(now_s, tokens)
            if ticket.at_s >= self._full_at_s:
                self._goodput.answered(now_s, tokens, took_s / max(mean_in_flight, 1.0))
        self._decide(now_s)

    def refuse(self, ticket: Ticket, now_s: float, retry_after_s: float | None) -> None:
        self.fail(now_s)
        self._refusals.refused(
            now_s, ticket, retry_after_s,
            in_flight=self.in_flight, sent=self._sent, latency_s=self.latency_s,
        )  # fmt: skip
        self._decide(now_s)

    def observe(self, now_s: float, running: float, waiting: float, preemptions: float) -> None:
        if self.in_flight > self._target * 1.02 or now_s < self._climb_at_s + self._climb_s:
            return  # on the way to another level
        self._gauges.read(
            now_s, running, waiting, preemptions,
            in_flight=self.in_flight, level=self._target, full=self._is_full,
            ripe=now_s >= self._climb_at_s + self.latency_s,
        )  # fmt: skip
        self._decide(now_s)

    # The least of what the witnesses say

    def _decide(self, now_s: float) -> None:
        bounds = {
            Witness.REFUSALS: self._refusals.bound,
            Witness.GAUGES: self._gauges.bound(now_s),
        }
        who, bound = min(bounds.items(), key=lambda item: item[1].most)
        if bound.most == math.inf:
            if not self._asks_goodput:  # the witness that held the limit has let it go
                self._goodput.start(self._target, bounds[self.history.who].why)
            who, bound = Witness.GOODPUT, self._goodput.bound
        target, before = min(bound.most, self.ceiling), self._target
        self.history.note(before, target, who, bound.why)
        if target != before:
            level, self._target = self.limit(now_s), target
            self._climb(now_s, level)
            self._full_at_s = now_s if self.in_flight >= int(target) else None

    def _climb(self, now_s: float, level: float) -> None:
        """From ``level`` up to the target within half a latency; down at once."""
        self._from, self._climb_at_s = min(level, self._target), now_s
        self._climb_s = min(self.latency_s / 2, CLIMB_S) if self._target > self._from else 0.0

    @property
    def _asks_goodput(self) -> bool:
        return self.history.who in (Witness.START, Witness.GOODPUT)

    @property
    def _is_full(self) -> bool:
        return self.in_flight >= SATURATED * int(self._target)

    def _count_area(self, now_s: float) -> None:
        self._area += self.in_flight * (now_s - self._area_at_s)
        self._area_at_s = now_s
