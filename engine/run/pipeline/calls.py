"""Sending: a slot, the record of what is about to go out, the call, and what came of it.

A request is recorded before it is sent, so that after a crash those that may have been billed are
known. Its call goes out when that record is committed.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio.abc

from engine.failpoints import failpoint
from engine.limits import Lease, Pool
from engine.prompts.fit import Prompts
from engine.records import Completion, Prompt
from engine.run.batches.bulk import Bulk
from engine.run.batches.route import Way
from engine.run.deliver import RetryPolicy, deliver, most_tokens
from engine.run.pipeline.answers import Answers
from engine.run.pipeline.requests import Requests
from engine.run.pipeline.state import RunState
from engine.run.pipeline.stopping import Stopping
from engine.store import RunStore

__all__ = ["Calls"]


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

    async def produce(self, tasks: anyio.abc.TaskGroup) -> None:
        """Start calls and batches, each a task, until nothing more is to be sent."""
        with self._stopping.sending:
            try:
                while self._stopping.stopped is None:
                    way = self._way()
                    if way == "batch":
                        self._hand_over(tasks)
                    # All that could let a request go sets ``changed``, so one that may not go now
                    # needs no looking again.
                    if way == "live" and (prompts := self._requests.next()):
                        await self._send(prompts, tasks)
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
        quiet = state.is_quiet and not state.keeping
        return self._bulk.choose(wanted, expected, quiet=quiet)

    def _hand_over(self, tasks: anyio.abc.TaskGroup) -> None:
        """Let the next requests go as a batch."""
        assert self._bulk is not None
        requests = self._state.plan.take(min(self._requests.wanted(), self._bulk.most))
        self._bulk.hand_over(sorted(requests), tasks)

    async def _send(self, prompts: Sequence[Prompt], tasks: anyio.abc.TaskGroup) -> None:
        """Wait for a slot, and let a task make the call."""
        # A scout from here on, without a slot as yet: nothing else may become one meanwhile.
        scouts = self._requests.scout(prompts)
        lease = await self._pool.acquire(tokens=sum(map(most_tokens, prompts)))
        if self._is_needless(prompts):
            lease.release()
            self._requests.put_back(prompts)
            if scouts:
                self._requests.scout_is_back()
            return
        self._state.in_flight += 1
        if self._bulk is not None:
            self._bulk.sent_live()
        # The wait may have been long, and another call may have taught the context length.
        prompts = [self._prompts.current(prompt) for prompt in prompts]
        tasks.start_soon(self._call, prompts, lease, scouts)

    def _is_needless(self, prompts: Sequence[Prompt]) -> bool:
        """Decisions have made it so while the prompts waited for a slot, or a stop has."""
        needed = self._state.needed()
        needless = any(self._state.plan.is_needless(prompt.index, needed) for prompt in prompts)
        return needless or self._stopping.stopped is not None

    async def _call(self, prompts: Sequence[Prompt], lease: Lease, scouts: bool) -> None:
        """One call, from its record to its answers in the store's hands."""
        # The slot is held over the record, so a slow disk holds back sending, and no more answers
        # come than it takes.
        try:
            await self._store.sent(prompts, lease.backend.model)
            failpoint("request.recorded")
            self._state.progress.sent += len(prompts)
            deliveries = await deliver(
                prompts, self._pool, self._policy, lease, self._prompts.refit
            )
        except BaseException as error:  # the run's, a bug, or cancelled
            # Without a result: what was in flight is in the store as sent, and is asked again.
            lease.release()
            self._answers.ended(error)
            if not isinstance(error, Exception):
                raise
        else:
            for delivery in deliveries:
                if isinstance(delivery.outcome, Completion):
                    self._prompts.fitted(delivery.prompt)
            self._answers.keep_called([delivery.answer() for delivery in deliveries])
        finally:
            if scouts:
                self._requests.scout_is_back()
