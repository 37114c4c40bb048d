"""A run without disk and without other processes, so that it can be had on virtual time: doubles of
the store and of the process that decides, and a transport whose calls go wrong as told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import anyio
import httpx
import orjson

from engine.backends.openai.backend import HttpBackend
from engine.decide.process import Batch
from engine.limits import LimitSettings, Pool
from engine.recipes.seeds import bundled_seeds, read_seeds
from engine.records import Answer, Prompt
from engine.run.deliver import RetryPolicy
from engine.run.pipeline import Pipeline
from engine.run.progress import Pace, Progress, Stop
from engine.store import Counts, DecisionRows
from engine.store.reader import Resume
from tests.engine.asked import alpaca_prompts

__all__ = ["MemoryStore", "Notes", "Wire", "run_on", "whole"]

TASKS = read_seeds(bundled_seeds(), at_least=3)


class MemoryStore:
    """What a pipeline asks of a ``RunStore``; a commit is the loop's next turn."""

    waiting = 0

    def __init__(self) -> None:
        self.sent_indexes: list[int] = []
        self.lost_tokens = 0
        self.dropped_requests = 0
        self.answers: dict[int, Answer] = {}
        self.decided: dict[int, str | None] = {}

    def resume(self) -> Resume:
        return Resume(
            counts=Counts(),
            answered_below=0,
            answered_beyond=frozenset(),
            in_flight=(),
            last_decided=None,
        )

    def limits(self) -> list[dict[str, Any]]:
        return []

    def keep_limits(self, changes: Sequence[dict[str, Any]]) -> asyncio.Future[None]:
        return _soon()

    def sent(
        self, prompts: Sequence[Prompt], model: str, *, reserved: int = 0
    ) -> asyncio.Future[None]:
        self.lost(reserved)
        self.sent_indexes += [prompt.index for prompt in prompts]
        return _soon()

    def lost(self, tokens: int) -> None:
        self.lost_tokens += tokens

    def dropped(self, requests: int) -> None:
        self.dropped_requests += requests

    def answered(self, answers: Sequence[Answer], *, reserved: int = 0) -> asyncio.Future[None]:
        self.lost(-reserved)
        self.answers |= {answer.index: answer for answer in answers}
        return _soon()

    def decided_rows(self, rows: DecisionRows) -> asyncio.Future[None]:
        self.decided |= {index: reason for index, _, reason, _, _ in rows.decisions}
        return _soon()


def _soon() -> asyncio.Future[None]:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle() -> None:
        if not done.done():
            done.set_result(None)

    loop.call_soon(settle)
    return done


class HereDeciding:
    """Accepts one record of every answer; what failed is refused with its reason."""

    def __init__(self, store: MemoryStore, target: int) -> None:
        self._store = store
        self._left = target
        self._told = anyio.Event()
        self._below = 0

    def tell(self, below: int) -> None:
        self._below = below
        self._told.set()

    async def batches(self) -> AsyncIterator[Batch]:
        first = 0
        while True:
            while self._below <= first:
                self._told = anyio.Event()
                await self._told.wait()
            rows = DecisionRows([], [])
            end = first
            while end < self._below and self._left > 0:
                answer = self._store.answers[end]
                reason = None if answer.completion else f"failed:{answer.failure}"
                rows.decisions.append((end, 0, reason, b"", 0))
                self._left -= reason is None
                end += 1
            yield Batch(first=first, end=end, rows=rows)
            first = end


class Notes:
    """A display that keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def refresh(self, progress: Progress, pool: Pool) -> None: ...

    def note(self, message: str) -> None:
        self.notes.append(message)


def whole(words: str = " Say it", finish: str | None = "stop", **more: Any) -> dict[str, Any]:
    """A whole answer of the Completions API."""
    choice = {"index": 0, "text": words, "finish_reason": finish}
    usage = {"prompt_tokens": 900, "completion_tokens": 20, "total_tokens": 920}
    return {"model": "m", "choices": [choice], "usage": usage, **more}


Fault = Callable[[httpx.Request], Any]
"""What one call comes to: an exception to raise, or a response; may be awaitable."""


class Wire(httpx.AsyncBaseTransport):
    """Lists one model, of which it tells no context length, and answers completions in
    ``latency_s``; the calls named in ``faults`` (from 1) come to what they say.
    """

    def __init__(self, faults: dict[int, Fault], latency_s: float = 0.05) -> None:
        self.calls = 0
        self.together = self.most_together = 0
        self._faults = faults
        self._latency_s = latency_s

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            data = {"data": [{"id": "m", "owned_by": "somebody"}]}
            return httpx.Response(200 if request.url.path.endswith("models") else 404, json=data)
        self.calls += 1
        fault = self._faults.get(self.calls)
        self.together += 1
        self.most_together = max(self.most_together, self.together)
        try:
            await asyncio.sleep(self._latency_s)
            came = fault(request) if fault else answer_to(request)
            if asyncio.iscoroutine(came):
                came = await came
        finally:
            self.together -= 1
        if isinstance(came, BaseException):
            raise came
        assert isinstance(came, httpx.Response)
        return came


def answer_to(request: httpx.Request) -> httpx.Response:
    """A good answer, streamed where that was asked for."""
    if not orjson.loads(b"".join(request.stream)).get("stream"):  # type: ignore[arg-type]
        return httpx.Response(200, json=whole())
    event = b"data: " + orjson.dumps(whole()) + b"\n\ndata: [DONE]\n\n"
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=event)


async def run_on(
    wire: httpx.AsyncBaseTransport,
    *,
    in_flight: Any = "auto",
    target: int = 40,
    context_length: int | None = None,
    display: Any = None,
    policy: RetryPolicy | None = None,
) -> tuple[Stop, Pipeline, MemoryStore]:
    """A run of ``target`` requests over ``wire``."""
    backend = HttpBackend("http://localhost", transport=wire)
    pool = Pool([backend], LimitSettings(max_in_flight=in_flight))
    await pool.start()
    prompts = alpaca_prompts(TASKS, max_tokens=64, context_length=context_length)
    await prompts.count(backend.count_tokens)
    store: Any = MemoryStore()
    deciding: Any = HereDeciding(store, target)
    pipeline = Pipeline(
        store=store, pool=pool, prompts=prompts, deciding=deciding, policy=policy or RetryPolicy(),
        pace=Pace(target=target), display=display or Notes(),
    )  # fmt: skip
    try:
        return await pipeline.run(), pipeline, store
    finally:
        await pool.aclose()
