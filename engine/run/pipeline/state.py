"""What the parts of a pipeline share, and what follows from it: how many answers are called for,
and whether anything is left to wait for. Arithmetic, without any waiting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from engine.records import EVERY
from engine.run.changed import Changed
from engine.run.plan import Plan
from engine.run.progress import Pace, Progress

__all__ = ["RunState"]


@dataclass(slots=True, kw_only=True, eq=False)
class RunState:
    """How far one run is. Whoever changes it sets ``changed``."""

    plan: Plan
    progress: Progress
    pace: Pace
    changed: Changed = field(default_factory=Changed)
    in_flight: int = 0
    """Calls, from their slot to the commit of their answers."""
    committing: int = 0
    """Batches of decisions that wait for their commit."""

    def needed(self) -> int:
        """How many answers the yield so far calls for, counted from the first undecided request and
        not from what was sent.
        """
        progress, pace = self.progress, self.pace
        missing = progress.target - progress.accepted
        needed = math.ceil(missing / progress.records_per_answer)
        if not progress.accepted:
            # A setting that spoils every answer looks like a yield of next to nothing, which calls
            # for all that there is: until something is accepted, no more than twice what was seen.
            first = math.ceil(missing / progress.most_records)
            needed = min(needed, max(first, 2 * progress.decided_answers))
        if missing > 0:
            # The first decisions say how many are needed; a server should be busy before them. On
            # a machine of one's own a small batch takes as long as a large one, so it stays so.
            known = progress.decided_answers if pace.paid else 0
            needed = max(needed, pace.at_least - known)
        return needed

    @property
    def is_reached(self) -> bool:
        """The target is; a stage that feeds another only hears what that one wants for now."""
        return not self.pace.feeds and self.progress.accepted >= self.progress.target

    @property
    def is_quiet(self) -> bool:
        """There is nothing to wait for but batches: no call, and no decision."""
        return not self.in_flight and not self.committing and not self.plan.to_decide

    @property
    def is_exhausted(self) -> bool:
        """Nothing is under way and nothing more may be sent."""
        plan, cap = self.plan, self.pace.max_requests
        grows = plan.grows and (cap is None or plan.next_number < cap)
        if self.in_flight or grows or not plan.is_decided:
            return False
        # What is wanted of a stage that feeds another may grow: all that is possible must be done.
        needed = EVERY if self.pace.feeds else self.needed()
        return plan.wanted(needed, cap) <= 0
