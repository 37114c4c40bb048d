"""What the other tests lean on: the toxic server, its capacity models, and the jumping clock."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from benchmarks import virtual_time
from benchmarks.capacity import Batching, TokenBucket
from benchmarks.server import Behaviour, Server
from engine.backends.openai.wire import FastTransport

pytestmark = pytest.mark.anyio


def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=FastTransport())


async def test_answers_are_a_pure_function_of_the_prompt() -> None:
    """The same question gives the same answer, another seed another one; and all is booked."""
    async with Server() as server, client() as http:
        texts = []
        for seed in (1, 1, 2):
            body = {"model": "toy", "prompt": "4. Instruction:", "seed": seed, "max_tokens": 100}
            answer = (await http.post(f"{server.url}/v1/completions", json=body)).json()
            texts.append(answer["choices"][0]["text"])
        assert texts[0] == texts[1] != texts[2]
        booked = (await http.get(f"{server.url}/ledger")).json()
        assert (booked["requests"], booked["paid"], booked["paid_twice"]) == (3, 3, 1)


async def test_faults_are_drawn_anew_for_each_attempt_and_alike_in_each_run() -> None:
    """Seed, prompt and attempt decide, so a failing run can be repeated exactly."""

    async def statuses() -> list[int]:
        behaviour = Behaviour(fault_rate=0.5, faults=("500", "503"))
        async with Server(behaviour) as server, client() as http:
            body = {"model": "toy", "prompt": "x"}
            answers = [
                await http.post(f"{server.url}/v1/completions", json=body) for _ in range(20)
            ]
            return [answer.status_code for answer in answers]

    first = await statuses()
    assert first == await statuses()
    assert len(set(first)) == 3


async def test_limits_a_minute_with_their_headers() -> None:
    """The sixth request of a bucket of five is refused, told what is left and when to come back."""
    async with Server(Behaviour(requests_per_min=5)) as server, client() as http:
        body = {"model": "toy", "prompt": "x"}
        answers = [await http.post(f"{server.url}/v1/completions", json=body) for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429]
        assert answers[0].headers["x-ratelimit-remaining-requests"] == "4"
        assert 11 < float(answers[5].headers["retry-after"]) <= 12


def test_batching_has_a_knee_and_a_storm() -> None:
    """More in flight gives more tokens a second up to the cache's size, and far fewer beyond."""

    async def goodput(in_flight: int) -> float:
        engine = Batching(step_s=0.01, per_sequence_s=0.0001, kv_tokens=100 * 150)

        def again() -> None:
            engine.submit(100, 100, again)

        for _ in range(in_flight):
            again()
        await asyncio.sleep(60)
        return engine.tokens_out / 60

    ten, hundred, two = (virtual_time.run(goodput(n)) for n in (10, 100, 200))
    assert hundred > 4 * ten
    assert two < 0.6 * hundred


def test_a_bucket_refills() -> None:
    """Sixty a minute is one a second."""

    async def run() -> list[bool]:
        bucket = TokenBucket(60, burst=1)
        found = [bucket.take(1), bucket.take(1)]
        await asyncio.sleep(bucket.wait_s(1))
        return [*found, bucket.take(1)]

    assert virtual_time.run(run()) == [True, False, True]


def test_an_hour_of_virtual_time_costs_nothing() -> None:
    """Timers fire in their order, and the wall stands still."""

    async def run() -> list[float]:
        loop = asyncio.get_running_loop()
        fired: list[float] = []
        for delay in (3600.0, 1.0, 60.0):
            loop.call_later(delay, lambda: fired.append(loop.time()))
        await asyncio.sleep(3601)
        return fired

    began = time.perf_counter()
    assert virtual_time.run(run()) == [1.0, 60.0, 3600.0]
    assert time.perf_counter() - began < 60
