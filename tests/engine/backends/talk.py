"""A backend that talks to a server of a test's, or to answers that a test has written."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson

from benchmarks.server import Behaviour, Server
from engine.backends.base import Failure, Verdict
from engine.backends.openai.backend import HttpBackend
from engine.backends.openai.listening import Timeouts
from engine.records import Completion
from tests.engine.wire import http as http_bytes
from tests.engine.wire import prompt, raw_server

__all__ = [
    "COUNTED",
    "DONE",
    "NOTHING",
    "QUICK",
    "ask",
    "canned",
    "packed_answers",
    "talking",
    "text",
    "verdict_of",
]

QUICK = Timeouts(connect_s=1.0, first_token_s=0.3, idle_s=0.2, total_s=1.0)


@asynccontextmanager
async def talking(
    behaviour: Behaviour | None = None, **options: Any
) -> AsyncIterator[tuple[Server, HttpBackend]]:
    async with Server(behaviour) as server:
        backend = HttpBackend(server.url, **options)
        await backend.start()
        yield server, backend
        await backend.aclose()


@asynccontextmanager
async def packed_answers(body: bytes) -> AsyncIterator[str]:
    """A server that answers each request, but for the list of models, with ``body`` as gzip."""

    async def serve(request: bytes, writer: asyncio.StreamWriter) -> None:
        if b"/models" in request:
            writer.write(http_bytes(b'{"data":[{"id":"m"}]}'))
        else:
            writer.write(http_bytes(gzip.compress(body), headers="content-encoding: gzip\r\n"))

    async with raw_server(serve) as url:
        yield url


async def verdict_of(backend: HttpBackend, index: int = 0) -> Verdict:
    try:
        (outcome,) = await backend.complete([prompt(index)])
    except Failure as exc:
        return exc.verdict
    assert isinstance(outcome, Failure)
    return outcome.verdict


def canned(*events: Any, whole: Any = None) -> httpx.MockTransport:
    """A transport that serves ``/models``, and one stream of ``events`` or one ``whole`` answer."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        if whole is not None:
            return httpx.Response(200, json=whole)
        lines = [e if isinstance(e, bytes) else b"data: " + orjson.dumps(e) for e in events]
        return httpx.Response(
            200,
            headers={"content-type": "text/event-stream"},
            content=b"\n\n".join(lines) + b"\n\n",
        )

    return httpx.MockTransport(answer)


async def ask(transport: httpx.AsyncBaseTransport, **options: Any) -> Completion | BaseException:
    backend = HttpBackend("http://localhost", transport=transport, **options)
    await backend.start()
    try:
        return (await backend.complete([prompt()]))[0]
    except Failure as exc:
        return exc


def text(words: str, finish: str | None = None) -> dict[str, Any]:
    return {"model": "m", "choices": [{"index": 0, "text": words, "finish_reason": finish}]}


DONE = b"data: [DONE]"
COUNTED = {"prompt_tokens": 20, "completion_tokens": 50, "total_tokens": 70}
NOTHING = {"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9}
