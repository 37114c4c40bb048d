"""Servers that come and go: what they get, what becomes of what was in flight, and what many of
them cost.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.virtual_time import VirtualLoop
from engine.backends.base import Failure, Verdict
from engine.backends.scripted import ScriptedBackend
from engine.errors import ConfigError, UnavailableError
from engine.limits import LimitSettings, Pool
from engine.limits.endpoint import Endpoint
from engine.records import Completion, Prompt
from engine.run.deliver import RetryPolicy, deliver, most_tokens
from tests.engine.limits.test_pool import Replica, answer, now, pool_of
from tests.engine.wire import prompt

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


class Hangs(Replica):
    """A server whose calls end when they are hung up, or after an hour."""

    def __init__(self, **options: Any) -> None:
        super().__init__(delay_s=3600.0, **options)
        self.closed = False
        self._gone = asyncio.Event()

    def hang_up(self) -> None:
        super().hang_up()
        self._gone.set()

    async def complete(self, prompts: Sequence[Prompt]) -> list[Completion | BaseException]:
        assert not self.closed
        for each in prompts:
            self.calls[each.index] += 1
        async with asyncio.timeout(3600):
            await self._gone.wait()
        raise Failure(Verdict(kind="ambiguous", reason="timeout"))

    async def aclose(self) -> None:
        self.closed = True


class Absent(Replica):
    """A server that does not answer yet."""

    closed = False

    async def start(self) -> None:
        raise UnavailableError("no answer")

    async def aclose(self) -> None:
        self.closed = True


async def one_call(pool: Pool, index: int) -> str:
    """A request to its end; who answered it."""
    asked = prompt(index)
    lease = await pool.acquire(tokens=most_tokens(asked))
    (done,) = await deliver([asked], pool, RetryPolicy(), lease, lambda *_: None)
    assert isinstance(done.outcome, Completion)
    return done.backend


async def test_one_that_joins_gets_its_share() -> None:
    """Whoever waits for a slot goes there at once, and later requests are spread over both."""
    pool = pool_of(ScriptedBackend(name="first", max_in_flight=1))
    held = await pool.acquire(tokens=1)
    waiting = asyncio.ensure_future(pool.acquire(tokens=1))
    await asyncio.sleep(0)
    await pool.join(Replica(name="second", max_in_flight=1))
    assert (await waiting).backend.name == "second"
    assert pool.limit == 2
    held.release([answer()])


async def test_calls_in_flight_are_asked_again_once_when_their_server_leaves() -> None:
    """Forty wait at the one that leaves: each is asked elsewhere once, and none is asked twice."""
    leaves, stays = Hangs(name="leaves", max_in_flight=40), Replica(name="stays", max_in_flight=64)
    pool = pool_of(leaves)
    calls = [asyncio.ensure_future(one_call(pool, index)) for index in range(40)]
    await asyncio.sleep(1)
    assert pool.in_flight == 40
    await pool.join(stays)
    began = now()
    await pool.leave(leaves)
    assert leaves.closed, "before its last call had ended, or not at all"
    assert await asyncio.gather(*calls) == ["stays"] * 40
    assert now() - began < 2, "what was in flight is asked at once"
    assert leaves.calls == stays.calls == Counter(range(40))
    assert pool.backends == [stays]
    assert pool.in_flight == 0


async def test_a_slot_of_one_that_has_left_is_not_used() -> None:
    """What waits for its record while the server leaves goes elsewhere, and costs no attempt."""
    leaves, stays = Replica(name="leaves"), Replica(name="stays")
    pool = pool_of(leaves)
    asked = prompt()
    lease = await pool.acquire(tokens=1)
    await pool.join(stays)
    leaving = asyncio.ensure_future(pool.leave(leaves))
    await asyncio.sleep(0)
    policy = RetryPolicy(max_attempts=1)
    (done,) = await deliver([asked], pool, policy, lease, lambda *_: None)
    assert done.backend == "stays"
    assert not leaves.calls
    await leaving


async def test_with_nobody_left_the_run_waits_and_then_ends() -> None:
    """The last server leaves: whoever asks waits for another as long as for any outage."""
    first = Replica(name="first")
    pool = pool_of(first, max_outage_s=100)
    await pool.leave(first)
    waiting = asyncio.ensure_future(pool.acquire(tokens=1))
    await asyncio.sleep(90)
    second = Replica(name="second", max_in_flight=1)
    await pool.join(second)
    lease = await waiting
    waiting = asyncio.ensure_future(pool.acquire(tokens=1))
    await asyncio.sleep(90)  # for its first answer, which may take as long as it likes
    lease.release([answer()])
    (await waiting).release([answer()])
    await pool.leave(second)
    began = now()
    with pytest.raises(UnavailableError, match=r"for 100 s \(second: it has left\)"):
        await pool.acquire(tokens=1)
    assert now() - began == pytest.approx(100, abs=1)


async def test_who_may_not_join() -> None:
    """Another model, also when all others have left; or nobody. Both are closed again."""
    first = Replica(name="first")
    pool = pool_of(first)
    await pool.start()
    await pool.leave(first)
    with pytest.raises(ConfigError, match="one run needs one model"):
        await pool.join(Replica(root="other", name="second"))
    absent = Absent(name="absent")
    with pytest.raises(UnavailableError):
        await pool.join(absent)
    assert absent.closed
    assert pool.backends == []


async def test_a_pool_that_has_ended_gives_nothing_more() -> None:
    """Whoever waits and whoever comes hears why."""
    pool = pool_of(ScriptedBackend(max_in_flight=1))
    held = await pool.acquire(tokens=1)
    waiting = asyncio.ensure_future(pool.acquire(tokens=1))
    await asyncio.sleep(0)
    pool.end(UnavailableError("all died"))
    held.release([answer()])
    for asks in (waiting, pool.acquire(tokens=1)):
        with pytest.raises(UnavailableError, match="all died"):
            await asks


@pytest.mark.parametrize("share", [0.5, 2.0])
@pytest.mark.slow
async def test_many_endpoints_cost_what_few_do(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 256 of them a request looks at a handful, whether all are full or none is; and the
    work is spread evenly.
    """
    looks = 0
    blocked = Endpoint.blocked

    def counted(endpoint: Endpoint, now_s: float, tokens: int) -> float | None:
        nonlocal looks
        looks += 1
        return blocked(endpoint, now_s, tokens)

    monkeypatch.setattr(Endpoint, "blocked", counted)
    backends = [ScriptedBackend(name=f"{n}") for n in range(256)]
    pool = Pool(backends, LimitSettings(max_in_flight=8))
    asked: Counter[str] = Counter()
    requests = 20_000
    left = requests

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            lease = await pool.acquire(tokens=1)
            asked[lease.backend.name] += 1
            await asyncio.sleep(1.0)
            lease.release([answer()])

    async with asyncio.TaskGroup() as group:
        for _ in range(int(share * 256 * 8)):
            group.create_task(work())
    assert looks / requests < 10
    assert len(asked) == 256
    assert max(asked.values()) < 1.5 * requests / 256


async def test_gauges_are_asked_for_side_by_side() -> None:
    """One that hangs delays no other; of many a fifth is asked at each turn."""

    class Gauged(Replica):
        asked = 0

        async def load(self) -> tuple[float, float, float] | None:
            self.asked += 1
            await asyncio.sleep(2.0)
            return None

    few, many = [[Gauged(name=f"{n}", max_in_flight=None) for n in range(c)] for c in (16, 40)]
    for replicas, turns in ((few, 5), (many, 1)):
        pool = pool_of(*replicas)
        for _ in range(4 * len(replicas)):
            await pool.acquire(tokens=1)
        watching = asyncio.ensure_future(pool.run())
        await asyncio.sleep(15.5)  # of which each turn takes three
        assert {replica.asked for replica in replicas} == {turns}
        watching.cancel()
