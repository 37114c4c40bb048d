"""The run: one producer, a task for each call in flight, another process that decides. All tasks
start here.

    producer ──▶ store ──▶ call, call, call … ──▶ store ──▶ decisions ──▶ store
    (plan order) (sent)    (any order)          (answered) (plan order)  (decided)

* The producer records what it has a slot for, and a call goes out when that is committed. Its task
  is free for the next as soon as its answers are handed to the store. So a task wakes twice for a
  request, when it may go out and when its answer is here; the commits only call back.
* What decides is told up to where answers are complete, and reads them from the store.
* How much is outstanding (sent and not yet decided) is bounded by what the yield so far says is
  still needed; near the target the number in flight shrinks by itself, and few answers are paid in
  vain.
* Stopping is one thing, whatever the cause: nothing new is sent, calls in flight come home and are
  committed within ``drain_timeout_s``, and what can be decided is decided.

The price of plan order: an answer that is late holds back the *decisions* behind it, never the
sending.
"""

from __future__ import annotations

import asyncio
import math
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import anyio
import anyio.abc

from engine.backends.base import GivesUp, Making, Verdict
from engine.decide.process import Batch, Deciding, DiedError, StuckError
from engine.errors import (
    ConfigError,
    DiskError,
    InternalError,
    StoppedError,
    UnavailableError,
    WoolmillError,
)
from engine.failpoints import failpoint
from engine.limits import Lease, Pool
from engine.prompts.fit import Prompts
from engine.recipes.guard import RecipeFault
from engine.records import EVERY, Answer, Completion, Prompt
from engine.run import endings
from engine.run.batches.bulk import Bulk
from engine.run.batches.route import Way
from engine.run.deliver import RetryPolicy, deliver, most_tokens, unsent
from engine.run.limit_log import LimitLog
from engine.run.plan import Plan
from engine.run.progress import Display, Owner, Pace, Progress, Stop, of_target
from engine.run.turns import Changed, Turn
from engine.store import RunStore
from engine.thoughts import THOUGHTS_ONLY

__all__ = ["Pipeline"]

