"""How much faults cost: runs against the toxic server in real time.

    python -m benchmarks.bench_faults [--requests 30000]

The server of ``benchmarks.server`` is in the same process; an answer takes 0.1 s. What is mixed:
429 with and without Retry-After, 500, 503, cut streams, resets before and within the answer,
silence before and within it; and one request in a thousand each comes to a page in HTML, a 403, a
404 and an answer that cannot be decoded.

* Whole runs against a host that tells no context length, ``auto``, before a server that refuses
  beyond 100, and a fixed 64: the time from the first answer to the last, without faults, with 20
  and with 50 % of requests failing; each row must be delivered exactly once. The last hundredth is
  a time of its own: it is that of rows which failed several times in a row.
* Without sampling and store, as is the next: two endpoints of 32 slots, one killed, then one hung
  behind a healthy port: the rate of the other once that is known, against its rate alone.
* ``auto`` before a server that refuses beyond 40, then beyond 80, then 40, after a minute each. Its
  rate is set against the best of constant numbers in flight, measured before: that of the slots.

The client's time-outs are short here (0.6 s to the first byte, 0.3 s within a stream, 1 s in all),
as otherwise the time of a run would be that of its last silence.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import uvloop

from benchmarks.bench_client import raise_open_files
from benchmarks.server import ODD_FAULTS, Behaviour, Server
from engine.backends.openai.backend import HttpBackend
from engine.backends.openai.listening import Timeouts
from engine.limits import Lease, LimitSettings, Pool
from engine.records import Completion, Prompt, Sampling
from engine.run.deliver import Delivery, RetryPolicy, deliver
from engine.run.display import SilentDisplay
from engine.run.generate import generate
from engine.settings import RunConfig
from engine.store import RunStore

MIXED = ("429", "429_bare", "500", "503", "cut", "reset", "reset_midway", "hang", "stall")
LATENCY_S = 0.1
SLOTS = 100
"""Without a limit of the server's, ``auto`` would find that of this one process."""
TIMEOUTS = Timeouts(first_token_s=0.6, idle_s=0.3, total_s=1.0)
SAMPLING = Sampling(max_tokens=512, stop=("\n20",))
InFlight = int | Literal["auto"]


class Client:
    """A pool over servers, kept busy; counts what it delivers."""

    def __init__(self, servers: Sequence[Server], in_flight: InFlight) -> None:
        backends = [HttpBackend(server.url, timeouts=TIMEOUTS) for server in servers]
        self.pool = Pool(backends, LimitSettings(max_in_flight=in_flight))
        self.rows: Counter[int] = Counter()
        self.failed = 0
        self.at_s: list[float] = []

    async def ask(self, number: int, lease: Lease) -> None:
        text = f"{number}. Write something.\n###\n4. Instruction:"
        prompt = Prompt(index=number, text=text, api="completions", sampling=SAMPLING)
        policy = RetryPolicy(max_attempts=20)
        done: list[Delivery] = await deliver(
            [prompt], self.pool, policy, lease, lambda prompt, verdict: None
        )
        if isinstance(done[0].outcome, Completion):
            self.rows[number] += 1
            self.at_s.append(time.perf_counter())
        else:
            self.failed += 1

    async def work(self, requests: int | None, seconds: float = 1e9) -> float:
        """So many requests, or for so long; the seconds it took."""
        began = time.perf_counter()
        await self.pool.start()
        number = 0
        watching = asyncio.ensure_future(self.pool.run())
        async with asyncio.TaskGroup() as group:
            while number != requests and time.perf_counter() - began < seconds:
                lease = await self.pool.acquire(tokens=1000)
                group.create_task(self.ask(number, lease))
                number += 1
                await asyncio.sleep(0)
        watching.cancel()
        await self.pool.aclose()
        return time.perf_counter() - began

    def rate(self, since_s: float, until_s: float) -> float:
        """Answers a second between two times of ``perf_counter``."""
        return sum(since_s <= at_s < until_s for at_s in self.at_s) / (until_s - since_s)


