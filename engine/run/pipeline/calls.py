"""Sending: a slot, the record of what is about to go out, the call, and what came of it.

A request is recorded before it is sent, so that after a crash those that may have been billed are
known, and with it the most that it can cost, so that a budget holds over all sessions of a run. Its
call goes out when that record is committed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import anyio.abc

from engine.failpoints import failpoint
from engine.limits import Lease, Pool
from engine.prompts.fit import Prompts
from engine.records import Completion, Prompt
from engine.run.batches.bulk import Bulk
from engine.run.batches.route import Way
from engine.run.deliver import Books, RetryPolicy, deliver, most_tokens
from engine.run.pipeline.answers import Answers
from engine.run.pipeline.requests import Requests
from engine.run.pipeline.state import RunState
from engine.run.pipeline.stopping import Stopping
from engine.store import RunStore

__all__ = ["Calls"]


@dataclass(frozen=True, slots=True)
class _Call:
    """One call that has its slot."""

    prompts: Sequence[Prompt]
    lease: Lease
    scouts: bool
    reserved: int
    """Tokens that stand in the store as perhaps billed while the call is under way."""


class _Kept(Books):
    """Keeps with the run what attempts without an answer may have cost."""

    def __init__(self, state: RunState, store: RunStore) -> None:
        self._state = state
        self._store = store

    def reserved(self, lease: Lease) -> int:
        """What to keep of a call that goes out."""
        return lease.tokens if self._state.pace.paid else 0

    def lost(self, tokens: int) -> None:
        if self._state.pace.paid:
            self._store.lost(tokens)

    def dropped(self, requests: int) -> None:
        self._state.progress.dropped += requests
        self._store.dropped(requests)


class Calls:
    """The one producer of a run, and a task for each call in flight."""

    def __init__(
        self,
        state: RunState,
        stopping: Stopping,
        requests: Requests,
        answers: Answers,
        *,
        store: RunStore,
        pool: Pool,
        prompts: Prompts,
        policy: RetryPolicy,
        bulk: Bulk | None,
    ) -> None:
        self._state = state
        self._stopping = stopping
        self._requests = requests
        self._answers = answers
        self._store = store
        self._pool = pool
        self._prompts = prompts
        self._policy = policy
        self._bulk = bulk
        self._books = _Kept(state, store)
        self._tasks: set[asyncio.Task[None]] = set()
        """The calls that have gone out."""
        self._cancelled = False
        """None goes out any more, though its record be committed."""

    async def produce(self, tasks: anyio.abc.TaskGroup) -> None:
        """Let calls and batches go, each a task, until nothing more is to be sent."""
        with self._stopping.sending:
            try:
                while self._stopping.stopped is None:
                    way = self._way()
                    if way == "batch":
                        self._hand_over(tasks)
                    # All that could let a request go sets ``changed``, so one that may not go now
                    # needs no looking again.
                    if way == "live" and (prompts := self._requests.next()):
                        await self._send(prompts)
                    else:
                        await self._state.changed.wait()
            except Exception as error:  # noqa: BLE001 - whatever it is, those in flight come home
                self._stopping.fail(error)

    def _way(self) -> Way:
        """Whether the next requests go in a batch or live, or wait."""
        if self._bulk is None or self._requests.holds:
            return "live"
        state, plan = self._state, self._state.plan
        wanted = self._requests.wanted()
        end = plan.next_number + max(wanted, 0) if plan.end is None else plan.end
        expected = min(plan.undecided + state.needed(), end)
        return self._bulk.choose(wanted, expected, quiet=state.is_quiet)

    def _hand_over(self, tasks: anyio.abc.TaskGroup) -> None:
        """Let the next requests go as a batch."""
        assert self._bulk is not None
        requests = self._state.plan.take(min(self._requests.wanted(), self._bulk.most))
        self._bulk.hand_over(sorted(requests), tasks)

    async def _send(self, prompts: Sequence[Prompt]) -> None:
        """Wait for a slot, and record the call."""
        # A scout from here on, without a slot as yet: nothing else may become one meanwhile.
        scouts = self._requests.scout(prompts)
        lease = await self._pool.acquire(tokens=sum(map(most_tokens, prompts)))
        if self._is_needless(prompts):
            lease.release()
            self._requests.put_back(prompts)
            if scouts:
                self._requests.scout_is_back()
            return
        if self._bulk is not None:
            self._bulk.sent_live()
        # The wait may have been long, and another call may have taught the context length.
        current = [self._prompts.current(prompt) for prompt in prompts]
        self._record(_Call(current, lease, scouts, self._books.reserved(lease)))

    def _is_needless(self, prompts: Sequence[Prompt]) -> bool:
        """Decisions have made it so while the prompts waited for a slot, or a stop has."""
        needed = self._state.needed()
        needless = any(self._state.plan.is_needless(prompt.index, needed) for prompt in prompts)
        return needless or self._stopping.stopped is not None

    # One call. Its task wakes for its answer alone: the commits before and behind it call back.

    def _record(self, call: _Call) -> None:
        """Have it committed that a call is about to go out."""
        # It holds its slot meanwhile, so a slow disk holds back sending, and no more answers come
        # than it takes.
        model = call.lease.backend.model
        recorded = self._store.sent(call.prompts, model, reserved=call.reserved)
        self._state.in_flight += 1
        recorded.add_done_callback(partial(self._go, call))

    def _go(self, call: _Call, recorded: asyncio.Future[None]) -> None:
        """The record is committed: the call may go out."""
        if (error := recorded.exception()) is not None:
            self._over(call, error)
            return
        if self._cancelled:
            self._unanswered(call)
            return
        task = asyncio.get_running_loop().create_task(self._call(call))
        self._tasks.add(task)
        task.add_done_callback(partial(self._came, call))

    async def _call(self, call: _Call) -> None:
        """Ask, again where that is worth it, and hand over the answers."""
        failpoint("request.recorded")
        self._state.progress.sent += len(call.prompts)
        try:
            deliveries = await deliver(
                call.prompts, self._pool, self._policy, call.lease, self._prompts.refit, self._books
            )
        except Exception as error:
            # At once: its slot is free, and a loop's turn later the next call would have taken it.
            self._stopping.fail(error)
            raise
        for delivery in deliveries:
            if isinstance(delivery.outcome, Completion):
                self._prompts.fitted(delivery.prompt)
        # At once as well: what goes out in its place is recorded behind its answers, and so no more
        # of them wait for the disk than may be in flight.
        answers = [delivery.answer() for delivery in deliveries]
        self._answers.keep_called(answers, reserved=call.reserved)

    def _came(self, call: _Call, task: asyncio.Task[None]) -> None:
        """A call is over. Not in the task: one that is cancelled before its first step would run
        none of it.
        """
        self._tasks.discard(task)
        if task.cancelled():
            self._unanswered(call)
        elif (error := task.exception()) is not None:
            self._unanswered(call, error)
        else:
            self._home(call)

    def _unanswered(self, call: _Call, error: BaseException | None = None) -> None:
        """A call that was recorded is over; its attempts have told what they may have cost."""
        self._books.lost(-call.reserved)
        self._over(call, error)

    def _over(self, call: _Call, error: BaseException | None = None) -> None:
        """A call has ended without an answer. It is in the store as sent, and is asked again."""
        call.lease.release()
        self._home(call)
        self._answers.ended(error)

    def _home(self, call: _Call) -> None:
        if call.scouts:
            self._requests.scout_is_back()

    def cancel(self) -> None:
        """Give up what is in flight; ``in_flight`` says when all of it has come to its end."""
        self._cancelled = True
        for task in self._tasks:
            task.cancel()
