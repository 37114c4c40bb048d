"""How well a limit is found: scenarios on virtual time, ours beside two policies of peers.

    python -m benchmarks.bench_limits [--only NAME] [--seeds 5] [--trace]

The whole pool runs (``engine.limits``), with simulated servers behind it and the clock of
``benchmarks.virtual_time``, so two minutes of 2,000 requests in flight take seconds. ``reached`` is
goodput after the first minute against the best that any constant concurrency or pace could do;
``429`` the share of requests refused in the whole scenario, without those refused by chance,
``later`` in the same without its first minute;
``recovery`` the time from the step until goodput is at 90 % of the new best and stays there for
five seconds; ``swing`` the largest distance of a ten-second mean from the mean of the steady part.
Every scenario runs with several seeds: each figure is the mean, and the worst after the slash.

The peers' policies are ours after their descriptions: DataDesigner's cuts its concurrency by a
quarter at a 429, not below one, and adds one after a window of successes up to a configured most
(here 256); curator's keeps a configured number in flight (here 256).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.capacity import Batching, TokenBucket
from benchmarks.virtual_time import run
from engine.backends.base import Failure, Verdict
from engine.limits import Lease, LimitSettings, Pool
from engine.limits.controller import Controller, Ticket
from engine.limits.finder.finder import Adaptive
from engine.limits.history import History, Witness
from engine.records import Completion, Prompt, Sampling, Usage
from engine.run.deliver import Delivery, RetryPolicy, deliver

PROMPT_TOKENS = 700
REFUSAL_S = 0.03
"""From a request to its 429, on the whole."""


class Simulated:
    """A backend made of a capacity model; ``engine.backends.base.Backend``, watched or not."""

    def __init__(
        self,
        *,
        slots: int | None = None,
        slots_wait_s: float | None = None,
        latency_s: float = 1.0,
        bucket_per_min: float | None = None,
        retry_after: bool = True,
        batching: Batching | None = None,
        gauges: bool = False,
        noise: float = 0.0,
        noise_wait_s: float | None = None,
        transit_s: float = 0.0,
        refusal_s: float = REFUSAL_S,
        mean_tokens: int = 150,
    ) -> None:
        self.name = self.model = "simulated"
        self.context_length: int | None = 4096
        self.max_in_flight: int | None = None
        self.quota: dict[str, str] = {}
        self.heard_at_s = 0.0
        self.hung_after_s = 1e9
        self.identity = None
        self.slots = slots
        self.slots_wait_s = slots_wait_s
        self.latency_s = latency_s
        self.batching = batching
        self.transit_s = transit_s
        self.mean_tokens = mean_tokens
        self.refused_at_s: list[float] = []
        self.by_chance = 0
        self.answered: list[tuple[float, int]] = []
        self._gauges = gauges
        self._retry_after = retry_after
        self._noise = noise
        self._noise_wait_s = noise_wait_s
        self._refusal_s = refusal_s
        self._running = 0
        self._bucket = (
            TokenBucket(bucket_per_min, burst=bucket_per_min / 6) if bucket_per_min else None
        )
        self._rng = random.Random()

    def seed(self, seed: int) -> None:
        self._rng.seed(seed)

    async def start(self) -> None:
        """Nothing to load."""

    async def complete(self, prompts: Sequence[Prompt]) -> list[Completion | BaseException]:
        loop = asyncio.get_running_loop()
        if self._noise and self._rng.random() < self._noise:
            await self._refuse(self._noise_wait_s, by_chance=True)
        if self.slots is not None and self._running >= self.slots:
            await self._refuse(self.slots_wait_s)
        if self._bucket is not None and not self._bucket.take(1):
            await self._refuse(self._bucket.wait_s(1) if self._retry_after else None)
        tokens = max(int(self._rng.lognormvariate(0, 0.35) * self.mean_tokens), 1)
        self._running += 1
        try:
            if self.batching is not None:
                done = loop.create_future()
                self.batching.submit(tokens, PROMPT_TOKENS, lambda: done.set_result(None))
                await done
            else:
                await asyncio.sleep(self.latency_s * self._rng.lognormvariate(0, 0.2))
        finally:
            self._running -= 1
        if self.transit_s:  # the slot is free before the client knows
            await asyncio.sleep(self.transit_s * self._rng.lognormvariate(0, 1.0))
        self.answered.append((loop.time(), tokens))
        usage = Usage(prompt_tokens=PROMPT_TOKENS, completion_tokens=tokens)
        return [Completion(text="", finish_reason="stop", usage=usage)]

    async def _refuse(self, retry_after_s: float | None, *, by_chance: bool = False) -> None:
        if by_chance:
            self.by_chance += 1
        else:
            self.refused_at_s.append(asyncio.get_running_loop().time())
        await asyncio.sleep(self._refusal_s)
        raise Failure(Verdict(kind="throttled", reason="http_429", retry_after_s=retry_after_s))

    async def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        return None

    def hang_up(self) -> None:
        """Never hangs."""

    async def load(self) -> tuple[float, float, float] | None:
        engine = self.batching
        if not self._gauges or engine is None:
            return None
        return float(engine.running), float(engine.waiting), engine.preemptions

    async def aclose(self) -> None:
        """Nothing to release."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A server, what happens to it, and the best answers or tokens a second at each time."""

    name: str
    server: Callable[[], Simulated]
    best: Callable[[Simulated], float]
    steps: tuple[tuple[float, Callable[[Simulated], None]], ...] = ()
    seconds: float = 120.0
    in_tokens: bool = False


