"""Decisions on their way from the process that takes them: to the store, and into the count."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial

from engine.decide.process import Batch, Deciding, DiedError, StuckError
from engine.errors import ConfigError, StoppedError, UnavailableError
from engine.failpoints import failpoint
from engine.prompts.fit import Prompts
from engine.run import endings
from engine.run.pipeline.state import RunState
from engine.run.pipeline.stopping import Stopping
from engine.run.progress import Display, Owner, Stop
from engine.store import RunStore
from engine.thoughts import THOUGHTS_ONLY

__all__ = ["Decisions", "Streaks"]

MOST_COMMITTING = 8
"""Batches of decisions that may wait for their commit; then no more are taken."""
THOUGHTS_IN_A_ROW = 10
"""Answers that were thoughts alone, after which the person is told the likely cause."""


@dataclass(slots=True)
class Streaks:
    """Answers in a row that gave nothing: with one more of them the settings are to blame."""

    barren: int = 0
    """Answers without an accepted row."""
    thoughts: int = 0
    """Decisions that there was nothing but thoughts to decide on."""
    most_thoughts: int = 0
    """The longest row of those in the batch that was taken in last."""

    def take_in(self, batch: Batch) -> None:
        """Go on with the decisions of a batch."""
        fruitful = set()
        self.most_thoughts = 0
        for request, reason in batch.reasons:
            if reason is None:
                fruitful.add(request)
            self.thoughts = self.thoughts + 1 if reason == THOUGHTS_ONLY else 0
            self.most_thoughts = max(self.most_thoughts, self.thoughts)
        # Each answer counts, also one that no row was found in and nothing had to be decided on.
        for request in range(batch.first, batch.end):
            self.barren = 0 if request in fruitful else self.barren + 1


class Decisions:
    """Takes decisions in plan order until there will be no more."""

    def __init__(
        self,
        state: RunState,
        stopping: Stopping,
        *,
        store: RunStore,
        deciding: Deciding,
        prompts: Prompts,
        display: Display,
        owner: Owner,
    ) -> None:
        self._state = state
        self._stopping = stopping
        self._store = store
        self._deciding = deciding
        self._prompts = prompts
        self._display = display
        self._owner = owner
        self._streaks = Streaks()
        self.ended = False
        """There will be no more of them."""

    async def run(self) -> None:
        """Hand decisions to the store as they come, and replace a process that dies."""
        died = False
        try:
            while True:
                try:
                    async for batch in self._deciding.batches():
                        died = False
                        await self._keep(batch)
                except DiedError as error:
                    # Once may be the memory of a bad moment. Twice without a decision between is
                    # no accident; but a recipe that hangs is looked into until it is known where.
                    if died and not isinstance(error, StuckError):
                        raise UnavailableError(
                            f"{error}, and another too; resume the run"
                        ) from None
                    died = True
                    await self._replace(error)
        except Exception as error:  # noqa: BLE001 - a bug too: what is in flight comes home
            self._stopping.fail(error)
        finally:
            self.ended = True
            self._state.changed.set()

    async def _keep(self, batch: Batch) -> None:
        """Hand a batch to the store, and wait while too many wait there."""
        state = self._state
        state.committing += 1
        kept = self._store.decided_rows(batch.rows)
        kept.add_done_callback(partial(self._kept, batch))
        await state.changed.until(lambda: state.committing < MOST_COMMITTING)

    async def _replace(self, error: DiedError) -> None:
        """Start another process, which goes on from what is committed: so all must be first."""
        await self._state.changed.until(lambda: self._state.committing == 0)
        self._display.note(f"{error}; starting another process")
        await self._deciding.start()
        await self._deciding.ready()
        self._deciding.tell(self._state.plan.answered_below)

    def _kept(self, batch: Batch, kept: asyncio.Future[None]) -> None:
        """The decisions of ``batch`` are committed, or could not be."""
        # The store commits in the order of the calls, so batches are counted in plan order too.
        self._state.committing -= 1
        error = kept.exception()
        if error is None:
            failpoint("decision.kept")
            self._count(batch)
        elif isinstance(error, Exception):
            # Plan order: what follows cannot be kept where this was not.
            self.ended = True
            self._stopping.fail(error)
        self._state.changed.set()

    def _count(self, batch: Batch) -> None:
        progress, by_meaning = self._state.progress, self._state.pace.by_meaning
        for _, reason in batch.reasons:
            if reason is None:
                progress.accepted += 1
                progress.session_accepted += 1
                progress.unread += by_meaning
            else:
                progress.reasons[reason] += 1
        progress.unread -= len(batch.rows.vectors)
        # Behind the target the last answer may be decided in part; a higher target goes on there.
        self._state.plan.undecided = progress.decided_answers = batch.end
        self._owner.committed(batch.end)
        self._heed_streaks(batch)

    def _heed_streaks(self, batch: Batch) -> None:
        """Tell the person of answers in a row that gave nothing, and end the run at too many."""
        streaks, pace = self._streaks, self._state.pace
        before = streaks.thoughts
        streaks.take_in(batch)
        # Once for a streak: it may be the start of a run that comes right.
        if before < THOUGHTS_IN_A_ROW <= streaks.most_thoughts:
            self._display.note(endings.thoughts(THOUGHTS_IN_A_ROW, self._prompts.max_tokens))
        if not self._state.is_reached and streaks.barren >= pace.max_barren_requests:
            said = endings.barren(self._state.progress, streaks.barren)
            self._stopping.halt(Stop(error=StoppedError(said)))
        elif streaks.thoughts >= pace.max_refusals_in_a_row:
            said = endings.thoughts(streaks.thoughts, self._prompts.max_tokens)
            self._stopping.halt(Stop(error=ConfigError(f"{said} in a new run")))
