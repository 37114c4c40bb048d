"""Which prompts go out next: in plan order, but that scouts wait for one another.

While the context length is unknown, a call larger than any that has fitted goes alone, as a scout;
see ``engine.prompts.fit``. A second one is held back without a slot until the first is home, and
meanwhile those go out that need no scout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.prompts.fit import Prompts
from engine.recipes.guard import RecipeFault
from engine.records import Answer, Prompt
from engine.run.batches.bulk import Bulk
from engine.run.deliver import unsent
from engine.run.pipeline.state import RunState

__all__ = ["Requests"]

MOST_HELD = 64
"""Calls that may be held back; then no more prompts are made."""


class Requests:
    """The prompts of one run's calls.

    Args:
        prompts: makes them.
        keep: keeps the answers to requests that no prompt can be made for.
        asks_for: told up to which request the run would go on, if it had the input.
        bulk: what goes in batches; None: every request is a call.
    """

    def __init__(
        self,
        state: RunState,
        prompts: Prompts,
        *,
        keep: Callable[[Sequence[Answer]], object],
        asks_for: Callable[[int], None],
        bulk: Bulk | None,
    ) -> None:
        self._state = state
        self._prompts = prompts
        self._keep = keep
        self._asks_for = asks_for
        self._bulk = bulk
        self._held: list[Sequence[Prompt]] = []
        """The prompts of calls that wait until they may scout, in plan order; they have no slot."""
        self.scouting = False
        """A scout is under way."""

    def next(self) -> Sequence[Prompt] | None:
        """The prompts of the next call; None where none may go out now."""
        # First those that were held back: they come earlier in the plan, and decisions wait for
        # them.
        for place, prompts in enumerate(self._held):
            if self._may_go(prompts):
                return self._held.pop(place)
        most = self._state.pace.request_batch_size
        if self._bulk is not None and self._bulk.scouting:
            most = 1  # what the host refuses of it is learnt before it stands in thousands of lines
        # Those that need no scout may stand far behind many that do; but each prompt that is held
        # back is memory.
        while len(self._held) < MOST_HELD and (wanted := self.wanted()) > 0:
            prompts = self.made(self._state.plan.take(min(wanted, most)))
            if prompts and self._may_go(prompts):
                return prompts
            if prompts:
                self._held.append(prompts)
        return None

    @property
    def holds(self) -> bool:
        """Calls are held back."""
        return bool(self._held)

    def wanted(self) -> int:
        """How many requests may be taken now; the stage before hears how far that goes."""
        plan, needed = self._state.plan, self._state.needed()
        self._asks_for(plan.undecided + needed)
        return plan.wanted(needed, self._state.pace.max_requests)

    def made(self, indexes: Sequence[int]) -> list[Prompt]:
        """The prompts of these requests; without those that the recipe fails at, which are kept as
        failed, and those behind the last input row.
        """
        # What overflowed in one batch must not go into the next at its full length.
        shorter = self._bulk.shorter if self._bulk is not None else {}
        prompts = []
        for index in indexes:
            try:
                prompt = shorter.get(index) or self._prompts.prompt(index)
            except RecipeFault as fault:
                # An answer like any other: decisions go on in plan order over it.
                self._keep([unsent(self._prompts.ask(index), fault)])
                continue
            if prompt is not None:
                prompts.append(prompt)
            else:
                self._end_before(index)
        return prompts

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        """These will not be sent now; they come first again."""
        self._state.plan.put_back(prompt.index for prompt in prompts)

    def _end_before(self, index: int) -> None:
        """The input has no row for request ``index``."""
        plan = self._state.plan
        plan.ends_before(index)
        self._state.progress.requests = plan.end
        self._state.changed.set()

    # Scouts

    def scout(self, prompts: Sequence[Prompt]) -> bool:
        """A call is about to wait for its slot. True: it is a scout, until ``scout_is_back``."""
        scouts = self._prompts.goes_alone(prompts)
        self.scouting |= scouts
        return scouts

    def scout_is_back(self) -> None:
        """It was answered, or failed, or was not sent; the next one may go."""
        self.scouting = False
        self._state.changed.set()

    def _may_go(self, prompts: Sequence[Prompt]) -> bool:
        return not (self.scouting and self._prompts.goes_alone(prompts))
