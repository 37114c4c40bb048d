"""Faults of the wire seen from the whole run: what is paid, left behind, and learned."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from benchmarks.server import Behaviour, Server
from engine.backends.base import Failure, Verdict
from engine.backends.openai.backend import HttpBackend
from engine.limits import LimitSettings, Pool
from engine.records import Completion, Prompt
from engine.run.deliver import Delivery, RetryPolicy, deliver
from engine.run.display import SilentDisplay
from engine.run.generate import generate
from engine.settings import RunConfig
from tests.engine.wire import http, prompt, raw_server

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


def no_refit(prompt: Prompt, verdict: Verdict) -> Prompt | None:
    return None


async def answered(pool: Pool, first: int, count: int) -> list[Delivery]:
    """``count`` prompts, as many at a time as the pool allows."""

    async def one(index: int) -> Delivery:
        lease = await pool.acquire(tokens=100)
        (done,) = await deliver([prompt(index)], pool, RetryPolicy(), lease, no_refit)
        return done

    return await asyncio.gather(*[one(index) for index in range(first, first + count)])


def resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


async def test_fault_107_nothing_is_left_of_requests() -> None:
    """Six thousand after two thousand: no descriptor, no task, no memory more."""
    async with Server(Behaviour(fault_rate=0.02, faults=("500", "reset", "cut"))) as server:
        pool = Pool([HttpBackend(server.url)], LimitSettings(max_in_flight=32))
        await pool.start()
        await answered(pool, 0, 2000)
        server.ledger.asked.clear()
        server.ledger.paid.clear()
        kib, files = resident_kib(), len(os.listdir("/proc/self/fd"))
        tasks = len(asyncio.all_tasks())
        for first in range(2000, 8000, 2000):
            await answered(pool, first, 2000)
            server.ledger.asked.clear()
            server.ledger.paid.clear()
        assert len(os.listdir("/proc/self/fd")) <= files + 64  # both ends of 32 connections
        assert len(asyncio.all_tasks()) == tasks
        assert resident_kib() - kib < 4096
        await pool.aclose()


async def test_fault_047_an_answer_cut_by_length_is_paid_once() -> None:
    """The same request is never sent again for it."""
    cut = {"choices": [{"index": 0, "text": "1. Too lo", "finish_reason": "length"}]}
    async with Server(Behaviour(extra=cut)) as server:
        pool = Pool([HttpBackend(server.url, stream=False)], LimitSettings(max_in_flight=4))
        await pool.start()
        done = await answered(pool, 0, 20)
        await pool.aclose()
        outcomes = [d.outcome for d in done if isinstance(d.outcome, Completion)]
        assert [outcome.finish_reason for outcome in outcomes] == ["length"] * 20
        assert max(server.ledger.paid.values()) == 1
        assert server.ledger.paid.total() == 20


CHOICE = b'[{"index":0,"text":"%b","finish_reason":"stop"}]'
ODD_JSON = {
    "fault_042 duplicate choices": (
        b'{"choices":%b,"choices":%b}' % (CHOICE % b"first", CHOICE % b"last"), None,
    ),
    "fault_042 duplicate text": (
        b'{"choices":[{"index":0,"text":"first","text":"last","finish_reason":"stop"}]}', None,
    ),
    "fault_042 a duplicate that takes the answer away": (
        b'{"model":"m","choices":%b,"choices":[]}' % (CHOICE % b"first"), None,
    ),
    "fault_042 a number without end": (
        b'{"choices":%b,"usage":{"prompt_tokens":1%b,"completion_tokens":2}}'
        % (CHOICE % b"text", b"0" * 40), "text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("body", ODD_JSON)
async def test_json_that_can_be_read_in_two_ways(body: str) -> None:
    """Of two answers under one key none is taken; a count beyond reason becomes an estimate."""
    raw, expected = ODD_JSON[body]

    async def serve(request: bytes, writer: asyncio.StreamWriter) -> None:
        listed = b'{"data":[{"id":"m"}]}'
        writer.write(http(listed if request.startswith(b"GET") else raw))

    async with raw_server(serve) as url:
        backend = HttpBackend(url, stream=False)
        await backend.start()
        if expected is None:
            with pytest.raises(Failure) as failure:
                await backend.complete([prompt()])
            assert failure.value.verdict.kind == "ambiguous"  # asked again
        else:
            (outcome,) = await backend.complete([prompt()])
            assert isinstance(outcome, Completion)
            assert outcome.text == expected
            assert outcome.usage.estimated
            assert 0 < outcome.usage.prompt_tokens < 1000
        await backend.aclose()


async def test_fault_031_a_hidden_context_costs_one_overflow(tmp_path: Path) -> None:
    """A server that tells its length only when it refuses does so once in a thousand requests."""
    async with Server(Behaviour(max_model_len=700, tells_length=False)) as server:
        config = RunConfig(
            base_url=(server.url,), target=10_000, max_requests=1000, max_in_flight=64,
            out=tmp_path / "run", semantic=False,
        )  # fmt: skip
        result = await generate(config, SilentDisplay())
        assert result.progress.answered == 1000
        assert result.progress.failed == 0
        assert server.ledger.overflows == 1
