"""A pace in requests a second, learnt from the refusals of a server that counts by the clock.

Between two refusals such a server took what it takes in that time, no less: that is the pace. The
first is what was taken since the start, mostly too much; a second of silence and what is taken from
then until the next refusal correct it, at the price of one or two refusals. It rises a little while
nothing is refused, and falls back when something is.
"""

from __future__ import annotations

__all__ = ["Pace"]

CALM_LATENCIES, CALM_S = 5.0, 10.0
"""How long a pace that is known well is kept after a refusal."""
ANSWERS, SILENCE_S, MAX_SILENCE_S = 10, 1.0, 5.0
"""How much must be accepted between two refusals to measure, and the silence before that."""
KEPT = 0.99
"""Share of what was measured that is sent."""
RISE, RISE_S = 0.1, 3.0
"""The first rise, and the least time between two: what the server has saved up meanwhile is used by
then, so that the first is refused where it is too much."""
BURST_S = 0.1
"""How far a pace may be made up for after a lull. As long is waited after a refusal, so that the
server has saved up that much."""


class Pace:
    """The pace of one server. All times are seconds of one monotonic clock.

    Attributes:
        per_s: requests a second; None: refusals do not follow the clock, as far as is known.
        sure: whether it was refused when it was little higher.
        vain: refusals in a row though it had not risen since the one before.
        vain_ends: what ended meanwhile.
        next_s: when the next may go out.
        rise_s: when it may rise.
    """

    def __init__(self) -> None:
        self.per_s: float | None = None
        self.sure = False
        self.vain = self.vain_ends = 0
        self.next_s = self.rise_s = 0.0
        self._before_per_s = 0.0  # before it rose
        self._rises = 0  # since the latest refusal
        self._accepted = 0  # when it had risen last
        # the start or a refusal, and what was accepted until then
        self._mark: tuple[float, int] | None = None

    def sent(self, now_s: float) -> None:
        self._mark = self._mark or (now_s, 0)
        if self.per_s is not None:
            self.next_s = max(self.next_s, now_s - BURST_S) + 1 / self.per_s

    def refused(self, sent_at_s: float) -> None:
        """A request that went out at ``sent_at_s``: if it was under way at the mark, it had been
        taken for accepted.
        """
        if self._mark is not None and sent_at_s <= self._mark[0]:
            self._mark = self._mark[0], self._mark[1] - 1

    def learn(self, now_s: float, accepted: int, latency_s: float) -> None:
        """At the first refusal of an episode by the clock, with all that was accepted so far."""
        assert self._mark is not None
        since_s, before = self._mark
        seconds, taken = max(now_s - since_s, 1e-3), accepted - before
        mean_per_s = KEPT * max(taken, 1) / seconds
        if self.per_s is None:
            # Often too much, as the server had saved up. What it saves in a silence and takes until
            # it refuses again makes a better measure.
            self.per_s, self._mark = mean_per_s, (now_s, accepted)
            self.next_s = now_s + min(max(SILENCE_S, ANSWERS / mean_per_s), MAX_SILENCE_S)
            self._accepted = accepted
        else:
            self.sure |= self._rises <= 1
            self.vain += 1
            silence_s = SILENCE_S  # too short a time to measure: make it longer
            if self._rises:
                self.per_s, silence_s = self._before_per_s, BURST_S
                self.vain, self._accepted = 0, accepted
            self.vain_ends = accepted - self._accepted + self.vain
            if taken >= ANSWERS and seconds >= SILENCE_S:
                # Where it had risen, the server may have been asked for less than it takes.
                self.per_s = max(mean_per_s, self.per_s) if self._rises else mean_per_s
                self._mark, silence_s = (now_s, accepted), BURST_S
            self.next_s = max(self.next_s, now_s + silence_s)
        calm_s = max(CALM_LATENCIES * latency_s, CALM_S) if self.sure else RISE_S
        self.rise_s = self.next_s + calm_s
        self._rises = 0

    def rise(self, now_s: float) -> None:
        """Nothing was refused for long: a tenth more, then a fifth, up to twice as much."""
        assert self.per_s is not None
        self._before_per_s = self.per_s
        self.per_s *= 1 + min(RISE * 2.0**self._rises, 1.0)
        self._rises = min(self._rises + 1, 8)
        self.rise_s = now_s + RISE_S

    def forget(self, now_s: float, accepted: int) -> None:
        self.per_s, self.sure, self._rises, self.vain = None, False, 0, 0
        self._mark = now_s, accepted
