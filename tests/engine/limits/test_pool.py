"""The pool on virtual time: slots, turns, breakers, budgets, giving up."""

from __future__ import annotations

import asyncio
import random
from itertools import pairwise
from typing import Any

import pytest

from benchmarks.virtual_time import VirtualLoop
from engine.backends.base import Verdict
from engine.backends.scripted import ScriptedBackend
from engine.errors import ConfigError, StoppedError, UnavailableError
from engine.limits import EndpointLimits, LimitSettings, Pool
from engine.limits.finder.finder import Adaptive
from engine.money import Prices
from engine.records import Completion, Usage

pytestmark = pytest.mark.anyio

REFUSED = Verdict(kind="throttled", reason="http_429")
GONE = Verdict(kind="unavailable", reason="connect_refused", message="nobody listens")
BROKEN = Verdict(kind="ambiguous", reason="http_500")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


def now() -> float:
    return asyncio.get_running_loop().time()


def answer(tokens: int = 100, prompt_tokens: int = 100) -> Completion:
    usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=tokens)
    return Completion(text="x", finish_reason="stop", usage=usage)


def pool_of(*backends: ScriptedBackend, **settings: Any) -> Pool:
    return Pool(backends or [ScriptedBackend(max_in_flight=2)], LimitSettings(**settings))


async def release_all(pool: Pool, verdict: Verdict, *, at_most: int = 10_000) -> None:
    """A server that comes to ``verdict`` with everything, until the pool gives up."""
    for _ in range(at_most):
        (await pool.acquire(tokens=1)).release([verdict])


async def test_slots_are_bounded_and_handed_on_in_order() -> None:
    """Two slots: the third waits for a release, and whoever came first goes first."""
    pool = pool_of()
    first, second = [await pool.acquire(tokens=1) for _ in range(2)]
    waiting = [asyncio.ensure_future(pool.acquire(tokens=1)) for _ in range(2)]
    await asyncio.sleep(0)
    assert (pool.in_flight, pool.limit) == (2, 2)
    first.release([answer()])
    first.release([answer()])  # twice is once
    await asyncio.sleep(0)
    assert [task.done() for task in waiting] == [True, False]
    second.release([answer()])
    await waiting[1]
    assert pool.snapshot()[0].binds == "limit"


async def test_retries_go_first_while_they_are_few() -> None:
    """A retry overtakes first attempts; more of them than the budget allows wait their turn."""
    pool = pool_of(ScriptedBackend(max_in_flight=1))
    held = await pool.acquire(tokens=1)
    order: list[str] = []

    async def wait(name: str, *, retry: bool) -> None:
        lease = await pool.acquire(tokens=1, retry=retry)
        order.append(name)
        lease.release([BROKEN])

    async with asyncio.TaskGroup() as group:
        group.create_task(wait("first", retry=False))
        await asyncio.sleep(0)
        for i in range(12):
            group.create_task(wait(f"retry {i}", retry=True))
        await asyncio.sleep(0)
        held.release([answer()])
    assert order[:10] == [f"retry {i}" for i in range(10)]
    assert order[10] == "first"