MOST_COMMITTING = 8
"""Batches of decisions that may wait for their commit; then no more are taken."""
REFRESH_S = 0.25
MOST_HELD = 64
"""Calls that wait, without a slot, until they may go alone; then no more prompts are made."""
STUCK_S = 30
"""Seconds with slots held and nobody asked, after which that is a bug of ours."""
THOUGHTS_IN_A_ROW = 10
"""Answers that were thoughts alone, after which the person is told the likely cause."""


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
        owner: whoever started the run, or the neighbours of a stage.
        leads: shows progress, as one stage does for all.
        watches: watches the pool, as one stage does for those that share it.
        owner: is told of decisions when they are committed.
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
        self._store = store
        self._pool = pool
        self._prompts = prompts
        self._deciding = deciding
        self._policy = policy
        self._pace = pace
        self._display = display
        self._bulk = bulk
        self.owner = owner or Owner()
        self._leads = leads
        self._watches = watches
        self.on_halt: Callable[[Stop], None] = lambda _stop: None
        """Called when nothing more is sent, with the cause."""
        self.on_leave: Callable[[], None] = lambda: None
        """Called when nothing is waited for any more."""
        self.changed = self._changed = Changed()
        self._limit_log = LimitLog(store)
        self._stop: Stop | None = None
        self._sending = anyio.CancelScope()
        self._abandoning = anyio.Event()
        self._drained_at_s: float | None = None
        """Until when the calls in flight are waited for, after a stop."""
        self._in_flight = 0
        self._held: list[Sequence[Prompt]] = []
        """Calls that must go alone and wait for their turn; they hold no slot."""
        self._scouting = False
        """A call that goes alone is under way."""
        self._thoughts = 0
        """Answers in a row that were thoughts alone."""
        self._keeping = 0
        """Of those in flight, the calls whose answers wait for their commit."""
        self._resting: list[Turn] = []
        """Tasks whose call is over and that wait for the next."""
        resume = store.resume()
        counts = resume.counts
        self._plan = Plan(
            answered_below=resume.answered_below,
            answered_beyond=resume.answered_beyond,
            in_flight=[request.index for request in resume.in_flight],
            awaited=bulk.awaited if bulk is not None else (),
            # The last one may be decided in part: the target may have fallen inside it.
            undecided=resume.last_decided[0] if resume.last_decided else 0,
        )
        self._telling = False
        """What decides will be told, before long, how far answers are there."""
        self._committing = 0
        """Batches of decisions that wait for their commit."""
        self._no_decisions = False
        """There will be no more of them."""
        self._barren = 0
        self._smaller: dict[int, Prompt] = {}
        """Requests of batches that did not fit the context, and are shorter the next time."""
        self.progress = Progress(
            target=pace.target,
            most_records=pace.most_records,
            accepted=counts.accepted,
            sent=self._plan.sent,
            answered=counts.answered,
            decided_answers=self._plan.undecided,
            failed=counts.failed,
            reasons=Counter(counts.reasons),
            unread=counts.accepted - counts.vectors if pace.by_meaning else 0,
            paid=pace.paid,
        )
        self.progress.begin_with(counts)

    async def run(self) -> Stop:
        """Run to the target, a stop or a fault; everything that arrived is committed on return."""
        async with anyio.create_task_group() as background:
            background.start_soon(self._show)
            if self._watches:
                background.start_soon(self._watch)
            background.start_soon(self._decide)
            async with anyio.create_task_group() as calls:
                background.start_soon(self._drain, calls.cancel_scope)
                calls.start_soon(self._end)
                if self._bulk is not None:
                    self._bulk.begin(self, calls)
                self._tell()
                await self._produce(calls)
            await self._changed.until(lambda: self._keeping == 0)
            if not isinstance(self._stop and self._stop.error, DiskError):
                await self._changed.until(self._all_decided)  # what came home while draining
            background.cancel_scope.cancel()
        assert self._stop is not None
        self._limit_log.keep(self._pool, at_once=True)
        self._leave_batches()
        return self._stop

    async def _end(self) -> None:
        """Stop at the target, or when no more will come."""
        progress = self.progress
        await self._changed.until(lambda: self._stop is not None or self._reached() or self._idle())
        if self._reached():
            self.halt(Stop())
        elif self._stop is None:
            at_end = self._plan.is_complete
            if at_end and (self._pace.feeds or progress.target == EVERY):
                self.halt(Stop())
            else:
                ended = endings.at_end_of_rows if at_end else endings.at_cap
                self.halt(Stop(error=ended(progress, self._pace)))

    def _reached(self) -> bool:
        """The target is; a stage's that feeds another only says what that wants for now."""
        return not self._pace.feeds and self.progress.accepted >= self.progress.target

    @property
    def stopped(self) -> Stop | None:
        """Why nothing more is sent; None: the run goes on."""
        return self._stop

    # -- between stages ---------------------------------------------------------------------------

    def there_are(self, requests: int, *, grows: bool) -> None:
        """So many requests are possible now; ``grows``: more may come to be."""
        self._plan.end, self._plan.grows = requests, grows
        if not grows:
            self.progress.requests = requests
        self._changed.set()

    def demand(self, rows: int) -> None:
        """The next stage wants so many accepted rows in all, as far as it can tell now."""
        if rows > self.progress.target:
            self.progress.target = rows
            self._changed.set()

    # -- stopping ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """Drain, as at a signal; once more: leave at once. In the thread of the run."""
        if self._stop is None:
            self.halt(Stop(asked=True))
        else:
            self.leave()

    def leave(self) -> None:
        """Wait for nothing any more."""
        if self._leads:
            self._display.note("leaving now; what arrived is committed")
        self._abandoning.set()
        self._changed.set()
        self.on_leave()

    def halt(self, stop: Stop) -> None:
        """Send nothing more; the first cause stands."""
        if self._stop is None:
            self._stop = stop
            self.progress.draining = not stop.reached
            self._sending.cancel()
            if not (self._pace.feeds and stop.reached):  # the next stage goes on
                self._pool.stop()
            self._changed.set()
            self.on_halt(stop)

    def _halt_by(self, error: Exception) -> None:
        """Stop for ``error``; one that is none of the run's is a bug of ours."""
        if not isinstance(error, WoolmillError):
            error = InternalError.of(error)
        self.halt(Stop(error=error))

    async def _watch(self) -> None:
        """Watch the servers, and for what must never be: slots held while nobody is asked."""
        try:
            async with anyio.create_task_group() as watching:
                watching.start_soon(self._pool.run)
                stuck_s = 0
                while stuck_s < STUCK_S:
                    await anyio.sleep(1)
                    idle = not self._pool.calls_on_the_wire and not self._store.waiting
                    stuck_s = stuck_s + 1 if self._pool.in_flight and idle else 0
                message = f"{self._pool.in_flight} slots held and nothing asked for {STUCK_S} s"
                raise InternalError.of(RuntimeError(message))
        except* Exception as errors:  # noqa: BLE001 - see _halt_by
            self._halt_by(errors.exceptions[0])

    def say_state(self, cause: str) -> None:
        """One line about how far the run is, for a signal that asks for no more."""
        self._display.note(
            f"{cause}: going on; accepted {self.progress.accepted:,}"
            f"{of_target(self.progress.target)}, {self._in_flight} calls in flight"
        )

    def halt_by_signal(self, signum: signal.Signals) -> None:
        """Drain, and say what is waited for."""
        how = "stopping already" if self._stop is not None else "sending nothing more"
        self.halt(Stop(signum=signum))
        if self._bulk is not None and self.idle:
            how += ", leaving batches as they are"
        elif not any(isinstance(backend, GivesUp) for backend in self._pool.backends):
            how += (
                f", waiting up to {self._pace.drain_timeout_s:g} s for {self._in_flight} calls in"
                " flight"
            )
        self._display.note(f"{signum.name}: {how} (once more to leave at once)")

    async def _drain(self, calls: anyio.CancelScope) -> None:
        """After a stop, give the calls in flight their time, then cancel those that are left.

        Answers that cost nothing are given up at once where that time would not do. At the target
        none of them is needed.
        """
        await self._changed.until(lambda: self._stop is not None)
        assert self._stop is not None
        wait = self._pace.paid or not self._stop.reached
        wait_s = self._pace.drain_timeout_s if wait else 0.0
        if wait and not self._pace.paid:
            self._give_up(wait_s)
        self._drained_at_s = anyio.current_time() + wait_s
        with anyio.move_on_after(wait_s):
            await self._abandoning.wait()
        calls.cancel()

    def _give_up(self, within_s: float) -> None:
        """Drop the answers that could not be finished in time, and say so."""
        backends = [backend for backend in self._pool.backends if isinstance(backend, GivesUp)]
        told = [backend.give_up(within_s) for backend in backends]
        if said := endings.given_up(told):
            self._display.note(said)

    # -- sending ----------------------------------------------------------------------------------

    def _wanted(self) -> int:
        """How many requests may be taken now, within window and cap."""
        needed = self._needed()
        self.owner.wants(self._plan.undecided + needed)
        return self._plan.wanted(needed, self._pace.max_requests)

    def _needed(self) -> int:
        """How many answers, from the first undecided request on, the yield so far calls for."""
        progress = self.progress
        missing = progress.target - progress.accepted
        needed = math.ceil(missing / progress.records_per_answer)
        if not progress.accepted:
            # A setting that spoils every answer looks like a yield of next to nothing, which calls
            # for all that there is: until something is accepted, no more than twice what was seen.
            first = math.ceil(missing / progress.most_records)
            needed = min(needed, max(first, 2 * progress.decided_answers))
        if missing > 0:
            known = progress.decided_answers if self._pace.paid else 0
            needed = max(needed, self._pace.at_least - known)
        return needed

    def _next(self) -> Sequence[Prompt] | None:
        """The prompts of the next call; None where none may go out now.

        A call that would go alone while another does is put aside: it takes a slot when it may use
        it, and meanwhile those go that need not go alone.
        """
        for at, prompts in enumerate(self._held):
            if self._may_go(prompts):
                return self._held.pop(at)
        most = self._pace.request_batch_size
        if self._bulk is not None and self._bulk.scouting:
            most = 1
        while len(self._held) < MOST_HELD and (wanted := self._wanted()) > 0:
            indexes = self._plan.take(min(wanted, most))
            prompts = self.made(indexes)
            if prompts and self._may_go(prompts):
                return prompts
            if prompts:
                self._held.append(prompts)
        return None

    def made(self, indexes: Sequence[int]) -> list[Prompt]:
        """The prompts of these requests; without those that the recipe fails at, which are kept as
        failed, and those behind the last input row.
        """
        prompts = []
        for index in indexes:
            try:
                prompt = self._smaller.get(index) or self._prompts.prompt(index)
            except RecipeFault as fault:
                self._not_asked(index, fault)
                continue
            if prompt is not None:
                prompts.append(prompt)
            else:
                self._plan.ends_before(index)
                self.progress.requests = self._plan.end
                self._changed.set()
        return prompts

    def _not_asked(self, index: int, fault: RecipeFault) -> None:
        """Keep that no prompt could be made for a request."""
        self.keep([unsent(self._prompts.ask(index), fault)])

    def keep(self, answers: Sequence[Answer]) -> asyncio.Future[None]:
        """Keep what did not come by a call; done when it is durable."""
        self._in_flight += 1
        self._keeping += 1
        kept = self._store.answered(answers)
        kept.add_done_callback(partial(self._kept, answers))
        return kept

    def _may_go(self, prompts: Sequence[Prompt]) -> bool:
        return not (self._scouting and self._prompts.goes_alone(prompts))

    async def _produce(self, calls: anyio.abc.TaskGroup) -> None:
        with self._sending:
            try:
                while self._stop is None:
                    if self._bulk is not None and not self._held:
                        way = self._way(self._bulk)
                        if way == "batch":
                            self._hand_over(self._bulk, calls)
                        if way != "live":
                            await self._changed.wait()
                            continue
                    if prompts := self._next():
                        await self._send(prompts, calls)
                    else:
                        await self._changed.wait()
            except Exception as error:  # noqa: BLE001 - whatever it is, those in flight come home
                self._halt_by(error)
        for resting in self._resting:
            if not resting.recorded.done():  # cancelled
                resting.recorded.set_result(None)

    async def _send(self, prompts: Sequence[Prompt], calls: anyio.abc.TaskGroup) -> None:
        """Wait for a slot, and let one of the tasks make the call."""
        alone = self._prompts.goes_alone(prompts)
        self._scouting |= alone
        lease = await self._pool.acquire(tokens=sum(map(most_tokens, prompts)))
        needed = self._needed()
        needless = any(self._plan.is_needless(prompt.index, needed) for prompt in prompts)
        if needless or self._stop is not None:
            # While this waited for a slot, decisions made it so.
            lease.release()
            self._plan.put_back(prompt.index for prompt in prompts)
            if alone:
                self._scouting = False
            return
        if self._resting:
            turn = self._resting.pop()
        else:
            turn = Turn(asyncio.get_running_loop().create_future())
            calls.start_soon(self._caller, turn)
        turn.alone = alone
        self._record(turn, prompts, lease)

    def _record(self, turn: Turn, prompts: Sequence[Prompt], lease: Lease) -> None:
        """Record what is about to be sent; then it is the turn of whoever waits to send it."""
        self._in_flight += 1
        if self._bulk is not None:
            self._bulk.sent_live()
        turn.prompts = [self._prompts.current(prompt) for prompt in prompts]
        turn.lease = lease
        self._store.sent(turn.prompts, lease.backend.model, turn.recorded)

    async def _caller(self, turn: Turn) -> None:
        """One call after another until sending ends: a task for each costs some 5 % more CPU."""
        while await self._call(turn) and self._stop is None:
            turn = Turn(asyncio.get_running_loop().create_future())
            self._resting.append(turn)

    async def _call(self, turn: Turn) -> bool:
        """One call, from its record to its answers in the store's hands. False: there was none."""
        try:
            await turn.recorded
            if turn.lease is None:
                return False
            failpoint("request.recorded")
            self.progress.sent += len(turn.prompts)
            deliveries = await deliver(
                turn.prompts, self._pool, self._policy, turn.lease, self._prompts.refit
            )
        except BaseException as error:  # the run's, a bug, or cancelled
            if turn.lease is not None:
                turn.lease.release()
                self._back(turn)
                self._over(error)
            if isinstance(error, Exception):
                return False
            raise
        for delivery in deliveries:
            if isinstance(delivery.outcome, Completion):
                self._prompts.fitted(delivery.prompt)
        self._back(turn)
        answers = [delivery.answer() for delivery in deliveries]
        self._keeping += 1
        self._store.answered(answers).add_done_callback(partial(self._kept, answers))
        return True

    def _back(self, turn: Turn) -> None:
        """A call is over; where it went alone, the next that must may go."""
        if turn.alone:
            self._scouting = False
            self._changed.set()

    def _kept(self, answers: Sequence[Answer], kept: asyncio.Future[None]) -> None:
        self._keeping -= 1
        error = kept.exception()
        if error is None:
            failpoint("answer.kept")
            self._count(answers)
        self._over(error)

    def _over(self, error: BaseException | None = None) -> None:
        """A call has come to its end, by a fault of the run's if there is an ``error``."""
        self._in_flight -= 1
        if isinstance(error, Exception):
            self._halt_by(error)
        self._changed.set()

    def _count(self, answers: Sequence[Answer]) -> None:
        progress, further = self.progress, False
        if self._bulk is not None:
            self._bulk.answered()
        for answer in answers:
            self._smaller.pop(answer.index, None)
            progress.answered += 1
            progress.session_answered += 1
            further |= self._plan.answered(answer.index)
            progress.failed += answer.failed
            if answer.completion is not None:
                progress.add(answer.completion.usage)
                progress.session_completion_tokens += answer.completion.usage.completion_tokens
        if further and not self._telling:
            self._telling = True
            asyncio.get_running_loop().call_soon(self._tell)  # of all that the commit brought

    # -- batches ----------------------------------------------------------------------------------

    def _way(self, bulk: Bulk) -> Way:
        """Whether the next requests go in a batch or live, or wait."""
        wanted, plan = self._wanted(), self._plan
        end = plan.next_number + max(wanted, 0) if plan.end is None else plan.end
        expected = min(plan.undecided + self._needed(), end)
        quiet = self.idle and not self._keeping
        return bulk.choose(wanted, expected, quiet=quiet)

    def _hand_over(self, bulk: Bulk, calls: anyio.abc.TaskGroup) -> None:
        requests = self._plan.take(min(self._wanted(), bulk.most))
        bulk.hand_over(sorted(requests), calls)

    @property
    def stops(self) -> bool:
        """Nothing new may begin."""
        return self._stop is not None

    @property
    def idle(self) -> bool:
        """There is nothing to wait for but batches: no call, and no decision."""
        return not self._in_flight and not self._committing and not self._plan.to_decide

    def has_answer(self, request: int) -> bool:
        return self._plan.has_answer(request)

    def refit(self, prompt: Prompt, verdict: Verdict) -> bool:
        """Make the prompt smaller for the next time; False where it cannot be."""
        smaller = self._prompts.refit(prompt, verdict)
        if smaller is not None:
            self._smaller[prompt.index] = smaller
        return smaller is not None

    def sent(self, count: int) -> None:
        """So many requests are under way in a batch (fewer, below 0)."""
        self.progress.sent += count

    def unsent(self, requests: Sequence[int]) -> None:
        """These were not answered and not paid; they are sent again."""
        end = self._plan.end
        self._plan.put_back(index for index in requests if end is None or index < end)
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """Stop the run for ``error``."""
        self._halt_by(error)

    def _leave_batches(self) -> None:
        """Say which batches go on without the run."""
        if self._bulk is not None:
            left = (index for index in self._bulk.awaited if not self._plan.has_answer(index))
            self.progress.in_batches = sum(1 for _ in left)
            if said := self._bulk.left_running():
                self._display.note(said)

    # -- deciding ---------------------------------------------------------------------------------

    def _tell(self) -> None:
        self._telling = False
        self._deciding.tell(self._plan.answered_below)

    async def _decide(self) -> None:
        """Hand decisions to the store as they come, and replace a process that dies."""
        died = False
        try:
            while True:
                try:
                    async for batch in self._deciding.batches():
                        died = False
                        self._committing += 1
                        kept = self._store.decided_rows(batch.rows)
                        kept.add_done_callback(partial(self._decided, batch))
                        await self._changed.until(lambda: self._committing < MOST_COMMITTING)
                except DiedError as error:
                    await self._changed.until(lambda: self._committing == 0)
                    if died and not isinstance(error, StuckError):
                        raise UnavailableError(
                            f"{error}, and another too; resume the run"
                        ) from None
                    died = True
                    self._display.note(f"{error}; starting another process")
                    await self._deciding.start()
                    await self._deciding.ready()
                    self._tell()
        except Exception as error:  # noqa: BLE001 - a bug too: what is in flight comes home
            self._halt_by(error)
        finally:
            self._no_decisions = True
            self._changed.set()

    def _decided(self, batch: Batch, kept: asyncio.Future[None]) -> None:
        """The decisions of ``batch`` are committed, or could not be."""
        self._committing -= 1
        error = kept.exception()
        if error is None:
            failpoint("decision.kept")
            self._count_decisions(batch)
        elif isinstance(error, Exception):
            self._no_decisions = True
            self._halt_by(error)
        self._changed.set()

    def _count_decisions(self, batch: Batch) -> None:
        progress = self.progress
        # Behind the target the last answer may be decided in part; a higher target goes on there.
        fruitful = {index for index, _, reason, _, _ in batch.rows.decisions if reason is None}
        for index in range(batch.first, batch.end):
            self._barren = 0 if index in fruitful else self._barren + 1
        for _, _, reason, _, _ in batch.rows.decisions:
            if reason is None:
                progress.accepted += 1
                progress.session_accepted += 1
                progress.unread += self._pace.by_meaning
            else:
                progress.reasons[reason] += 1
            self._thoughts = self._thoughts + 1 if reason == THOUGHTS_ONLY else 0
            if self._thoughts == THOUGHTS_IN_A_ROW:
                self._display.note(endings.thoughts(self._thoughts, self._prompts.max_tokens))
        progress.unread -= len(batch.rows.vectors)
        self._plan.undecided = progress.decided_answers = batch.end
        self.owner.committed(batch.end)
        if not self._reached() and self._barren >= self._pace.max_barren_requests:
            self.halt(Stop(error=StoppedError(endings.barren(progress, self._barren))))
        elif self._thoughts >= self._pace.max_refusals_in_a_row:
            said = endings.thoughts(self._thoughts, self._prompts.max_tokens)
            self.halt(Stop(error=ConfigError(f"{said} in a new run")))

    def _all_decided(self) -> bool:
        """All that can be, or all that the person waits for."""
        return (
            not self._plan.to_decide
            or self._reached()
            or self._no_decisions
            or self._abandoning.is_set()
        )

    def _idle(self) -> bool:
        """Nothing is under way and nothing more may be sent."""
        plan, cap = self._plan, self._pace.max_requests
        grows = plan.grows and (cap is None or plan.next_number < cap)
        if self._in_flight or grows or not plan.is_decided:
            return False
        if self._pace.feeds:  # what is wanted may grow; what is possible must be at its end
            return self._plan.wanted(EVERY, self._pace.max_requests) <= 0
        return self._wanted() <= 0

    # -- showing ----------------------------------------------------------------------------------

    async def _show(self) -> None:
        progress, decided, since_s = self.progress, -1, anyio.current_time()
        while True:
            now_s = anyio.current_time()
            to_decide, undecided = self._plan.to_decide, self._plan.undecided
            if not to_decide or not progress.to_decide or undecided != decided:
                since_s = now_s
            decided = undecided
            progress.to_decide, progress.deciding_s = to_decide, now_s - since_s
            progress.calls = self._in_flight
            progress.calls_at_disk = self._store.waiting
            progress.learning = self._scouting
            if self._bulk is not None:
                progress.batches = self._bulk.views()
            progress.tokens_in_the_making = sum(
                backend.tokens_in_the_making
                for backend in self._pool.backends
                if isinstance(backend, Making)
            )
            if self._drained_at_s is not None:
                progress.drain_left_s = max(0.0, self._drained_at_s - now_s)
            self._limit_log.keep(self._pool)
            if self._leads:
                self._display.refresh(progress, self._pool)
            await anyio.sleep(REFRESH_S)