@dataclass(kw_only=True)
class Outcome:
    reached: float
    refused: float
    refused_later: float
    recovery_s: float | None
    swing: float
    limits: list[float] = field(default_factory=list)


class AimdOnRefusals:
    """After DataDesigner's description: AIMD on 429 alone, below a configured most."""

    def __init__(self, most: int = 256) -> None:
        self.paused_until_s = 0.0
        self.history = History(Witness.SETTINGS, "")
        self._most = most
        self._limit = float(most)
        self._in_flight = 0
        self._successes = 0
        self._cut_at_s = -1.0

    def limit(self, now_s: float) -> float:
        return self._limit

    def has_room(self, now_s: float) -> bool:
        return now_s >= self.paused_until_s and self._in_flight + 1 <= self._limit

    def next_change_s(self, now_s: float) -> float | None:
        return self.paused_until_s if now_s < self.paused_until_s else None

    def admit(self, now_s: float) -> Ticket:
        self._in_flight += 1
        return Ticket(now_s, 0.0, self._in_flight)

    def fail(self, now_s: float) -> None:
        self._in_flight -= 1

    def complete(self, ticket: Ticket, now_s: float, tokens: int) -> None:
        self._in_flight -= 1
        self._successes += 1
        if self._successes >= 25:
            self._successes = 0
            self._limit = min(self._limit + 1, self._most)

    def refuse(self, ticket: Ticket, now_s: float, retry_after_s: float | None) -> None:
        self._in_flight -= 1
        self.paused_until_s = max(self.paused_until_s, now_s + (retry_after_s or 2.0))
        if ticket.at_s > self._cut_at_s:
            self._cut_at_s, self._successes = now_s, 0
            self._limit = max(self._limit * 0.75, 1.0)

    def observe(self, now_s: float, running: float, waiting: float, preemptions: float) -> None:
        """It does not look."""


class Fixed(AimdOnRefusals):
    """After curator's description: a configured number, and a pause after a 429."""

    def refuse(self, ticket: Ticket, now_s: float, retry_after_s: float | None) -> None:
        self._in_flight -= 1
        self.paused_until_s = max(self.paused_until_s, now_s + (retry_after_s or 1.0))


POLICIES: dict[str, Callable[[], Controller]] = {
    "woolmill auto": Adaptive,
    "AIMD on 429 (DataDesigner)": AimdOnRefusals,
    "fixed 256 (curator)": Fixed,
}


def per_slot(server: Simulated) -> float:
    assert server.slots is not None
    # The means of the log-normal factors.
    return server.slots / (server.latency_s * 1.02 + server.transit_s * 1.65)


def per_engine(server: Simulated) -> float:
    assert server.batching is not None
    return server.batching.best_tokens_per_s(server.mean_tokens * 1.06, PROMPT_TOKENS)


def slots(count: int) -> Callable[[], Simulated]:
    return lambda: Simulated(slots=count)


def scale_slots(factor: float) -> Callable[[Simulated], None]:
    def step(server: Simulated) -> None:
        assert server.slots is not None
        server.slots = round(server.slots * factor)

    return step


def scale_engine(factor: float) -> Callable[[Simulated], None]:
    def step(server: Simulated) -> None:
        assert server.batching is not None
        server.batching.rescale(factor)

    return step


def engine(
    *,
    width: int = 256,
    kv_tokens: int | None = None,
    gauges: bool = False,
    noise: float = 0.0,
) -> Callable[[], Simulated]:
    return lambda: Simulated(
        batching=Batching(
            step_s=0.015, per_sequence_s=0.0001, max_num_seqs=width, kv_tokens=kv_tokens
        ),
        gauges=gauges,
        noise=noise,
        noise_wait_s=1.0,
    )


