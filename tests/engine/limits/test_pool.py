"""The pool and its controllers, on virtual time: slots, turns, breakers, budgets, giving up."""

from __future__ import annotations

import asyncio
import heapq
import math
import random
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any

import pytest

from benchmarks.bench_limits import SCENARIOS, Scenario, Simulated, per_slot, scale_slots, simulate
from benchmarks.virtual_time import VirtualLoop, run
from engine.backends.base import Verdict
from engine.backends.scripted import ScriptedBackend
from engine.errors import ConfigError, StoppedError, UnavailableError
from engine.limits import EndpointLimits, LimitSettings, Pool
from engine.limits.adaptive import Adaptive
from engine.limits.controller import Fixed, Ticket
from engine.limits.pace import Pace
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
    with pytest.raises(StoppedError, match="asks to wait"):
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
        max_tokens_total=10_000, max_cost=0.05, price_per_million_prompt_tokens=2.0,
        price_per_million_completion_tokens=6.0,
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


@pytest.mark.parametrize("share", [0.05, 0.18])
def test_fault_021_refusals_by_chance_do_not_pause_a_fixed_number(share: float) -> None:
    """Requests refused at random with Retry-After: 1: 64 in flight keep nearly all their rate."""
    server = Simulated(slots=64, noise=share, noise_wait_s=1.0, latency_s=0.1)
    scenario = Scenario(name="", server=lambda: server, best=per_slot)
    outcome = run(simulate(scenario, partial(Fixed, 64)))
    assert server.by_chance > 1000
    assert outcome.reached >= 0.9


@pytest.mark.parametrize("share", [0.01, 0.05, 0.18])
@pytest.mark.parametrize("seed", [2, 4])
def test_refusals_by_chance_do_not_starve_a_run(share: float, seed: int) -> None:
    """200 slots, answers in half a second, and some requests refused at random with Retry-After: 1,
    from the first on: the limit never stays at a handful.
    """
    server = Simulated(slots=200, latency_s=0.5, noise=share, noise_wait_s=1.0)
    scenario = Scenario(name="", server=lambda: server, best=per_slot)
    assert run(simulate(scenario, Adaptive, seed)).reached >= 0.75


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


def test_fault_021_a_limit_is_tried_less_often_where_a_refusal_costs_a_pause() -> None:
    """A server of 40 slots, answers in 0.1 s, that asks for a second of silence beyond: the pauses
    take a twentieth of the time, and not most of it.
    """
    server = partial(Simulated, slots=40, latency_s=0.1, slots_wait_s=1.0)
    outcome = run(simulate(Scenario(name="", server=server, best=per_slot), Adaptive))
    assert outcome.reached >= 0.93
    assert outcome.refused <= 0.01


@pytest.mark.parametrize(
    ("server", "seed"),
    [
        ({"slots": 40, "latency_s": 0.1, "transit_s": 0.003, "slots_wait_s": 1.0}, 9),
        ({"slots": 40, "latency_s": 0.1, "transit_s": 0.003, "slots_wait_s": 1.0}, 27),
        ({"slots": 200, "latency_s": 1.0, "transit_s": 0.03}, 0),
    ],
)
def test_answers_on_their_way_do_not_blur_the_limit(server: dict[str, Any], seed: int) -> None:
    """A slot is free before its answer is here, so a few more are taken by chance: no sign of a
    clock, nor of a server that has grown, nor one that has shrunk.
    """
    simulated = partial(Simulated, **server, refusal_s=0.003)
    outcome = run(simulate(Scenario(name="", server=simulated, best=per_slot), Adaptive, seed))
    assert outcome.reached >= 0.95
    assert outcome.refused <= 0.01
    assert outcome.swing <= 0.15


@pytest.mark.parametrize("make", [Adaptive, partial(Fixed, 4)], ids=["auto", "fixed"])
def test_fault_021_a_long_wait_is_kept_by_all(make: Any) -> None:
    """One of four is refused with Retry-After: 7: nothing goes out before, chance or not."""
    controller = make()
    tickets = [controller.admit(0.0) for _ in range(4)]
    controller.refuse(tickets[0], 0.1, 7.0)
    controller.complete(tickets[1], 0.2, 100)
    assert not controller.has_room(7.0)
    assert controller.has_room(7.2)


def test_an_empty_queue_does_not_outweigh_refusals() -> None:
    """A server that refuses and also shows gauges is not tried again each second."""
    controller = Adaptive()
    for _ in range(4):
        ticket = controller.admit(0.0)
    while controller.limit(1.0) >= 4:
        controller.refuse(ticket, 0.5, 1.0)
        ticket = controller.admit(0.5)
    limit = controller.limit(2.0)
    for second in range(2, 20):
        controller.observe(float(second), running=3, waiting=0, preemptions=0)
    assert controller.limit(20.0) == limit


