"""A pace in requests a second, learnt from the refusals of a server that counts by the clock.

When such a server refuses, it has nothing left. So between two refusals it took all that it takes
in that time, but for one request: with N accepted in T seconds it takes less than (N + 1) / T. The
pace is the least of these bounds, so it is always a little too high where little is known, and each
refusal comes after about as many accepted requests as all before it together: few are needed. After
as many as are known of, the pace is tried a little higher; the server may take more by now.
"""

from __future__ import annotations

from collections import deque

__all__ = ["Pace"]

KNOWN_WELL = 200
"""Requests accepted between two refusals that make a pace as sure as it gets. Refused at each trial
of a higher one, a server refuses under one per cent."""
CALM_LATENCIES, CALM_S = 5.0, 10.0
"""How long a pace that is known so well is kept after a refusal at least."""
ANSWERS, SILENCE_S, MAX_SILENCE_S = 10, 1.0, 5.0
"""The silence after the first refusal: until the server takes so many, but not less than a second,
the shortest time that is measured, nor too long."""
KEPT = 0.99
"""Share of the bound that is sent."""
LEAST_DOUBT, RISE_S = 0.05, 3.0
"""The first rise where the pace is known well, and the least time between two."""
SAVED = 5.0
"""What the server may have saved up: after a rise so much more than before is sent until the next,
so that the first is refused where it is too much."""
BURST_S = 0.1
"""How far a pace may be made up for after a lull. As long is waited after a refusal, so that the
server has saved up that much."""
TAKEN, ENOUGH = 2.3, 50
"""What is measured since a later refusal than the first, for the server may take less than before:
fewer accepted to each refusal, as chance does not refuse so many; or so many in all."""
SLOWEST_PER_S = 1 / 30
REMEMBERED = 16
"""Refusals."""


class Pace:
    """The pace of one server. All times are seconds of one monotonic clock.

    Attributes:
        per_s: requests a second; None: refusals do not follow the clock, as far as is known.
        known: how many accepted requests it was measured with.
        vain: refusals that were not the next after another, since it was last kept for long.
        vain_ends: what ended meanwhile.
        next_s: when the next may go out.
        rise_s: when it may rise.
    """

    def __init__(self) -> None:
        self.per_s: float | None = None
        self.known = 0
        self.vain = self.vain_ends = 0
        self.next_s = self.rise_s = 0.0
        self._before_per_s = self._first_per_s = 0.0  # before it rose last, and first
        self._doubt = 1.0  # by what share it may be too low
        self._rises = 0  # since the latest refusal
        self._saved = SAVED
        self._rise_at = 0  # what must have been accepted
        self._since: tuple[float, int] | None = None  # the start
        # refusals that the pace is measured between, and what was accepted until each
        self._refusals: deque[tuple[float, int]] = deque(maxlen=REMEMBERED)

    def sent(self, now_s: float) -> None:
        self._since = self._since or (now_s, 0)
        if self.per_s is not None:
            self.next_s = max(self.next_s, now_s - BURST_S) + 1 / self.per_s

    def refused(self, sent_at_s: float) -> None:
        """A request that went out at ``sent_at_s``: if it was under way at a refusal, it had been
        taken for accepted.
        """
        for i in range(len(self._refusals) - 1, -1, -1):
            at_s, accepted = self._refusals[i]
            if sent_at_s > at_s:
                break
            self._refusals[i] = at_s, accepted - 1

    def learn(
        self, now_s: float, accepted: int, latency_s: float, wait_s: float | None = None
    ) -> None:
        """At the first refusal of an episode by the clock, with all that was accepted so far.
        ``wait_s``: what the server asks for; if that is long, it knows best.
        """
        silence_s = BURST_S
        if self.per_s is None:
            # Too much, as the server had saved up.
            assert self._since is not None
            since_s, before = self._since
            taken = max(accepted - before, 1)
            self.per_s, self._doubt = taken / max(now_s - since_s, 1e-3), 1.0
            silence_s = wait_s or 0.0
            if silence_s < SILENCE_S:
                silence_s = min(max(SILENCE_S, ANSWERS / self.per_s), MAX_SILENCE_S)
        elif self._rises:
            self._doubt = max((self.per_s / self._before_per_s - 1) / 2, LEAST_DOUBT)
            self.per_s = self._before_per_s
            if self._rises > 1:  # it takes more than before
                self._refusals.clear()
        else:
            self._count(accepted - self._refusals[-1][1])
            bounds = [
                ((count + 1) / (now_s - at_s), count)
                for i, (at_s, before) in enumerate(self._refusals)
                if now_s - at_s >= SILENCE_S
                and (
                    (count := accepted - before) >= ENOUGH
                    or i == 0
                    or count < TAKEN * (len(self._refusals) - i)
                )
            ]
            if bounds:
                most, count = min(bounds)
                if KEPT * most < self.per_s:
                    self.per_s = max(KEPT * most, SLOWEST_PER_S)
                    self._doubt = max(1 / (max(count, 0) + 1), LEAST_DOUBT)
            else:
                silence_s = SILENCE_S  # too short a time to measure: make it longer
        self._refusals.append((now_s, accepted))
        self.known = accepted - self._refusals[0][1]
        self._rises, self._first_per_s = 0, self.per_s
        self._rise_at = accepted + min(4 * (self.known + 1), KNOWN_WELL)
        self.next_s = max(self.next_s, now_s + max(silence_s, 1 / self.per_s, wait_s or 0.0))
        self._saved = SAVED + (self.next_s - now_s) * self.per_s
        calm_s = max(CALM_LATENCIES * latency_s, CALM_S) if self.known >= KNOWN_WELL else RISE_S
        self.rise_s = self.next_s + calm_s

    def _count(self, gap: int) -> None:
        if gap >= KNOWN_WELL:
            self.vain = self.vain_ends = 0
        else:
            self.vain += gap > 0
            self.vain_ends += gap + 1

    def maybe_rise(self, now_s: float, accepted: int) -> bool:
        """Nothing was refused for long: more by as much as it may be wrong, then twice the share,
        up to twice as much.
        """
        if self.per_s is None or now_s < self.rise_s or accepted < self._rise_at:
            return False
        self._before_per_s = self.per_s
        self.per_s *= 1 + min(self._doubt * 2.0**self._rises, 1.0)
        self._rises = min(self._rises + 1, 8)
        beyond = self.per_s / self._first_per_s - 1
        self._rise_at = accepted + int(min(self.known, self._saved * (1 + beyond) / beyond)) + 1
        self.rise_s = now_s + RISE_S
        return True

    def forget(self, now_s: float, accepted: int) -> None:
        self.per_s, self.known, self._rises, self.vain, self.vain_ends = None, 0, 0, 0, 0
        self._refusals.clear()
        self._since = now_s, accepted