SCENARIOS = (
    Scenario(name="429 beyond 4", server=slots(4), best=per_slot),
    Scenario(name="429 beyond 40", server=slots(40), best=per_slot),
    Scenario(
        name="429 beyond 40, Retry-After: 1", best=per_slot,
        server=lambda: Simulated(slots=40, slots_wait_s=1.0, latency_s=0.1),
    ),
    Scenario(
        name="the same, answers 3 ms on their way", best=per_slot,
        server=lambda: Simulated(
            slots=40, slots_wait_s=1.0, latency_s=0.1, transit_s=0.003, refusal_s=0.003
        ),
    ),
    Scenario(name="429 beyond 400", server=slots(400), best=per_slot),
    Scenario(name="429 beyond 2000", server=slots(2000), best=per_slot),
    Scenario(
        name="429 beyond 200, then 100", server=slots(200), best=per_slot,
        steps=((90.0, scale_slots(0.5)),), seconds=180,
    ),
    Scenario(
        name="429 beyond 100, then 400", server=slots(100), best=per_slot,
        steps=((90.0, scale_slots(4)),), seconds=180,
    ),
    Scenario(
        name="429 flapping 200/100 every 20 s", server=slots(200), best=per_slot, seconds=180,
        steps=tuple((20.0 * i, scale_slots(0.5 if i % 2 else 2.0)) for i in range(1, 9)),
    ),
    Scenario(
        name="600 requests a minute, Retry-After", server=lambda: Simulated(bucket_per_min=600),
        best=lambda server: 10.0,
    ),
    Scenario(
        name="6,000 requests a minute, bare 429",
        server=lambda: Simulated(bucket_per_min=6000, retry_after=False), best=lambda server: 100.0,
    ),
    Scenario(
        name="60 requests a minute, Retry-After", best=lambda server: 1.0, seconds=600,
        server=lambda: Simulated(bucket_per_min=60, latency_s=0.3),
    ),
    Scenario(
        name="120 requests a minute, bare 429", best=lambda server: 2.0, seconds=600,
        server=lambda: Simulated(bucket_per_min=120, latency_s=0.3, retry_after=False),
    ),
    Scenario(
        name="429 beyond 200, and 3 % at random", server=lambda: Simulated(slots=200, noise=0.03),
        best=per_slot,
    ),
    Scenario(
        name="vLLM 256 wide, and 5 % of 429 at random", best=per_engine, in_tokens=True,
        server=engine(noise=0.05),
    ),
    Scenario(name="vLLM 64 wide", server=engine(width=64), best=per_engine, in_tokens=True),
    Scenario(name="vLLM 256 wide", server=engine(), best=per_engine, in_tokens=True),
    Scenario(
        name="vLLM 256 wide, gauges", server=engine(gauges=True), best=per_engine, in_tokens=True,
    ),
    Scenario(
        name="vLLM, room for 100 in its cache", server=engine(kv_tokens=78_000), best=per_engine,
        in_tokens=True,
    ),
    Scenario(
        name="vLLM, room for 100, gauges", server=engine(kv_tokens=78_000, gauges=True),
        best=per_engine, in_tokens=True,
    ),
    Scenario(
        name="vLLM, room for 200, then 100", server=engine(kv_tokens=156_000), best=per_engine,
        in_tokens=True, steps=((90.0, scale_engine(0.5)),), seconds=180,
    ),
    Scenario(
        name="vLLM, room for 200, then 100, gauges",
        server=engine(kv_tokens=156_000, gauges=True), best=per_engine,
        in_tokens=True, steps=((90.0, scale_engine(0.5)),), seconds=240,
    ),
    Scenario(
        name="vLLM 64 wide, then 256, gauges", server=engine(width=64, gauges=True),
        best=per_engine, in_tokens=True, steps=((90.0, scale_engine(4)),), seconds=180,
    ),
)  # fmt: skip


async def simulate(scenario: Scenario, policy: Callable[[], Controller], seed: int = 0) -> Outcome:
    """Keep the pool busy for the scenario's time, and measure."""
    loop = asyncio.get_running_loop()
    random.seed(seed)
    server = scenario.server()
    server.seed(seed)
    pool = Pool([server], LimitSettings(), controller=policy)
    bests: list[float] = []
    limits: list[float] = []

    async def call(index: int, lease: Lease) -> list[Delivery]:
        prompt = Prompt(index=index, text="", api="completions", sampling=Sampling(max_tokens=512))
        return await deliver([prompt], pool, RetryPolicy(), lease, lambda prompt, verdict: None)

    async def observe() -> None:
        while True:
            bests.append(scenario.best(server))
            limits.append(pool.limit)
            await asyncio.sleep(1.0)

    tasks: set[asyncio.Future[Any]] = {
        asyncio.ensure_future(observe()),
        asyncio.ensure_future(pool.run()),
    }
    for at_s, step in scenario.steps:
        loop.call_at(at_s, step, server)
    index = 0
    try:
        async with asyncio.timeout_at(scenario.seconds):
            while True:
                lease = await pool.acquire(tokens=PROMPT_TOKENS + 512)
                delivery = asyncio.ensure_future(call(index, lease))
                tasks.add(delivery)
                delivery.add_done_callback(tasks.discard)
                index += 1
                await asyncio.sleep(0)
    except TimeoutError:
        pass
    left = list(tasks)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    return _measure(scenario, server, bests, limits)