def test_a_server_with_gauges_that_refuses_is_tried_again() -> None:
    """40 slots, then 80, gauges that show no queue, Retry-After: 1: the new ones are found within
    half a minute.
    """

    class Watched(Simulated):
        async def load(self) -> tuple[float, float, float]:
            return float(self._running), 0.0, 0.0

    scenario = Scenario(
        name="", server=partial(Watched, slots=40, latency_s=0.1, slots_wait_s=1.0), best=per_slot,
        steps=((40.0, scale_slots(2)),), seconds=100,
    )  # fmt: skip
    outcome = run(simulate(scenario, Adaptive))
    assert outcome.reached >= 0.9
    assert outcome.recovery_s is not None
    assert outcome.recovery_s <= 32


QUICK_SCENARIOS = {
    "429 beyond 40": (0.95, 0.011),
    "429 beyond 100, then 400": (0.95, 0.01),
    "600 requests a minute, Retry-After": (0.95, 0.01),
    "vLLM 256 wide, and 5 % of 429 at random": (0.95, 0.0),
    "429 beyond 200, and 3 % at random": (0.95, 0.01),
    "vLLM 64 wide": (0.95, 0.0),
    "vLLM, room for 100, gauges": (0.95, 0.0),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, id=f"fault_054 {n}" if "vLLM" in n else n) for n in QUICK_SCENARIOS]
)
def test_the_limit_finds_itself(name: str) -> None:
    """A few scenarios of benchmarks/bench_limits.py: near the best, few refusals, no swinging."""
    (scenario,) = [s for s in SCENARIOS if s.name == name]
    outcome = run(simulate(scenario, Adaptive))
    reached, refused = QUICK_SCENARIOS[name]
    assert outcome.reached >= reached
    assert outcome.refused <= refused
    assert outcome.swing <= 0.15
    assert outcome.recovery_s is None or outcome.recovery_s <= 30


def test_the_pace_of_bare_refusals_costs_few_of_them() -> None:
    """6,000 a minute without Retry-After: under one in a hundred refused, the first minute too."""
    (scenario,) = [s for s in SCENARIOS if s.name == "6,000 requests a minute, bare 429"]
    outcomes = [run(simulate(scenario, Adaptive, seed)) for seed in (0, 1, 2)]
    assert fmean(outcome.refused for outcome in outcomes) <= 0.01
    assert max(outcome.refused_later for outcome in outcomes) <= 0.003
    assert min(outcome.reached for outcome in outcomes) >= 0.95


@pytest.mark.parametrize("latency_s", [0.3, 1.0, 5.0])
def test_a_slow_pace_is_found_with_a_handful_in_flight(latency_s: float) -> None:
    """300 a minute with Retry-After: neither starved nor refused again and again, though from one
    or two to two dozen in flight are enough.
    """
    server = partial(Simulated, bucket_per_min=300, latency_s=latency_s)
    outcome = run(simulate(Scenario(name="", server=server, best=lambda server: 5.0), Adaptive))
    assert outcome.reached >= 0.9
    assert outcome.refused_later <= 0.02


def test_a_pace_that_rises_fourfold_is_followed() -> None:
    """1,200 requests a minute, then 4,800: found within half a minute, with hardly a refusal."""

    def widen(server: Simulated) -> None:
        assert server._bucket is not None
        server._bucket.per_min *= 4
        server._bucket.burst *= 4

    def best(server: Simulated) -> float:
        assert server._bucket is not None
        return server._bucket.per_min / 60

    scenario = Scenario(
        name="", server=partial(Simulated, bucket_per_min=1200), best=best,
        steps=((90.0, widen),), seconds=180,
    )  # fmt: skip
    outcome = run(simulate(scenario, Adaptive))
    assert outcome.recovery_s is not None
    assert outcome.recovery_s <= 30
    assert outcome.refused <= 0.01


@pytest.mark.parametrize("seed", [0, 2])
def test_many_refusals_by_chance_are_no_pace(seed: int) -> None:
    """18 % at random without Retry-After: some follow four cuts, and a pace leads nowhere."""
    scenario = Scenario(name="", server=partial(Simulated, slots=200, noise=0.18), best=per_slot)
    assert run(simulate(scenario, Adaptive, seed)).reached >= 0.95