async def mixed(requests: int, in_flight: InFlight, fault_rate: float) -> dict[str, Any]:
    """A whole run against a host that tells no context length."""
    behaviour = Behaviour(
        latency_s=LATENCY_S,
        owned_by="somebody",
        tells_length=False,
        fault_rate=fault_rate,
        faults=MIXED,
        odd_every=1000 if fault_rate else None,
        slots=SLOTS if in_flight == "auto" else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        async with Server(behaviour) as server:
            config = RunConfig.model_validate(
                {
                    "base_url": (server.url,),
                    "max_in_flight": in_flight,
                    "target": 100 * requests,
                    "max_requests": requests,
                    "max_attempts": 20,
                    "semantic": False,
                    "out": Path(folder) / "run",
                    "first_token_s": TIMEOUTS.first_token_s,
                    "idle_s": TIMEOUTS.idle_s,
                    "attempt_s": TIMEOUTS.total_s,
                }
            )
            result = await generate(config, SilentDisplay())
            statuses, odd = server.ledger.statuses, server.ledger.faults
        with RunStore.read(config.out) as store:
            kept = [(answer.index, at_s) for answer, at_s in store.all_answers()]
    failed = result.progress.failed
    indexes = Counter(index for index, _ in kept)
    at_s = sorted(at_s for _, at_s in kept)
    return {
        "in_flight": in_flight,
        "fault_rate": fault_rate,
        "seconds": round(at_s[-1] - at_s[0], 2),
        "seconds_to_99_percent": round(at_s[int(0.99 * len(at_s))] - at_s[0], 2),
        "delivered": len(indexes) - failed,
        "twice": sum(n - 1 for n in indexes.values()),
        "failed": failed,
        "refused": statuses[429],
        "odd": {fault: odd[fault] for fault in ODD_FAULTS},
    }


async def two_endpoints(fate: str) -> dict[str, Any]:
    """Eight seconds on two endpoints; after two, one is killed or hangs."""
    behaviour = Behaviour(latency_s=LATENCY_S)
    async with Server(behaviour) as alone:
        client = Client([alone], 32)
        began = time.perf_counter()
        await client.work(None, 4.0)
        usual = client.rate(began + 1, began + 4)
    async with Server(behaviour) as good, Server(behaviour) as bad:
        client = Client([good, bad], 32)
        began = time.perf_counter()
        work = asyncio.ensure_future(client.work(None, 12.0))
        await asyncio.sleep(2.0)
        if fate == "killed":
            await bad.stop()
        else:
            bad.behaviour = replace(behaviour, fault_rate=1.0, faults=("hang",))
        await work
        rate = client.rate(began + 5, began + 12)
    return {
        "other": fate,
        "alone_per_s": round(usual, 1),
        "per_s": round(rate, 1),
        "share": round(rate / usual, 3),
        "failed": client.failed,
    }


async def best_rate(slots: int, seconds: float) -> float:
    """Answers a second with as many in flight as the server has slots."""
    async with Server(Behaviour(latency_s=LATENCY_S, slots=slots)) as server:
        client = Client([server], slots)
        began = time.perf_counter()
        await client.work(None, seconds)
        return client.rate(began + 1, began + seconds)


async def controller(seconds: float) -> list[dict[str, Any]]:
    """The controller in real time: the slots of the server change, and are found again."""
    slots = (40, 80, 40)
    bests = {count: await best_rate(count, seconds / 4) for count in set(slots)}
    results = []
    behaviour = Behaviour(latency_s=LATENCY_S, slots=slots[0])
    async with Server(behaviour) as server:
        client = Client([server], "auto")
        work = asyncio.ensure_future(client.work(None, seconds * len(slots)))
        for count in slots:
            server.behaviour = replace(behaviour, slots=count)
            refused, began = server.ledger.statuses[429], time.perf_counter()
            await asyncio.sleep(seconds)
            until, best = time.perf_counter(), bests[count]
            answers = sum(at_s >= began for at_s in client.at_s)
            refused = server.ledger.statuses[429] - refused
            recovery = next(
                (
                    at_s
                    for at_s in range(int(seconds) - 2)
                    if client.rate(began + at_s, began + at_s + 2) >= 0.9 * best
                ),
                None,
            )
            results.append(
                {
                    "slots": count,
                    "best_per_s": round(best, 1),
                    "reached": round(client.rate(until - seconds / 2, until) / best, 3),
                    "refused": round(refused / max(answers + refused, 1), 4),
                    "recovery_s": recovery,
                }
            )
        await work
    return results


async def measure(requests: int, seconds: float, only: str | None) -> dict[str, Any]:
    rows = []
    choices: tuple[InFlight, ...] = ("auto", 64) if only in (None, "mixed") else ()
    for in_flight in choices:
        usual = None
        for fault_rate in (0.0, 0.2, 0.5):
            row = await mixed(requests, in_flight, fault_rate)
            usual = usual or row["seconds"]
            row["times"] = round(row["seconds"] / usual, 2)
            rows.append(row)
            print(
                f"{in_flight:>5} in flight, {fault_rate:4.0%} faults: {row['seconds']:6.1f} s, "
                f"{row['times']:5.2f} times, "
                f"99 % after {row['seconds_to_99_percent']:.1f} s, {row['delivered']} delivered, "
                f"{row['twice']} twice",
                flush=True,
            )
    fates = ("killed", "hung") if only in (None, "endpoints") else ()
    endpoints = [await two_endpoints(fate) for fate in fates]
    for two in endpoints:
        print(f"two endpoints, one {two['other']}: {two['share']:.1%} of the other's rate alone")
    levels = await controller(seconds) if only in (None, "controller") else []
    for level in levels:
        print(
            f"refuses beyond {level['slots']}: {level['reached']:.1%} of {level['best_per_s']:.0f} "
            f"answers/s reached, "
            f"{level['refused']:.2%} refused, 90 % after {level['recovery_s']} s"
        )
    return {"bench": "faults", "mixed": rows, "two_endpoints": endpoints, "controller": levels}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=30_000)
    parser.add_argument("--only", choices=("mixed", "endpoints", "controller"), help="one part")
    parser.add_argument("--seconds", type=float, default=60.0, help="at each level of slots")
    args = parser.parse_args()
    raise_open_files()
    print(json.dumps(uvloop.run(measure(args.requests, args.seconds, args.only))))


if __name__ == "__main__":
    main()