def _refused(server: Simulated, since_s: float) -> float:
    refused = sum(at_s >= since_s for at_s in server.refused_at_s)
    answered = sum(at_s >= since_s for at_s, _ in server.answered)
    return refused / max(refused + answered, 1)


def _measure(
    scenario: Scenario, server: Simulated, bests: list[float], limits: list[float]
) -> Outcome:
    seconds = int(scenario.seconds)
    made = [0.0] * seconds
    for at_s, tokens in server.answered:
        if at_s < seconds:
            made[int(at_s)] += tokens if scenario.in_tokens else 1
    share = [m / b for m, b in zip(made, bests, strict=False)]
    step_s = max((int(at_s) for at_s, _ in scenario.steps), default=0)
    steady = range(step_s + 45 if step_s else 60, seconds)
    if len(scenario.steps) > 1:
        steady = range(60, seconds)
    reached = statistics.fmean(share[i] for i in steady)
    tens = [statistics.fmean(share[i : i + 10]) for i in steady if i + 10 <= seconds]
    recovery = None
    if len(scenario.steps) == 1:
        recovery = next(
            (
                float(i - step_s)
                for i in range(step_s + 1, seconds - 5)
                if statistics.fmean(share[i : i + 5]) >= 0.9
            ),
            float("inf"),
        )
    return Outcome(
        reached=reached,
        refused=_refused(server, 0.0),
        refused_later=_refused(server, 60.0),
        recovery_s=recovery,
        swing=max(abs(ten - reached) / reached for ten in tens),
        limits=limits,
    )


def simulated(task: tuple[int, str, int]) -> Outcome:
    """One run, in a process of its own: scenario by index, policy by name, seed."""
    index, policy, seed = task
    return run(simulate(SCENARIOS[index], POLICIES[policy], seed))


def _show(values: list[float], percent: str, *, highest: bool = True) -> str:
    """Mean, and the worst after a slash."""
    worst = max(values) if highest else min(values)
    return f"{statistics.fmean(values):{percent}} / {worst:{percent}}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ours", action="store_true", help="leave out the peers' policies")
    parser.add_argument("--trace", action="store_true", help="show the limit every five seconds")
    args = parser.parse_args()
    wanted = [
        (index, policy)
        for index, scenario in enumerate(SCENARIOS)
        for policy in POLICIES
        if args.only in scenario.name and not (args.ours and POLICIES[policy] is not Adaptive)
    ]
    results = []
    print(
        f"{'scenario':40} {'policy':28} {'reached':>17} {'429':>15} {'later':>15} "
        f"{'recovery':>15} {'swing':>17}"
    )
    with multiprocessing.Pool() as processes:
        tasks = [(index, policy, seed) for index, policy in wanted for seed in range(args.seeds)]
        outcomes = processes.imap(simulated, tasks)
        for index, policy in wanted:
            runs = [next(outcomes) for _ in range(args.seeds)]
            recoveries = [one.recovery_s for one in runs if one.recovery_s is not None]
            print(
                f"{SCENARIOS[index].name:40} {policy:28} "
                f"{_show([one.reached for one in runs], '6.1%', highest=False):>17} "
                f"{_show([one.refused for one in runs], '6.2%'):>15} "
                f"{_show([one.refused_later for one in runs], '6.2%'):>15} "
                f"{_show(recoveries, '.0f') + ' s' if recoveries else '':>15} "
                f"{_show([one.swing for one in runs], '6.1%'):>17}",
                flush=True,
            )
            if args.trace:
                for one in runs:
                    print("   ", " ".join(f"{limit:.0f}" for limit in one.limits[::5]))
            results.append(
                {
                    "scenario": SCENARIOS[index].name,
                    "policy": policy,
                    "reached": [round(one.reached, 4) for one in runs],
                    "refused": [round(one.refused, 5) for one in runs],
                    "refused_later": [round(one.refused_later, 5) for one in runs],
                    "recovery_s": recoveries,
                    "swing": [round(one.swing, 4) for one in runs],
                }
            )
    print(json.dumps({"bench": "limits", "seeds": args.seeds, "results": results}))


if __name__ == "__main__":
    main()
