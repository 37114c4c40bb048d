"""The tasks of one run: one producer, a task for each call in flight, another process that decides.

* How much is outstanding (sent and not yet decided) is bounded by what the yield so far says is
  still needed; near the target the number in flight shrinks by itself, and few answers are paid in
  vain.
* What decides is told up to where answers are complete, and reads them from the store.
* Stopping is one thing, whatever the cause; see ``stopping``.

The price of plan order: an answer that is late holds back the *decisions* behind it, never the
sending.
"""

from __future__ import annotations

from collections import Counter

import anyio
import anyio.abc

from engine.decide.process import Deciding
from engine.errors import DiskError, InternalError
from engine.limits import Pool
from engine.prompts.fit import Prompts
from engine.records import EVERY
from engine.run import endings
from engine.run.batches.bulk import Bulk
from engine.run.deliver import RetryPolicy
from engine.run.pipeline.answers import Answers
from engine.run.pipeline.calls import Calls
from engine.run.pipeline.decisions import Decisions
from engine.run.pipeline.lane import BatchLane
from engine.run.pipeline.requests import Requests
from engine.run.pipeline.showing import Showing
from engine.run.pipeline.state import RunState
from engine.run.pipeline.stopping import Stopping
from engine.run.plan import Plan
from engine.run.progress import Display, Owner, Pace, Progress, Stop
from engine.store import RunStore

__all__ = ["Pipeline"]

STUCK_S = 30
"""Seconds with slots held and nobody asked, after which that is a bug of ours."""


