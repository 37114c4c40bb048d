"""Answers on their way: to the store, into the count, and on to be decided."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from engine.decide.process import Deciding
from engine.failpoints import failpoint
from engine.records import Answer
from engine.run.batches.bulk import Bulk
from engine.run.pipeline.state import RunState
from engine.run.pipeline.stopping import Stopping
from engine.store import RunStore

__all__ = ["Answers"]


class Answers:
    """Keeps what came, and says to the process that decides how far answers are complete."""

    def __init__(
        self,
        state: RunState,
        stopping: Stopping,
        *,
        store: RunStore,
        deciding: Deciding,
        bulk: Bulk | None,
    ) -> None:
        self._state = state
        self._stopping = stopping
        self._store = store
        self._deciding = deciding
        self._bulk = bulk
        self._telling = False
        """The process will be told, before long, how far answers are there."""

    def keep(self, answers: Sequence[Answer]) -> asyncio.Future[None]:
        """Keep what did not come by a call; done when it is durable."""
        self._state.in_flight += 1
        return self.keep_called(answers)

    def keep_called(self, answers: Sequence[Answer], *, reserved: int = 0) -> asyncio.Future[None]:
        """Keep what came by a call, which is in flight until its answers are durable; ``reserved``
        was booked for it.
        """
        # Only called back: a task that waited for the commit would cost a wake-up for each answer,
        # and nothing here depends on it but the counts.
        kept = self._store.answered(answers, reserved=reserved)
        kept.add_done_callback(partial(self._kept, answers))
        return kept

    def ended(self, error: BaseException | None = None) -> None:
        """A call has come to its end, by a fault of the run's if there is an ``error``."""
        self._state.in_flight -= 1
        if isinstance(error, Exception):
            self._stopping.fail(error)
        self._state.changed.set()

    def tell(self) -> None:
        """Say how far answers are complete."""
        self._telling = False
        self._deciding.tell(self._state.plan.answered_below)

    def _kept(self, answers: Sequence[Answer], kept: asyncio.Future[None]) -> None:
        error = kept.exception()
        # Not before: nothing is counted, shown or decided that a crash could still take away.
        if error is None:
            failpoint("answer.kept")
            self._count(answers)
        self.ended(error)

    def _count(self, answers: Sequence[Answer]) -> None:
        progress, further = self._state.progress, False
        if self._bulk is not None:
            self._bulk.answered(answers)
        for answer in answers:
            progress.answered += 1
            progress.session_answered += 1
            further |= self._state.plan.answered(answer.index)
            progress.failed += answer.failed
            if answer.completion is not None:
                progress.add(answer.completion.usage)
                progress.session_completion_tokens += answer.completion.usage.completion_tokens
        if further and not self._telling:
            # One commit brings hundreds of answers, each with a callback of its own: said once,
            # after the last of them.
            self._telling = True
            asyncio.get_running_loop().call_soon(self.tell)
