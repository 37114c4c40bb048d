"""What the pool costs a request, by the number of endpoints: slots, turns and limits alone, with
servers that answer at once.

Saturated: twice as many tasks as there are slots, so that each release wakes whoever waits. Roomy:
half as many, so that each request chooses among endpoints that all have room.

python -m benchmarks.bench_pool [--requests 40000]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

from engine.backends.scripted import ScriptedBackend
from engine.limits import LimitSettings, Pool
from engine.records import Completion, Usage

ENDPOINTS = (1, 4, 16, 64, 256)
IN_FLIGHT = 16
"""Of each endpoint."""
ANSWER = Completion(
    text="x", finish_reason="stop", usage=Usage(prompt_tokens=100, completion_tokens=100)
)


async def cpu_us(endpoints: int, requests: int, tasks: int) -> float:
    """CPU of one request, the loop's own turn for its task included."""
    backends = [ScriptedBackend(name=f"{number}") for number in range(endpoints)]
    pool = Pool(backends, LimitSettings(max_in_flight=IN_FLIGHT))
    left = requests

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            lease = await pool.acquire(tokens=1)
            await asyncio.sleep(0)
            lease.release([ANSWER])

    began = time.process_time()
    await asyncio.gather(*[work() for _ in range(tasks)])
    return (time.process_time() - began) / requests * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=40_000)
    requests = parser.parse_args().requests
    results = []
    for endpoints in ENDPOINTS:
        slots = endpoints * IN_FLIGHT
        row = {"endpoints": endpoints}
        for name, tasks in (("saturated", 2 * slots), ("roomy", slots // 2)):
            row[f"{name}_us"] = round(asyncio.run(cpu_us(endpoints, requests, tasks)), 1)
        results.append(row)
        print(f"{endpoints:4} endpoints: {row['saturated_us']:6} µs saturated,"
              f" {row['roomy_us']:6} µs roomy", flush=True)  # fmt: skip
    print(json.dumps({"pool": results}))


if __name__ == "__main__":
    main()
