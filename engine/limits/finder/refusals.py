"""The witness of refusals (429): the number at which a server refused, and when to try beyond it.

A refusal that chance does not explain cuts the limit to a little less than what the server held
then; while more are refused, it is cut hard. After some answers the number is held, and a step
beyond it is risked, at first soon, then only as often as a small share of refusals allows. One that
goes well lifts the bound.

A server that counts by the minute (``rate``) refuses whatever is in flight. So it refuses again
below a number that it held a moment ago, though it took some since. A number that has fallen does
that once; the second time in a row, neither chance nor a number explains it.
"""

from __future__ import annotations

import math
from enum import Enum, auto

from engine.limits.controller import MAX_PAUSE_S, PAUSE_S, Ticket, concerns_all
from engine.limits.finder.bound import NONE, Bound
from engine.limits.finder.chance import Chance
from engine.limits.finder.rate import PER_REFUSAL, Rate

__all__ = ["Refusals"]

CUTS = (0.95, 0.7)
"""What is kept of what the server held at the first cut, and at the next while it still refuses. A
step beyond is as large as the first."""
CALM = 10
"""Answers that end an episode of refusals; and those beyond a number that prove it outdated, for a
server has a slot free before its answer is here, so that a few may be taken by chance."""
STRAY = 1 / 40
"""Refusals come back a little out of order: so few taken, for what the server held, are none."""
PAUSES_APART = 28.0
"""Nothing is sent in a pause that a refusal asks for: a step is risked again only after so many
times its length, so that pauses cost no more than 3.5 % of the time."""


class Phase(Enum):
    FREE = auto()
    """Nothing is known against any number."""
    CUT = auto()
    """It refused a moment ago."""
    HELD = auto()
    """At the number that it held."""
    STEP = auto()
    """Trying a little more."""
    PACED = auto()
    """Refusals follow the clock."""


class Refusals:
    """``bound`` is the number that the server held when it refused. Requests are numbered as they
    are sent, and refusals come back in about that order and long before answers: so each tells what
    became of all that were sent before it.
    """

    def __init__(self) -> None:
        self.bound = NONE
        self.paused_until_s = 0.0
        self.resuming = False
        """After the pause the limit is climbed to, so that the first refusal stops the rest."""
        self.rate = Rate()
        self._chance = Chance()
        self._phase = Phase.FREE
        self._all = 0  # refusals since the start
        self._at = 0.0  # what the server held when it refused
        self._known = 0  # requests sent when that was known: they are of the same wave
        self._answers = 0  # in this phase
        self._price = 0  # refusals that the latest step cost
        self._patient_until_s = 0.0
        self._streak = 0  # cuts in a row with next to nothing taken in between
        self._contrary = 0  # refusals in a row that no number explains

    def sent(self, now_s: float, ticket: Ticket) -> None:
        ticket.refused = self._all
        self.rate.sent(now_s)

    def answered(self, now_s: float, ticket: Ticket, latency_s: float) -> None:
        step = self._phase is Phase.STEP
        if ticket.number <= self._known or (step and ticket.in_flight <= self._at):
            return
        self._answers += 1
        if self._phase is Phase.PACED and self.rate.rise(now_s, ticket.number - self._all):
            self.bound = self.rate.bound(latency_s)
        elif self._phase is Phase.CUT and self._answers >= CALM:
            self._go(Phase.HELD, self._at)
        elif self._phase is Phase.HELD and now_s >= self._patient_until_s:
            if self._answers >= PER_REFUSAL * self._price:
                most = max(self._at / CUTS[0], self._at + 1)
                self._go(Phase.STEP, most, f"trying a little more; {self._why}")
        elif step and self._answers >= CALM:
            self._go(Phase.FREE, math.inf, f"no longer {self._why}")

    def refused(
        self, now_s: float, ticket: Ticket, wait_s: float | None, *,
        in_flight: int, sent: int, latency_s: float,
    ) -> None:  # fmt: skip
        """``in_flight`` are left, of ``sent`` since the start; ``wait_s``: Retry-After."""
        # Before it, and at that time: what was refused since it was sent was neither.
        taken = ticket.number - 1 - self._all
        held = ticket.in_flight - 1 - (self._all - ticket.refused)
        self._all += 1
        if ticket.number <= self._known:
            self._price += self._phase is Phase.HELD
            return
        beyond = self._phase is Phase.STEP and ticket.in_flight > self._at
        paced = self._phase is Phase.PACED
        proof = paced or self._chance.refused(ticket.number, expected=beyond)
        if not proof:
            if concerns_all(in_flight, wait_s):
                self._pause(now_s, PAUSE_S if wait_s is None else wait_s)
            return
        self._known, self._price = sent, 0
        if wait_s is not None:
            self._pause(now_s, wait_s)
        since = self.rate.since(taken)
        self._streak = 0 if since > STRAY * held else self._streak + 1
        if since >= PER_REFUSAL:
            self._contrary = 0
        elif not self._streak and held < CUTS[0] * self._at:
            self._contrary += 1
        if beyond:
            self._price, self._patient_until_s = proof, now_s + PAUSES_APART * (wait_s or 0.0)
            self._at = min(self._at, held)
            self._go(Phase.HELD, self._at)
        elif paced or self._contrary > 1:
            self._pace(now_s, taken, wait_s, latency_s)
        else:
            self._cut(now_s, taken, wait_s, held)

    def _cut(self, now_s: float, taken: int, wait_s: float | None, held: int) -> None:
        if self._streak and wait_s is None:
            self._pause(now_s, min(PAUSE_S * 2.0 ** min(self._streak, 16), MAX_PAUSE_S))
        self.rate.mark(now_s, taken)
        self._at = max(held, 1)
        self._go(Phase.CUT, math.ceil(CUTS[self._phase is Phase.CUT] * self._at))

    def _pace(self, now_s: float, taken: int, wait_s: float | None, latency_s: float) -> None:
        if self.rate.learn(now_s, taken, wait_s):
            self._go(Phase.PACED, *self.rate.bound(latency_s))
        else:
            self._chance.learn(self.rate.refusals, self.rate.between)
            self._go(Phase.FREE, math.inf, "refusals come by chance, whatever is sent")

    def _pause(self, now_s: float, wait_s: float) -> None:
        self.paused_until_s = max(self.paused_until_s, now_s + wait_s)
        self.resuming = True

    def _go(self, phase: Phase, most: float, why: str = "") -> None:
        self._phase, self._answers, self.bound = phase, 0, Bound(most, why or self._why)

    @property
    def _why(self) -> str:
        return f"refused with {self._at:.0f} in flight"
