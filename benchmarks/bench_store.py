"""What the run store costs: CPU a request, rows a second, the price of durability, time to a
restart.

    python -m benchmarks.bench_store [--requests 40000] [--stored 100000]

A request here is what the pipeline writes for one: its record before sending, its answer (1.1 kB of
text), and two decisions, one of them accepted with ten neighbours. Prompts, answers and decisions
are made beforehand, so that the CPU time is that of the store alone: callers, event loop, writer
thread, SQLite, checksums and system calls.

Durability is measured against ``synchronous = OFF`` in the same run, in turns, with as many
requests in flight as give 1,000 a second at the latency given. A restart is a process of its own:
SIGKILL while the run goes on, then a new process until it records its first new request, the index
of near-duplicates rebuilt.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import uvloop

from engine.records import Answer, Completion, Decision, Neighbour, Prompt, Record, Sampling, Usage
from engine.store import Manifest, RunStore

MANIFEST = Manifest(fixed={"benchmark": "store"}, engine_version="0")
TEXT = (
    "3. Instruction: Write a short story about the sea.\n3. Input:\n<noinput>\n3. Output:\nOnce "
    * 12
)
DECIDE_BATCH = 64


class Rows:
    """All that is written in one run of the benchmark."""

    def __init__(self, first: int, count: int, *, vectors: bool = False) -> None:
        sampling, usage = Sampling(max_tokens=300), Usage(prompt_tokens=900, completion_tokens=280)
        completion = Completion(text=TEXT, finish_reason="stop", usage=usage, model="toy")
        neighbours = {
            f"Describe the harbour of town number {i} at night": 0.05 * i for i in range(10)
        }
        self.indexes = range(first, first + count)
        self.prompts = [
            Prompt(index=i, text="", api="completions", sampling=sampling) for i in self.indexes
        ]
        self.answers = [
            Answer(
                index=i,
                demonstrations=("seed_1", "seed_2", "seed_3"),
                completion=completion,
                backend="http://127.0.0.1:8000",
            )
            for i in self.indexes
        ]
        self.decisions = [
            Decision(
                index=i,
                position=position,
                reason=None if position == 3 else "duplicate_rouge",
                record=Record(
                    instruction=f"Write story number {i}.{position} about the sea and its people",
                    input="",
                    output="Once upon a time there was a lighthouse " * 6,
                ),
                nearest=Neighbour(
                    text="Write a story about the sea", score=0.6, source="seed:seed_1"
                ),
                most_similar=neighbours if position == 3 else {},
                mean_similarity=0.11,
            )
            for i in self.indexes
            for position in (3, 4)
        ]
        vector = np.random.default_rng(0).standard_normal(384, dtype=np.float32)
        self.vectors: list[Any] = [
            vector if vectors and d.accepted else None for d in self.decisions
        ]


async def write(store: RunStore, rows: Rows, in_flight: int, latency_s: float = 0.0) -> None:
    """Write ``rows`` as the pipeline does: callers in flight, one consumer that decides behind
    them.
    """
    todo = iter(range(len(rows.prompts)))
    answered = 0
    enough = asyncio.Event()

    async def call() -> None:
        nonlocal answered
        for at in todo:
            await store.sent([rows.prompts[at]], "toy")
            if latency_s:
                # Answers differ in length; without that, all callers would move in one wave.
                await asyncio.sleep(latency_s * (0.5 + at * 0.618034 % 1))
            await store.answered([rows.answers[at]])
            answered += 1
            if answered % DECIDE_BATCH == 0 or answered == len(rows.prompts):
                enough.set()

    async def decide() -> None:
        done = 0
        while done < len(rows.prompts):
            batch = min(DECIDE_BATCH, len(rows.prompts) - done)
            while answered < done + batch:
                enough.clear()
                await enough.wait()
            part = slice(2 * done, 2 * (done + batch))
            await store.decided(rows.decisions[part], rows.vectors[part])
            done += batch

    await asyncio.gather(decide(), *(call() for _ in range(in_flight)))


async def cost(folder: Path, requests: int, in_flight: int, vectors: bool) -> dict[str, float]:
    """CPU of the store for one request, and rows a second through the writer."""
    rows = Rows(0, requests, vectors=vectors)
    store = RunStore.open(folder, MANIFEST)
    cpu, wall = time.process_time(), time.perf_counter()
    await write(store, rows, in_flight)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    counts = store.counts()
    await store.aclose()
    written = counts.sent + counts.answered + counts.decided + counts.vectors
    return {
        "cpu_us_per_request": cpu / requests * 1e6,
        "rows_per_s": written / wall,
        "requests_per_commit": requests / counts.commits,
        "bytes_per_request": (folder / "run.sqlite").stat().st_size / requests,
    }


async def durability(
    folder: Path, seconds: float, latency_s: float, turns: int
) -> dict[str, float]:
    """Requests a second with and without syncs, in turns; 1,000 a second in flight over
    ``latency_s``.
    """
    in_flight = round(1000 * latency_s)
    per_turn = round(1000 * seconds / turns)
    rate: dict[str, list[float]] = {"FULL": [], "OFF": []}
    for turn in range(turns):
        for mode in ("FULL", "OFF") if turn % 2 else ("OFF", "FULL"):
            store = RunStore.open(folder / f"{mode}{turn}", MANIFEST)
            store._writing.execute(f"PRAGMA synchronous = {mode}")
            rows = Rows(0, per_turn)
            began = time.perf_counter()
            await write(store, rows, in_flight, latency_s)
            rate[mode].append(per_turn / (time.perf_counter() - began))
            await store.aclose()
    full, off = (sorted(rate[mode])[turns // 2] for mode in ("FULL", "OFF"))
    return {"full_per_s": full, "off_per_s": off, "cost_percent": (1 - full / off) * 100}


def fill(folder: Path, requests: int) -> None:
    """A run of ``requests`` requests, one record accepted of each, as if its process had just been
    killed.
    """

    async def go() -> None:
        store = RunStore.open(folder, MANIFEST)
        for first in range(0, requests, 10_000):
            rows = Rows(first, min(10_000, requests - first))
            await store.sent(rows.prompts, "toy")
            await store.answered(rows.answers)
            await store.decided(rows.decisions)
        await store.sent([Rows(requests, 1).prompts[0]], "toy")
        os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(go())


async def first_request(folder: Path) -> None:
    """What a restart does in ``generate``, without the backend: the process started by ``restart``.

    The first request is recorded, and could go out, before the index is restored.
    """
    from engine.decide.decider import restore_cascade
    from engine.dedup.cascade import Cascade
    from engine.recipes.alpaca import Alpaca, Seeded

    began = time.perf_counter()
    store = RunStore.open(folder, MANIFEST)
    again = Rows(store.resume().in_flight[0].index, 1)
    await store.sent(again.prompts, "toy")
    sent = time.perf_counter()
    print(time.time(), flush=True)
    restore_cascade(Cascade(0.7), store, Alpaca(Seeded(tasks=[])))
    figures = {"open_and_send_s": sent - began, "index_s": time.perf_counter() - sent}
    await store.aclose()
    print(orjson.dumps(figures).decode())


def restart(folder: Path, stored: int) -> dict[str, float]:
    """Kill a run with ``stored`` answers, start again; seconds to the first new request, imports
    included.
    """
    argv = [sys.executable, "-m", "benchmarks.bench_store"]
    subprocess.run([*argv, "--fill", str(stored), "--folder", str(folder)], check=False)
    again = [*argv, "--first-request", "--folder", str(folder)]
    began = time.time()
    done = subprocess.run(again, check=True, capture_output=True)
    sent, figures = done.stdout.splitlines()
    return {"first_request_s": float(sent) - began, **orjson.loads(figures)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=40_000, help="for the cost of a request")
    parser.add_argument("--seconds", type=float, default=20, help="for durability, in all")
    parser.add_argument("--latency", type=float, default=0.5, help="seconds to an answer, there")
    parser.add_argument(
        "--stored", type=int, nargs="*", default=[100_000], help="answers, to restart"
    )
    parser.add_argument("--folder", type=Path, help="where to write [beside this file's project]")
    parser.add_argument("--fill", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--first-request", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.fill is not None:
        fill(args.folder, args.fill)
    elif args.first_request:
        uvloop.run(first_request(args.folder))
    else:
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Everything asked for, in a folder that is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="bench-store-", dir=args.folder))
    results: dict[str, dict[str, float]] = {}
    try:
        for in_flight, vectors in ((64, False), (256, False), (1000, False), (256, True)):
            name = f"cost, {in_flight} in flight{', vectors' if vectors else ''}"
            place = folder / f"cost{in_flight}{vectors}"
            results[name] = uvloop.run(cost(place, args.requests, in_flight, vectors))
            _show(name, results[name])
        if args.seconds:
            results["durability"] = uvloop.run(
                durability(folder / "durability", args.seconds, args.latency, turns=5)
            )
            _show("durability", results["durability"])
        for stored in args.stored:
            name = f"restart, {stored} stored"
            results[name] = restart(folder / f"restart{stored}", stored)
            _show(name, results[name])
    finally:
        shutil.rmtree(folder)
    print(orjson.dumps({"benchmark": "store", "results": results}).decode())


def _show(name: str, figures: dict[str, float]) -> None:
    print(
        f"{name:32}" + "  ".join(f"{key} {value:,.2f}" for key, value in figures.items()),
        flush=True,
    )


if __name__ == "__main__":
    main()
