"""The witness of goodput: a server that queues shows its knee in tokens a second.

By Little's law every answer is a sample: with n in flight on average during its life, an answer of
T tokens after L seconds means n·T/L tokens a second. So two levels are compared within about one
latency. It doubles while that pays, then tries a little more, but no more than halfway to what did
worse within the last minute, and a little less.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import NamedTuple

from engine.limits.finder.bound import Bound

__all__ = ["REMEMBER_S", "Goodput", "Phase"]

WORTH = 0.03
"""Gain in tokens a second that is worth a larger limit; of a small step, three tenths of it."""
SAMPLES = (8, 192)
"""The fewest and the most answers that make a measure; half as many as are in flight otherwise."""
REMEMBER_S = 60.0
"""How long what led nowhere is not tried again."""
FALLEN = (80, 0.6, 0.45)
"""A fall that cuts at once: less than this share of the usual tokens, in the time that so many
answers usually take; and the least share of the limit that is kept."""
TRYING = "trying whether this gives more tokens a second"


class Phase(Enum):
    """What is done with the limit; the value is the level, relative to the one to beat."""

    DOUBLING = 2.0
    HOLDING = 1.0
    UP = 1.25
    DOWN = 0.9


class Level(NamedTuple):
    most: float
    rate: float
    """Tokens a second."""


class Goodput:
    """``bound`` is the level that is measured now."""

    def __init__(self, start: float) -> None:
        self._count, self._tokens, self._work_s = 0, 0, 0.0  # answers at this level
        self._since_s, self._seen, self._made = 0.0, 0, 0  # answers at any
        self.start(start, "every run starts so")

    def start(self, level: float, why: str) -> None:
        """Double from ``level``."""
        self._base: Level | None = None  # the level to beat
        self._crowded = (math.inf, 0.0)  # a level above that did worse, and until when that counts
        self._fewer_s = 0.0  # when to try fewer again
        self._go(Phase.DOUBLING, level, why)

    def look_anew(self, now_s: float) -> None:
        """What was made of late says nothing, as the work did not fill the limit."""
        self._since_s, self._seen, self._made = now_s, 0, 0

    def look(self, now_s: float, tokens: int) -> None:
        """Any answer. Goodput that has fallen far is seen before what is sent now comes back: the
        server has lost room, and what is too much slows down all.
        """
        if self.phase is not Phase.HOLDING or self._base is None:
            self.look_anew(now_s)
            return
        self._seen, self._made = self._seen + 1, self._made + tokens
        usual = self._base.rate * (now_s - self._since_s)
        if usual * self._seen < FALLEN[0] * self._made:
            return
        share = self._made / usual
        self.look_anew(now_s)
        if share < FALLEN[1]:
            level = max(self.bound.most * max(share, FALLEN[2]), 1.0)
            self._base, self._crowded = None, (1.25 * level, now_s + REMEMBER_S)
            self._go(Phase.HOLDING, level, f"tokens a second fell to {share:.0%} of before")

    def answered(self, now_s: float, tokens: int, work_s: float) -> None:
        """An answer of a request that was sent at the present level; ``work_s`` is how long it took
        divided by how many were in flight.
        """
        self._count, self._tokens = self._count + 1, self._tokens + max(tokens, 1)
        self._work_s += work_s
        # As many as make a measure: answers of one wave come together and say one thing.
        if self._count < min(max(self.bound.most / 2, SAMPLES[0]), SAMPLES[1]):
            return
        here, base = Level(self.bound.most, self._tokens / self._work_s), self._base
        if base is None:
            self._base = here
            self._go(self.phase, here.most * self.phase.value)
        elif self.phase is Phase.HOLDING:
            # The same level again: the measure to beat follows slowly, so that chance evens out.
            self._base = base._replace(rate=base.rate + 0.3 * (here.rate - base.rate))
            self._try(now_s, base.most)
        else:
            self._judge(now_s, here, base)

    def _judge(self, now_s: float, here: Level, base: Level) -> None:
        """A measure at another level is here: keep that level, or go back."""
        gain, phase = here.rate / base.rate - 1, self.phase
        if phase is Phase.DOWN:
            # Fewer in flight that make nearly as much are better: each answer comes sooner.
            keep = gain >= -WORTH / 3
            self._fewer_s = now_s + (0.0 if keep else REMEMBER_S)
        elif not (keep := gain >= min(WORTH, 0.3 * (here.most / base.most - 1))):
            self._crowded = here.most, now_s + REMEMBER_S
        if not keep:
            why = f"{here.most:.0f} in flight gave no more tokens a second"
            self._go(Phase.HOLDING, base.most, why)
            return
        self._base = here
        if phase is Phase.DOUBLING:
            self._go(phase, here.most * phase.value)
        else:
            self._try(now_s, here.most)

    def _try(self, now_s: float, base: float) -> None:
        """A little more, but no more than halfway to what did worse; or fewer; or the same."""
        crowded, until_s = self._crowded
        more = math.ceil(base * Phase.UP.value)
        if now_s < until_s:
            more = min(more, math.floor(math.sqrt(base * crowded)))
        if more >= 1.04 * base:
            self._go(Phase.UP, more)
        elif now_s >= self._fewer_s:
            self._go(Phase.DOWN, max(math.floor(base * Phase.DOWN.value), 1))
        else:
            self._go(Phase.HOLDING, base, self.bound.why)

    def _go(self, phase: Phase, level: float, why: str = TRYING) -> None:
        self.phase, self.bound = phase, Bound(level, why)
        self._count, self._tokens, self._work_s = 0, 0, 0.0
