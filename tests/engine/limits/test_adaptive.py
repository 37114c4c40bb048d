"""What ``--max-in-flight auto`` does before simulated servers, and the keeper of a given number."""

from __future__ import annotations

import heapq
import math
import random
from functools import partial
from statistics import fmean
from typing import Any

import pytest

from benchmarks.bench_limits import SCENARIOS, Scenario, Simulated, per_slot, scale_slots, simulate
from benchmarks.capacity import TokenBucket
from benchmarks.virtual_time import run
from engine.limits.controller import Fixed, Ticket
from engine.limits.finder.finder import Adaptive

pytestmark = pytest.mark.slow


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
    "600 requests a minute, Retry-After": (0.95, 0.02),
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


@pytest.mark.parametrize("latency_s", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_slow_clock_that_says_nothing_is_known_and_named(latency_s: float, seed: int) -> None:
    """300 a minute, bare 429: few are refused until the clock is known, and the run says what to
    set.
    """
    server = partial(Simulated, bucket_per_min=300, latency_s=latency_s, retry_after=False)
    made = []

    def make() -> Adaptive:
        made.append(Adaptive())
        return made[-1]

    scenario = Scenario(name="", server=server, best=lambda server: 5.0)
    outcome = run(simulate(scenario, make, seed))
    assert outcome.reached >= 0.95
    assert outcome.refused <= 0.05
    assert outcome.refused_later <= 0.01
    assert "set --requests-per-min" in made[0].history.why


def counted(per_min: float, *, saved_s: float, **more: Any) -> Simulated:
    """A server that takes ``per_min`` requests and saves up ``saved_s`` seconds' worth."""
    server = Simulated(bucket_per_min=per_min, **more)
    server._bucket = TokenBucket(per_min, burst=max(per_min / 60 * saved_s, 1))
    return server


@pytest.mark.parametrize("retry_after", [True, False], ids=["wait told", "bare"])
@pytest.mark.parametrize("per_min", [60, 120])
def test_a_clock_that_one_in_flight_outruns_is_known(per_min: int, retry_after: bool) -> None:
    """Answers in 0.3 s, so that fewer than one in flight are enough: no number explains that."""
    server = partial(counted, per_min, saved_s=10, latency_s=0.3, retry_after=retry_after)
    best = per_min / 60
    scenario = Scenario(name="", server=server, best=lambda server: best, seconds=600)
    at_60_s = run(simulate(scenario, Adaptive))
    assert at_60_s.reached >= 0.95
    assert at_60_s.refused_later <= 0.02


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