def test_a_limit_that_falls_to_a_quarter_is_no_pace() -> None:
    """400 slots, then 100, bare refusals: four cuts are needed, and all the same it is a number."""
    scenario = Scenario(
        name="", server=partial(Simulated, slots=400), best=per_slot,
        steps=((60.0, scale_slots(0.25)),), seconds=120,
    )  # fmt: skip
    outcome = run(simulate(scenario, Adaptive))
    assert outcome.recovery_s is not None
    assert outcome.recovery_s <= 20


def test_two_refusals_by_chance_at_the_start_are_no_limit() -> None:
    """Two of the first five are refused at random: not a minute with three in flight for that."""
    (scenario,) = [s for s in SCENARIOS if s.name == "vLLM 256 wide, and 5 % of 429 at random"]
    assert run(simulate(scenario, Adaptive, 11)).reached >= 0.93


@pytest.mark.parametrize("began_s", [0.0, 1e5])
def test_a_pace_is_what_is_taken_between_two_refusals(began_s: float) -> None:
    """Half as much as before, as the server had saved up; whatever the clock shows at the start."""
    pace = Pace()
    pace.sent(began_s)
    pace.learn(began_s + 10, accepted=200, latency_s=1.0)
    assert pace.per_s == pytest.approx(20, rel=0.02)
    assert began_s + 11 <= pace.next_s <= began_s + 15
    pace.learn(began_s + 12, accepted=220, latency_s=1.0)
    assert pace.per_s == pytest.approx(10, rel=0.02)


def test_a_lull_of_the_work_does_not_lower_the_limit() -> None:
    """64 slots that queue beyond, then for two minutes a tenth as many requests as there is room
    for: what comes back is less, and the server is as fast as before.
    """
    controller, now_s = Adaptive(), 0.0
    flying: list[tuple[float, int, Ticket]] = []  # a heap by the time of the end

    def serve(until_s: float, most: float) -> None:
        nonlocal now_s
        while now_s < until_s:
            while len(flying) < most and controller.has_room(now_s):
                ticket = controller.admit(now_s)
                took_s = random.uniform(0.8, 1.2) * max(1.0, len(flying) / 64)
                heapq.heappush(flying, (now_s + took_s, controller.in_flight, ticket))
            now_s, _, ticket = heapq.heappop(flying)
            controller.complete(ticket, now_s, 100)

    random.seed(0)
    serve(300.0, math.inf)
    usual = controller.limit(now_s)
    assert usual >= 48
    serve(420.0, usual / 10)
    assert controller.limit(now_s) >= 0.8 * usual


@pytest.mark.parametrize("seed", [0, 3])
def test_fault_054_a_server_that_loses_its_room_is_relieved_at_once(seed: int) -> None:
    """Half of the cache of a vLLM without gauges goes: 90 % of what is left to reach after a few
    seconds, though an answer takes a quarter of a minute by then.
    """
    (scenario,) = [s for s in SCENARIOS if s.name == "vLLM, room for 200, then 100"]
    outcome = run(simulate(scenario, Adaptive, seed))
    assert outcome.recovery_s is not None
    assert outcome.recovery_s <= 15
    assert outcome.reached >= 0.94
    assert outcome.swing <= 0.15


def test_fault_054_a_crowded_cache_is_filled_up_with_care() -> None:
    """Where gauges have shown too many once, more are added only after those before could show:
    else the limit overshoots each minute, and a sixth of the goodput goes.
    """
    (scenario,) = [s for s in SCENARIOS if s.name == "vLLM, room for 200, then 100, gauges"]
    outcome = run(simulate(scenario, Adaptive, 1))
    assert outcome.reached >= 0.96
    assert outcome.swing <= 0.14


def test_gauges_do_not_slow_the_start() -> None:
    """They are read once a second; answers in a tenth of that double the limit between."""
    controller, now_s = Adaptive(), 0.0
    controller.observe(now_s, running=0, waiting=0, preemptions=0)
    while now_s < 0.95:
        tickets = []
        while controller.has_room(now_s):
            tickets.append(controller.admit(now_s))
            now_s += 1e-4
        now_s += 0.1
        for ticket in tickets:
            controller.complete(ticket, now_s, 100)
    assert controller.limit(now_s + 1.0) >= 32


def test_chance_is_not_taken_for_another_server() -> None:
    """Few answers of uneven length do not make the limit fall back while the server is the same."""
    (scenario,) = [s for s in SCENARIOS if s.name == "vLLM 64 wide"]
    assert run(simulate(scenario, Adaptive, 4)).reached >= 0.97
