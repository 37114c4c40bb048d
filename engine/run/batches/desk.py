"""What all parts of a run's batches share, and how they ask a provider that may not answer."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from engine.backends.base import Failure, Verdict
from engine.backends.batch.jobs import Job, Jobs
from engine.backends.masking import Masking
from engine.backends.openai.body import request_body
from engine.backends.openai.dialect import Dialect
from engine.errors import ConfigError, StoppedError, UnavailableError, WoolmillError
from engine.limits import Pool
from engine.money import Prices, Spent
from engine.records import Answer, Api, Completion, Prompt, Usage
from engine.run.changed import Changed
from engine.store import BatchRow, RunStore
from engine.text import as_word

__all__ = ["Desk", "Lane", "error_of", "patiently"]

PASSING = ("unavailable", "throttled", "ambiguous")
"""Kinds of failures of a question that is worth asking again."""
FIRST_WAIT_S, MOST_WAIT_S = 0.5, 60.0
"""Between two questions to a provider that is away: doubled each time, from the first to the
second. A provider may ask for longer, but no more than the second either."""
T = TypeVar("T")


class Lane(Protocol):
    """The pipeline that batches work for."""

    changed: Changed

    @property
    def stops(self) -> bool:
        """Nothing new may begin."""

    @property
    def idle(self) -> bool:
        """There is nothing to wait for but batches."""

    def made(self, requests: Sequence[int]) -> list[Prompt]:
        """The prompts of requests; without those that cannot be made, which are seen to."""

    def keep(self, answers: Sequence[Answer]) -> asyncio.Future[None]:
        """Keep answers; done when they are durable."""

    def has_answer(self, request: int) -> bool: ...

    def refit(self, prompt: Prompt, verdict: Verdict) -> bool:
        """Make the prompt smaller for the next time; False where it cannot be."""

    def sent(self, count: int) -> None:
        """So many requests are under way in a batch (fewer, below 0)."""

    def unsent(self, requests: Sequence[int]) -> None:
        """These were not answered and not paid; they are sent again."""

    def fail(self, error: Exception) -> None:
        """Stop the run."""


@dataclass(slots=True, kw_only=True, eq=False)
class Desk:
    """One stage's dealings with its provider."""

    jobs: Jobs
    store: RunStore
    pool: Pool
    dialect: Dialect
    folder: Path
    """Where files of requests and answers lie while they are needed."""
    model: str
    any_api: bool
    """A request for completions may be asked by chat; then all are."""
    lines_api: Api
    """Else, by which all are asked."""
    max_attempts: int
    prices: Prices
    batch_price: float
    poll_s: float
    wait_s: float | None
    most_lines: int
    most_tokens: int | None
    keep_files: bool
    masking: Masking
    note: Callable[[str], None]
    learnt: Callable[[str], None]
    """Told what the dialect learnt, to keep it and say it."""
    rows: dict[str, BatchRow] = field(default_factory=dict)
    """Batches that are not over, by tag."""
    seen: dict[str, Job] = field(default_factory=dict)
    """How the provider told of them last."""
    looks_s: dict[str, float] = field(default_factory=dict)
    """Loop time of the next look at each that is waited for."""
    tries: Counter[int] = field(default_factory=Counter)
    """Faults of each request, in this session."""

    @property
    def api(self) -> Api:
        """By which API all are asked: a batch has one."""
        return "chat" if self.any_api else self.lines_api

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """A request's body as the provider takes it, in OpenAI's words."""
        return self.dialect.spoken(
            request_body(
                [prompt],
                model=self.model,
                api=self.api,
                streamed=False,
                ignores_eos=self.jobs.name == "vllm",
                continues=self.jobs.name == "vllm",
            )
        )

    async def keep(self, row: BatchRow) -> BatchRow:
        """Commit a batch as it is now."""
        await self.store.batch(row)
        if row.awaited or row.state == "new":
            self.rows[row.tag] = row
        else:
            self.rows.pop(row.tag, None)
            self.seen.pop(row.tag, None)
            self.looks_s.pop(row.tag, None)
        return row

    @property
    def enqueued(self) -> int:
        """Tokens that batches can use which are not over."""
        return sum(row.tokens for row in self.rows.values() if row.awaited)

    def priced(self, completion: Completion) -> Completion:
        """With what it cost in a batch, where the provider does not say and prices are known."""
        usage = completion.usage
        if usage.cost is not None or not self.prices.known:
            return completion
        spent = Spent()
        spent.add(usage)
        cost = self.prices.cost(spent) * self.batch_price
        return replace(completion, usage=_costing(usage, cost))

    def paths(self, tag: str) -> list[Path]:
        """The files of a batch on this machine."""
        return sorted(self.folder.glob(f"{tag}.*"))

    def forget_files(self, tag: str) -> None:
        for path in self.paths(tag):
            path.unlink(missing_ok=True)


def _costing(usage: Usage, cost: float) -> Usage:
    return replace(usage, cost=cost)


async def patiently(desk: Desk, what: str, ask: Callable[[], Awaitable[T]]) -> T:
    """Ask the provider, again and again where it is away or busy, for ``max_outage_s``.

    Raises UnavailableError after that, StoppedError where the run stops meanwhile, and whatever
    error a refusal amounts to.
    """
    loop = asyncio.get_running_loop()
    began_s, wait_s = loop.time(), FIRST_WAIT_S
    while True:
        try:
            return await ask()
        except Failure as failure:
            verdict = desk.masking.verdict(failure.verdict)
            if verdict.kind not in PASSING:
                raise error_of(desk, what, verdict) from failure
            if loop.time() - began_s >= desk.pool.settings.max_outage_s:
                raise UnavailableError(
                    f"{desk.jobs.name}: cannot {what} ({verdict.reason}: {verdict.message}); its"
                    " batches are kept there; run the same command again later"
                ) from failure
        asked_s = min(verdict.retry_after_s or 0.0, MOST_WAIT_S)
        await desk.pool.rest(max(random.uniform(0.5, 1.0) * wait_s, asked_s))
        wait_s = min(2 * wait_s, MOST_WAIT_S)


def error_of(desk: Desk, what: str, verdict: Verdict) -> WoolmillError:
    """What a refusal of the provider's stops the run with."""
    if verdict.reason == "http_404" and what == "look at a batch":
        return StoppedError(
            f"{desk.jobs.name}: does not know a batch of this run ({verdict.message}); is the key"
            " one of the same account and project? Give the batch up, and ask again for what was"
            f" in it, with: woolmill batches {as_word(desk.store.folder)} --forget"
        )
    return verdict.error or ConfigError(
        f"{desk.jobs.name}: cannot {what} ({verdict.reason}: {verdict.message}); check --provider,"
        " --model and the sampling settings"
    )