class Pipeline:
    """One run from where its store stands to its target.

    Args:
        store: open for writing; says what earlier sessions sent, got and decided.
        pool: the backends behind their limits, started.
        prompts: makes them.
        deciding: started; knows the store's decisions.
        policy: what is tried again.
        pace: when to stop.
        display: shows progress.
        bulk: what goes in batches; None: every request is a call.
        owner: whoever started the run, or the neighbours of a stage; is told of decisions when
            they are committed.
        leads: shows progress, as one stage does for all.
        watches: watches the pool, as one stage does for those that share it.
    """

    def __init__(
        self,
        *,
        store: RunStore,
        pool: Pool,
        prompts: Prompts,
        deciding: Deciding,
        policy: RetryPolicy,
        pace: Pace,
        display: Display,
        bulk: Bulk | None = None,
        owner: Owner | None = None,
        leads: bool = True,
        watches: bool = True,
    ) -> None:
        self.owner = owner or Owner()
        self._store = store
        self._pool = pool
        self._prompts = prompts
        self._display = display
        self._bulk = bulk
        self._watches = watches
        self._state = state = _resumed(store, pace, bulk)
        self.stopping = stopping = Stopping(state, pool, display, bulk, leads=leads)
        # Answers first: a request that no prompt can be made for is answered at once.
        self._answers = answers = Answers(
            state, stopping, store=store, deciding=deciding, bulk=bulk
        )
        self._requests = requests = Requests(
            state, prompts, keep=answers.keep, asks_for=self.owner.wants, bulk=bulk
        )
        self._calls = Calls(
            state,
            stopping,
            requests,
            answers,
            store=store,
            pool=pool,
            prompts=prompts,
            policy=policy,
            bulk=bulk,
        )
        self._decisions = Decisions(
            state,
            stopping,
            store=store,
            deciding=deciding,
            prompts=prompts,
            display=display,
            owner=self.owner,
        )
        self._showing = Showing(
            state,
            stopping,
            requests,
            store=store,
            pool=pool,
            bulk=bulk,
            display=display if leads else None,
        )

    @property
    def progress(self) -> Progress:
        return self._state.progress

    async def run(self) -> Stop:
        """Run to the target, a stop or a fault; everything that arrived is committed on return."""
        state, stopping = self._state, self.stopping
        async with anyio.create_task_group() as background:
            background.start_soon(self._showing.run)
            if self._watches:
                background.start_soon(self._watch)
            background.start_soon(self._decisions.run)
            await self._send(background)
            # After a fault of the disk nothing can be kept, so nothing need be decided.
            if not isinstance(stopping.stopped and stopping.stopped.error, DiskError):
                await state.changed.until(self._all_decided)  # what came home while draining
            background.cancel_scope.cancel()
        assert stopping.stopped is not None
        self._showing.end()
        self._leave_batches()
        return stopping.stopped

    async def _send(self, background: anyio.abc.TaskGroup) -> None:
        """Send until nothing more is to be sent, and wait for what is under way."""
        state, calls = self._state, self._calls
        try:
            # What goes in batches is a group of its own, which a drain ends, and the rest goes on.
            async with anyio.create_task_group() as batches:

                def cancel() -> None:
                    calls.cancel()
                    batches.cancel_scope.cancel()

                background.start_soon(self.stopping.drain, cancel)
                background.start_soon(self._end)
                if self._bulk is not None:
                    self._bulk.begin(self._lane(self._bulk), batches)
                # Earlier sessions may have left answers that nobody has decided.
                self._answers.tell()
                await calls.produce(batches)
            await state.changed.until(lambda: not state.in_flight)
        finally:
            # Also where the run itself is cancelled. What has arrived is paid, and is committed.
            calls.cancel()
            with anyio.CancelScope(shield=True):
                await state.changed.until(lambda: not state.in_flight)

    # Between stages

    def there_are(self, requests: int, *, grows: bool) -> None:
        """So many requests are possible now; ``grows``: more may come to be."""
        plan = self._state.plan
        plan.end, plan.grows = requests, grows
        if not grows:  # until then nobody can say how long the input is
            self.progress.requests = requests
        self._state.changed.set()

    def demand(self, rows: int) -> None:
        """The next stage wants so many accepted rows in all, as far as it can tell now."""
        # Never less: a row that was wanted once has been asked for.
        if rows > self.progress.target:
            self.progress.target = rows
            self._state.changed.set()

    # The end

    async def _end(self) -> None:
        """Stop at the target, or when no more will come."""
        state, stopping = self._state, self.stopping
        await state.changed.until(
            lambda: stopping.stopped is not None or state.is_reached or state.is_exhausted
        )
        if stopping.stopped is None:
            stopping.halt(self._outcome())

    def _outcome(self) -> Stop:
        """Of a run that came to its end by itself."""
        state = self._state
        at_end = state.plan.is_complete
        if state.is_reached or (at_end and (state.pace.feeds or self.progress.target == EVERY)):
            return Stop()
        ended = endings.at_end_of_rows if at_end else endings.at_cap
        return Stop(error=ended(self.progress, state.pace))

    def _all_decided(self) -> bool:
        """All that can be, or all that the person waits for."""
        return (
            not self._state.plan.to_decide
            or self._state.is_reached
            or self._decisions.ended
            or self.stopping.leaves
        )

    def _lane(self, bulk: Bulk) -> BatchLane:
        return BatchLane(
            self._state,
            self.stopping,
            self._requests,
            self._answers,
            prompts=self._prompts,
            bulk=bulk,
        )

    def _leave_batches(self) -> None:
        """Say which batches go on without the run."""
        if self._bulk is not None and (said := self._bulk.left_running()):
            self._display.note(said)

    async def _watch(self) -> None:
        """Watch the servers, and for what must never be: slots held while nobody is asked."""
        pool = self._pool
        try:
            async with anyio.create_task_group() as watching:
                watching.start_soon(pool.run)
                stuck_s = 0
                while stuck_s < STUCK_S:
                    await anyio.sleep(1)
                    # A slot is held only while a backend is asked, or before and after that while
                    # something is committed.
                    idle = not pool.calls_on_the_wire and not self._store.waiting
                    stuck_s = stuck_s + 1 if pool.in_flight and idle else 0
                message = f"{pool.in_flight} slots held and nothing asked for {STUCK_S} s"
                raise InternalError.of(RuntimeError(message))
        except* Exception as errors:  # noqa: BLE001 - see Stopping.fail
            self.stopping.fail(errors.exceptions[0])


def _resumed(store: RunStore, pace: Pace, bulk: Bulk | None) -> RunState:
    """Where earlier sessions left the run."""
    resume = store.resume()
    counts = resume.counts
    plan = Plan(
        answered_below=resume.answered_below,
        answered_beyond=resume.answered_beyond,
        in_flight=[request.index for request in resume.in_flight],
        awaited=bulk.awaited if bulk is not None else (),
        # The last one may be decided in part: the target may have fallen inside it.
        undecided=resume.last_decided[0] if resume.last_decided else 0,
    )
    progress = Progress(
        target=pace.target,
        most_records=pace.most_records,
        accepted=counts.accepted,
        sent=plan.sent,
        answered=counts.answered,
        decided_answers=plan.undecided,
        failed=counts.failed,
        reasons=Counter(counts.reasons),
        unread=counts.accepted - counts.vectors if pace.by_meaning else 0,
        paid=pace.paid,
    )
    progress.begin_with(counts)
    return RunState(plan=plan, progress=progress, pace=pace)
