"""How many requests one endpoint should have in flight, found from what it does.

Three signals, one limit:

* **Refusals** (429): a hosted API's way. The limit falls a little at the first of an episode and
  hard when cutting once was not enough; requests admitted before a cut cannot cut again. The limit
  climbs back to just under where it was refused, and beyond only as often as a small share of
  refusals allows.
* **Goodput**: a server that queues instead of refusing shows its knee in tokens per second. By
  Little's law every answer is a sample: with n in flight on average during its life, an answer of
  T tokens after L seconds means n·T/L tokens a second. So two levels are compared within about one
  latency, without counting answers per window.
* **Queue and preemptions**, where the server publishes them (vLLM's ``/metrics``): a queue that
  stays empty invites growth at once, one that grows is cut off at its length.

It starts by doubling, and never grows while the work at hand does not fill the present limit.
The price is some ten numbers, at the top, that simulation chose (``benchmarks/bench_limits.py``).

Ideas from: TCP's slow start and CUBIC's plateau; Inspect AI's saturation gate and DataDesigner's
damping of bursts; Netflix's and Envoy's gradient limiters.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Adaptive", "Ticket"]

START = 8.0
SATURATED = 0.8
"""Share of the limit that must be in flight before its measure counts."""
WORTH = 0.02
"""Gain in goodput that is worth a larger limit."""
CHANGED = 0.12
"""Change in goodput at the same limit that means another server."""
PROBE_UP, PROBE_DOWN = 1.25, 0.8
MAX_PATIENCE = 8
"""Rounds between two probes that led nowhere; starts at 1 and doubles."""
CUT_FIRST, CUT_AGAIN = 0.95, 0.7
PAUSE_S, MAX_PAUSE_S = 0.25, 30.0
"""Without Retry-After: the silence after a refusal, doubled by each episode in a row."""
SUCCESSES_PER_REFUSAL = 120
"""What must have gone well before a refusal is risked again: under one per cent are refused."""
MAX_SAMPLES = 48
MAX_RAMP_S = 1.0
"""A larger limit is reached within this time, so that a refusal on the way stops the climb."""


@dataclass(slots=True)
class Ticket:
    """What an admitted request carries until its end."""

    at_s: float
    area: float


class Adaptive:
    """The limit of one endpoint. All times are seconds of one monotonic clock.

    Call ``admit`` when a request goes out and exactly one of ``complete``, ``refuse`` and ``fail``
    when it ends.
    """

    def __init__(self, *, start: float = START, ceiling: float = 4096) -> None:
        self.ceiling = ceiling
        self.in_flight = 0
        self.paused_until_s = 0.0
        self.latency_s = 1.0
        self._target = min(start, ceiling)
        self._from = self._target  # the limit climbs from here to the target
        self._climb_s = 0.0
        self._climb_at_s = 0.0
        self._area = 0.0  # integral of in_flight over time
        self._area_at_s = 0.0
        # rounds: one measure of goodput at one limit
        self._phase = "start"  # start: doubling; hold; up, down: trying another limit
        self._base: tuple[float, float] | None = (
            None  # the limit to beat, and its tokens per second
        )
        self._patience = 1
        self._rounds = 0
        self._down_next = False
        self._odd = 0
        self._full_at_s: float | None = None
        self._count = 0
        self._tokens = 0.0
        self._work = 0.0
        # refusals
        self._refused_at: float | None = None  # in flight when the server last said no
        self._episode_s = float("-inf")
        self._streak = 0
        self._refusals = 0
        self._successes = 0
        self._last_release_s = 0.0
        # metrics
        self._watched_until_s = 0.0
        self._idle_polls = 0
        self._preemptions: float | None = None

    # What the pool asks

    def limit(self, now_s: float) -> float:
        """May be below 1: then one request at a time, with pauses between."""
        if now_s >= self._climb_at_s + self._climb_s:
            return self._target
        share = (now_s - self._climb_at_s) / self._climb_s
        return self._from + (self._target - self._from) * share

    def next_change_s(self, now_s: float) -> float | None:
        """When to look again for room, besides at each end of a request; None: not by time."""
        if now_s < self.paused_until_s:
            return self.paused_until_s
        if self._target < 1 and self.in_flight == 0:
            return self._last_release_s + self.latency_s * (1 / self._target - 1)
        if now_s < self._climb_at_s + self._climb_s:
            step_s = self._climb_s / max(self._target - self._from, 1.0)
            return now_s + max(step_s, 0.01)
        return None

    def has_room(self, now_s: float) -> bool:
        if now_s < self.paused_until_s:
            return False
        if self._target < 1:
            pause_s = self.latency_s * (1 / self._target - 1)
            return self.in_flight == 0 and now_s >= self._last_release_s + pause_s
        return self.in_flight + 1 <= self.limit(now_s)

    # What the pool tells

    def admit(self, now_s: float) -> Ticket:
        self._count_area(now_s)
        self.in_flight += 1
        if self._full_at_s is None and self.in_flight >= SATURATED * self._target:
            self._full_at_s = now_s
        return Ticket(now_s, self._area)

    def fail(self, now_s: float) -> None:
        """Ended by a fault: says nothing about the limit."""
        self._count_area(now_s)
        self.in_flight -= 1
        self._last_release_s = now_s

    def complete(self, ticket: Ticket, now_s: float, tokens: int) -> None:
        """Ended with an answer of ``tokens``."""
        self.fail(now_s)
        took_s = max(now_s - ticket.at_s, 1e-6)
        self.latency_s += 0.1 * (took_s - self.latency_s) if self._successes else took_s - 1.0
        self._successes += 1
        if ticket.at_s > self._episode_s and self._successes > max(10.0, self._target):
            self._streak = 0
        if self._full_at_s is None or ticket.at_s < self._full_at_s:
            return
        mean_in_flight = (self._area - ticket.area) / took_s
        self._count += 1
        self._tokens += max(tokens, 1)
        self._work += took_s / max(mean_in_flight, 1.0)
        if self._count >= min(max(self._target / 2, 3.0), MAX_SAMPLES):
            self._round_ended(now_s, self._tokens / self._work)

    def refuse(self, ticket: Ticket, now_s: float, retry_after_s: float | None) -> None:
        """Ended with 429 or the like. One cut an episode, however many are refused in it."""
        self.fail(now_s)
        self._refusals += 1
        if retry_after_s is not None:
            self.paused_until_s = max(self.paused_until_s, now_s + retry_after_s)
        if ticket.at_s <= self._episode_s:
            return
        if self._streak == 0:
            self._refusals = 1
        self._episode_s = now_s
        self._successes = 0
        factor = CUT_FIRST if self._streak == 0 else CUT_AGAIN
        self._refused_at = float(max(self.in_flight, 1))
        if retry_after_s is None:
            pause_s = min(PAUSE_S * 2.0**self._streak, MAX_PAUSE_S) if self._streak else 0.0
            self.paused_until_s = max(self.paused_until_s, now_s + pause_s)
        self._streak = min(self._streak + 1, 16)
        room = min(self.limit(now_s), self._refused_at)
        self._set(now_s, max(room * factor, 1 / 64) if room > 1 else max(room * 0.5, 1 / 64))
        self._phase, self._base = "hold", None

    def observe(self, now_s: float, running: float, waiting: float, preemptions: float) -> None:
        """The server's own gauges, about once a second."""
        self._watched_until_s = now_s + 5.0
        thrown_out = preemptions - (
            self._preemptions if self._preemptions is not None else preemptions
        )
        self._preemptions = preemptions
        full = self.in_flight >= SATURATED * self._target
        if thrown_out > 0 and full:
            self._idle_polls = -10
            self._settle(now_s, 0.85 * min(self._target, float(self.in_flight)))
        elif waiting > max(2.0, 0.1 * running):
            self._idle_polls = -5
            kept = max(self.in_flight - waiting + 0.05 * running, running, 1.0)
            self._settle(now_s, min(self._target, kept))
        elif waiting == 0 and full and now_s >= self._climb_at_s + self._climb_s:
            self._idle_polls += 1
            if self._phase == "start":
                self._set(now_s, self._target * 2)
            elif self._idle_polls >= 3:
                self._idle_polls = 0
                self._set(now_s, self._target * 1.1 + 1)

    # Rounds

    def _round_ended(self, now_s: float, rate: float) -> None:
        """``rate``: tokens per second at the present limit, measured over its own requests."""
        self._count, self._tokens, self._work = 0, 0.0, 0.0
        self._rounds += 1
        if now_s < self._watched_until_s:  # the gauges know better
            return
        if self._refused_at is not None:
            self._climb_back(now_s)
            return
        if self._base is None:
            self._base = (self._target, rate)
            if self._phase == "start":
                self._set(now_s, self._target * 2)
            return
        level, best = self._base
        gain = rate / best - 1
        if self._phase == "start":
            if gain >= WORTH and self._target > level:
                self._base = (self._target, rate)
                self._set(now_s, self._target * 2)
            elif self._target > level:
                self._patience = 1
                self._settle(now_s, level if gain < 0 else self._target)
                self._base = (level, best) if gain < 0 else (self._target, rate)
            else:
                self._settle(now_s, self._target)
        elif self._phase == "hold":
            self._hold(now_s, level, best, rate)
        elif self._phase == "up":
            self._judge(now_s, rate, accepted=gain >= WORTH)
        else:
            self._judge(now_s, rate, accepted=gain >= -WORTH / 2)

    def _hold(self, now_s: float, level: float, best: float, rate: float) -> None:
        self._odd = self._odd + 1 if abs(rate / best - 1) > CHANGED else 0
        if self._odd >= 2:
            self._odd, self._patience = 0, 1
            self._phase, self._base = "start", (self._target, rate)
            self._set(now_s, self._target * 2)
            return
        if self._odd == 0:
            self._base = (level, best + 0.3 * (rate - best))
        if self._rounds >= self._patience:
            self._phase = "down" if self._down_next else "up"
            self._down_next = not self._down_next
            self._set(
                now_s, max(self._target * (PROBE_UP if self._phase == "up" else PROBE_DOWN), 1.0)
            )

    def _judge(self, now_s: float, rate: float, *, accepted: bool) -> None:
        """A probe is over: keep its limit, or go back."""
        assert self._base is not None
        level, best = self._base
        went_up = self._phase == "up"
        self._rounds = 0
        if not accepted:
            self._patience = min(self._patience * 2, MAX_PATIENCE)
            self._phase = "hold"
            self._set(now_s, level)
            return
        self._patience = 1
        self._base = (self._target, rate)
        self._down_next = not went_up
        if went_up and rate / best - 1 > 0.1:
            self._phase = "start"
            self._set(now_s, self._target * 2)
        else:
            self._phase = "hold"

    def _climb_back(self, now_s: float) -> None:
        """After refusals: up to just under where they began, later a step beyond."""
        assert self._refused_at is not None
        known = self._refused_at * 0.98
        if self._streak:
            return
        if self._target < known:
            self._set(now_s, min(self._target * 1.05 + 0.25, known))
        elif self._successes >= SUCCESSES_PER_REFUSAL * self._refusals:
            if self._target > self._refused_at:  # the step beyond went well: the server has grown
                self._refused_at = None
                self._phase, self._base = "start", None
                self._set(now_s, self._target * 2)
            else:
                self._set(now_s, max(self._refused_at * 1.02, self._refused_at + 1))
                self._successes -= int(self._target)

    def _settle(self, now_s: float, target: float) -> None:
        self._phase, self._rounds = "hold", 0
        if target != self._target:
            self._set(now_s, target)

    def _set(self, now_s: float, target: float) -> None:
        """Up by a short climb, down at once; measuring begins anew."""
        target = min(target, self.ceiling)
        self._from = min(self.limit(now_s), target)
        self._climb_at_s = now_s
        self._climb_s = min(MAX_RAMP_S, self.latency_s / 2) if target > self._from else 0.0
        self._target = target
        self._full_at_s = now_s if self.in_flight >= target else None
        self._count, self._tokens, self._work = 0, 0.0, 0.0

    def _count_area(self, now_s: float) -> None:
        self._area += self.in_flight * (now_s - self._area_at_s)
        self._area_at_s = now_s