async def test_a_cancelled_wait_leaks_no_slot() -> None:
    """Cancelled before or after the slot was handed over: it is free again."""
    pool = pool_of(ScriptedBackend(max_in_flight=1))
    held = await pool.acquire(tokens=1)
    tasks = [asyncio.ensure_future(pool.acquire(tokens=1)) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    held.release([answer()])
    tasks[1].cancel()
    third = await tasks[2]
    third.release()
    assert pool.in_flight == 0


async def test_fault_108_waiting_costs_no_time_of_its_own() -> None:
    """A thousand waiters are served in a thousand steps: no polling, nothing lost."""
    pool = pool_of(ScriptedBackend(max_in_flight=3))

    async def work() -> None:
        lease = await pool.acquire(tokens=1)
        await asyncio.sleep(1.0)
        lease.release([answer()])

    await asyncio.gather(*[work() for _ in range(999)])
    assert now() == pytest.approx(333.0)


async def test_fault_021_retry_after_is_obeyed() -> None:
    """No request in the seven seconds, nor exactly at their end; one cut, however many refusals."""
    pool = pool_of(ScriptedBackend(max_in_flight=None))
    leases = [await pool.acquire(tokens=1) for _ in range(4)]
    for lease in leases:
        lease.release([Verdict(kind="throttled", reason="http_429", retry_after_s=7.0)])
    assert pool.snapshot()[0].binds == "pause"
    began = now()
    await pool.acquire(tokens=1)
    assert 7.0 < now() - began < 8.0


async def test_fault_022_a_wait_beyond_reason_stops_the_run() -> None:
    """Retry-After of thirty years: stopped at once, resumable, with what the server said."""
    pool = pool_of()
    lease = await pool.acquire(tokens=1)
    lease.release([Verdict(kind="throttled", reason="http_429", retry_after_s=1e9)])
    with pytest.raises(StoppedError, match="asks to wait 1000000000 s, longer"):
        await pool.acquire(tokens=1)
    assert now() == 0.0


async def test_fault_025_refused_for_ten_minutes() -> None:
    """Nothing but 429 for --max-outage: stopped with advice about rates."""
    pool = pool_of(ScriptedBackend(max_in_flight=None), max_outage_s=600)
    with pytest.raises(StoppedError, match="--requests-per-min"):
        await release_all(pool, REFUSED)
    assert 600 <= now() < 640


async def test_fault_001_and_fault_002_an_outage_ends_the_run_in_time() -> None:
    """Refused connections cost nothing but time; after --max-outage the run ends with the cause."""
    pool = pool_of(max_outage_s=100)
    with pytest.raises(UnavailableError, match="nobody listens"):
        await release_all(pool, GONE, at_most=40)  # probes, not a storm
    assert 100 <= now() < 106


@pytest.mark.parametrize("rest_s", [20.0, 1000.0])
async def test_a_call_that_rests_does_not_outlast_an_outage(rest_s: float) -> None:
    """The only call there is rests between two attempts, so that none waits for a slot."""
    pool = pool_of(max_outage_s=100)
    while pool.snapshot()[0].state == "closed":
        (await pool.acquire(tokens=1)).release([GONE])
    began_s = now()

    async def tries() -> None:
        for _ in range(40):
            await pool.rest(rest_s)
            (await pool.acquire(tokens=1)).release([GONE])

    with pytest.raises(UnavailableError, match="no endpoint has answered for 100 s"):
        await tries()
    assert 100 <= now() - began_s < 106


async def test_fault_052_a_server_that_restarts_is_waited_for() -> None:
    """Three minutes away and back: the next probe closes the breaker and all slots are there."""
    pool = pool_of()
    while now() < 180:
        (await pool.acquire(tokens=1)).release([GONE])
    assert pool.snapshot()[0].state != "closed"
    (await pool.acquire(tokens=1)).release([answer()])
    assert pool.snapshot()[0].state == "closed"
    assert now() < 190


async def test_fault_018_flapping_makes_progress_each_time() -> None:
    """Up two seconds, down three, for five minutes: work goes on in each window of light."""
    pool = pool_of()
    done = 0
    while now() < 300:
        lease = await pool.acquire(tokens=1)
        await asyncio.sleep(0.01)
        up = now() % 5 < 2
        lease.release([answer() if up else GONE])
        done += up
    assert done > 1000


async def test_fault_050_broken_answers_open_the_breaker_too() -> None:
    """A dead engine behind a live port answers 500 to all: one request at a time may try it."""
    pool = pool_of(ScriptedBackend(max_in_flight=32))
    for lease in [await pool.acquire(tokens=1) for _ in range(32)]:
        lease.release([BROKEN])
    snapshot = pool.snapshot()[0]
    assert (snapshot.state, snapshot.binds) == ("open", "outage")
    assert "http_500" in snapshot.failure
    trial = await pool.acquire(tokens=1)
    second = asyncio.ensure_future(pool.acquire(tokens=1))
    await asyncio.sleep(30)
    assert not second.done()
    trial.release([answer()])
    await second


async def test_fault_058_work_moves_away_from_a_dead_replica_and_comes_back() -> None:
    """One of two endpoints dies: the other gets everything; when it is back, both share again."""
    good, bad = ScriptedBackend(name="good", max_in_flight=4), ScriptedBackend(name="bad")
    pool = pool_of(good, bad)

    async def one(dead: bool) -> str:
        lease = await pool.acquire(tokens=1)
        await asyncio.sleep(0.1)
        failed = dead and lease.backend is bad
        lease.release([GONE if failed else answer()])
        return "" if failed else lease.backend.name

    async def many(count: int, *, dead: bool) -> list[str]:
        return await asyncio.gather(*[one(dead) for _ in range(count)])

    began = now()
    done = await many(4000, dead=True)
    assert done.count("good") >= 3000
    assert done.count("good") / (now() - began) >= 0.95 * 4 / 0.1
    await asyncio.sleep(5)
    assert "bad" in await many(200, dead=False)


async def test_fault_058_a_slow_replica_gets_less() -> None:
    """Least in flight over limit: a replica four times as slow gets about a fifth of the work."""
    fast, slow = ScriptedBackend(max_in_flight=8), ScriptedBackend(name="slow", max_in_flight=8)
    pool = pool_of(fast, slow)
    counts = {"scripted": 0, "slow": 0}

    async def one() -> None:
        lease = await pool.acquire(tokens=1)
        await asyncio.sleep(0.4 if lease.backend is slow else 0.1)
        counts[lease.backend.name] += 1
        lease.release([answer()])

    await asyncio.gather(*[one() for _ in range(1000)])
    assert counts["slow"] == pytest.approx(200, abs=20)


async def test_weights_share_the_work() -> None:
    """Twice the weight, twice the requests in flight, while neither is full."""
    one, two = ScriptedBackend(name="one"), ScriptedBackend(name="two")
    pool = Pool([one, two], LimitSettings(), [EndpointLimits(), EndpointLimits(weight=2.0)])
    leases = [await pool.acquire(tokens=1) for _ in range(30)]
    assert sum(lease.backend is two for lease in leases) == 20


async def test_a_retry_avoids_the_endpoint_that_failed() -> None:
    """The other one gets it, though it is fuller; but a busy other is no reason to wait."""
    one, two = (
        ScriptedBackend(name="one", max_in_flight=8),
        ScriptedBackend(name="two", max_in_flight=2),
    )
    pool = pool_of(one, two)
    for _ in range(2):
        assert (await pool.acquire(tokens=1, retry=True, avoid=one)).backend is two
    assert (await pool.acquire(tokens=1, retry=True, avoid=one)).backend is one


class Replica(ScriptedBackend):
    """A scripted server with the gauges and identity that the pool watches."""

    def __init__(self, root: str = "r", **options: Any) -> None:
        super().__init__(**options)
        self.quota: dict[str, str] = {}
        self.heard_at_s = 0.0
        self.hung_after_s = 60.0
        self.identity = ("m", root, 4096)
        self.hung_up = 0

    def hang_up(self) -> None:
        self.hung_up += 1

    async def load(self) -> tuple[float, float, float] | None:
        return None


async def test_fault_059_replicas_with_different_weights_are_refused() -> None:
    """One name, two models: a run would mix them, so it does not start."""
    with pytest.raises(ConfigError, match="one run needs one model"):
        await Pool([Replica(), Replica(root="other", name="second")]).start()
    await Pool([Replica(), Replica(name="second")]).start()


async def test_one_endpoint_of_two_may_be_down_at_the_start() -> None:
    """The run starts on the other; with none at all it does not."""

    class Down(ScriptedBackend):
        async def start(self) -> None:
            raise UnavailableError("down: no answer")

    pool = pool_of(Down(name="down"), ScriptedBackend(name="up"))
    await pool.start()
    assert [s.state for s in pool.snapshot()] == ["open", "closed"]
    assert (await pool.acquire(tokens=1)).backend.name == "up"
    with pytest.raises(UnavailableError, match="no answer"):
        await pool_of(Down(), Down()).start()


async def test_fault_051_an_engine_that_hangs_behind_a_healthy_port() -> None:
    """Nothing heard for a minute with work in flight: out of service, and its calls hung up."""
    replica = Replica(name="hung", max_in_flight=4)
    pool = pool_of(replica)
    watching = asyncio.ensure_future(pool.run())
    await asyncio.sleep(500)  # idle is not hung
    assert replica.hung_up == 0
    lease = await pool.acquire(tokens=1)
    await asyncio.sleep(55)
    replica.heard_at_s = now()  # a token
    await asyncio.sleep(58)
    assert replica.hung_up == 0
    await asyncio.sleep(4)
    assert replica.hung_up == 1
    snapshot = pool.snapshot()[0]
    assert snapshot.state != "closed"
    assert "not generating" in snapshot.failure
    lease.release([BROKEN])
    watching.cancel()


async def test_paces_of_the_user_are_kept() -> None:
    """requests_per_min and tokens_per_min, whichever binds, and snapshot names it."""
    pool = pool_of(ScriptedBackend(max_in_flight=1000), requests_per_min=600, tokens_per_min=60_000)
    for _ in range(300):
        (await pool.acquire(tokens=50)).release([answer(25, 25)])
    assert now() == pytest.approx(30, abs=1.5)
    assert pool.snapshot()[0].binds in ("requests_per_min", "nothing")
    began = now()
    for _ in range(100):
        (await pool.acquire(tokens=1000)).release([answer(500, 500)])
    assert now() - began == pytest.approx(100, abs=3)


async def test_quota_headers_set_a_pace() -> None:
    """What real answers say about their limits is kept to without any refusal."""
    replica = Replica(max_in_flight=1000)
    pool = pool_of(replica)
    for i in range(100):
        lease = await pool.acquire(tokens=1)
        left = max(20 - i, 0) if i < 20 else 1
        replica.quota = {"limit-requests": "60", "remaining-requests": str(left)}
        lease.release([answer()])
    assert now() > 60


async def test_fault_115_the_run_stops_before_its_budget_is_passed() -> None:
    """Tokens and money are reserved before sending: eighty at once do not pass the cap together."""
    pool = pool_of(
        ScriptedBackend(max_in_flight=80),
        max_tokens_total=10_000, max_cost=0.05, prices=Prices(prompt=2, completion=6),
    )  # fmt: skip
    rng = random.Random(0)

    async def work() -> None:
        lease = await pool.acquire(tokens=400)
        await asyncio.sleep(rng.random())
        lease.release([BROKEN if rng.random() < 0.2 else answer(rng.randrange(200), 200)])

    results = await asyncio.gather(*[work() for _ in range(200)], return_exceptions=True)
    stopped = [r for r in results if isinstance(r, StoppedError)]
    assert stopped
    assert "--max-tokens-total" in str(stopped[0])
    assert 0.9 * 0.05 <= pool.cost <= 0.05 or 9_500 < pool.tokens_used <= 10_000
    assert pool.snapshot()[0].binds == "nothing"


async def test_an_unused_lease_costs_nothing() -> None:
    """Given back without a result: neither tokens nor a mark against the endpoint."""
    pool = pool_of(max_tokens_total=1000)
    for _ in range(20):
        (await pool.acquire(tokens=900)).release()
    assert pool.tokens_used == 0
    assert pool.snapshot()[0].state == "closed"


async def test_fault_105_the_wall_clock_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour forth or back on the wall changes no wait."""
    clock = iter([0.0, 1e9, -1e9] * 1000)
    monkeypatch.setattr("time.time", lambda: next(clock))
    pool = pool_of()
    (await pool.acquire(tokens=1)).release(
        [Verdict(kind="throttled", reason="http_429", retry_after_s=5.0)]
    )
    await pool.acquire(tokens=1)
    assert 5 < now() < 6


async def test_growth_needs_work() -> None:
    """A limit that is not used is not raised, however well all goes."""
    pool = pool_of(ScriptedBackend(max_in_flight=None))
    for _ in range(500):
        lease = await pool.acquire(tokens=1)
        await asyncio.sleep(0.1)
        lease.release([answer()])
    assert pool.limit <= 8


@pytest.mark.parametrize(
    ("running", "waiting", "preemptions", "grows"),
    [(4, 0, 0, True), (4, 4, 0, False), (4, 0, 3, False)],
)
async def test_fault_054_gauges_steer(
    running: float, waiting: float, preemptions: float, grows: bool
) -> None:
    """An empty queue invites growth at once; a queue or preemptions cut the limit."""
    controller = Adaptive()
    controller.observe(0.0, 0, 0, 0)
    for _ in range(4):
        controller.admit(0.0)
    controller.observe(1.0, running, waiting, preemptions)
    assert (controller.limit(10.0) > 4) == grows


async def test_fault_023_a_fixed_number_waits_longer_each_time_it_is_refused() -> None:
    """Bare refusals of everything: a few a second at first, one in half a minute later."""
    pool = pool_of(ScriptedBackend(max_in_flight=8))
    refused_at = []
    for _ in range(12):
        lease = await pool.acquire(tokens=1)
        refused_at.append(now())
        lease.release([REFUSED])
    waits = [later - sooner for sooner, later in pairwise(refused_at)]
    assert waits[0] == pytest.approx(0.25)
    assert all(a == pytest.approx(min(2 * b, 30.0)) for b, a in pairwise(waits))
