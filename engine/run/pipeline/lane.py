"""One pipeline as its batches see it; see ``engine.run.batches.desk.Lane``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from engine.backends.base import Verdict
from engine.prompts.fit import Prompts
from engine.records import Answer, Prompt
from engine.run.batches.bulk import Bulk
from engine.run.pipeline.answers import Answers
from engine.run.pipeline.requests import Requests
from engine.run.pipeline.state import RunState
from engine.run.pipeline.stopping import Stopping

__all__ = ["BatchLane"]


class BatchLane:
    """What batches may do in a run: they make prompts, keep answers, and put requests back."""

    def __init__(
        self,
        state: RunState,
        stopping: Stopping,
        requests: Requests,
        answers: Answers,
        *,
        prompts: Prompts,
        bulk: Bulk,
    ) -> None:
        self.changed = state.changed
        self._state = state
        self._stopping = stopping
        self._requests = requests
        self._answers = answers
        self._prompts = prompts
        self._bulk = bulk

    @property
    def stops(self) -> bool:
        """Nothing new may begin."""
        return self._stopping.stopped is not None

    @property
    def idle(self) -> bool:
        """There is nothing to wait for but batches."""
        return self._state.is_quiet

    def made(self, requests: Sequence[int]) -> list[Prompt]:
        return self._requests.made(requests)

    def keep(self, answers: Sequence[Answer]) -> asyncio.Future[None]:
        return self._answers.keep(answers)

    def has_answer(self, request: int) -> bool:
        return self._state.plan.has_answer(request)

    def refit(self, prompt: Prompt, verdict: Verdict) -> bool:
        """Make the prompt smaller for the next time; False where it cannot be."""
        smaller = self._prompts.refit(prompt, verdict)
        if smaller is not None:
            self._bulk.shorter[prompt.index] = smaller
        return smaller is not None

    def sent(self, count: int) -> None:
        """So many requests are under way in a batch (fewer, below 0)."""
        # Batches go out and come back without a call: this is all that is seen of them as sent.
        self._state.progress.sent += count

    def unsent(self, requests: Sequence[int]) -> None:
        """These were not answered and not paid; they are sent again."""
        # The input may have come to its end below them meanwhile.
        plan = self._state.plan
        plan.put_back(index for index in requests if plan.end is None or index < plan.end)
        self.changed.set()

    def fail(self, error: Exception) -> None:
        """Stop the run for ``error``."""
        self._stopping.fail(error)
