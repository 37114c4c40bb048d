"""Whether ``--max-in-flight auto`` finds what a real vLLM server can do.

    python -m benchmarks.bench_vllm_limits --vllm-python .venv-vllm/bin/python

A vLLM server on this machine (on the CPU where there is no GPU), the small embedded model, prompts
of some 60 tokens, answers of ``--tokens`` in the mean, from half to one and a half times as many:
answers of one length come in waves, and a wave more or less in the time decides. Each fixed
concurrency and ``auto`` is kept busy for ``--seconds``; output tokens per second are those of
answers after the first quarter, which is left out as the time in which a limit is found and the
server fills.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any, Literal

import uvloop

from engine import models
from engine.backends.openai.backend import HttpBackend
from engine.backends.vllm.servers import serving
from engine.limits import Lease, LimitSettings, Pool
from engine.records import Completion, Prompt, Sampling
from engine.run.deliver import RetryPolicy, deliver

MODEL = "smollm2"
TEXT = "Come up with a task that nobody has thought of, then explain it in plain words. " * 3
GOLDEN = 0.618034
"""Multiples of it, without their whole part, lie evenly between 0 and 1."""


async def tokens_per_s(
    url: str, in_flight: int | Literal["auto"], tokens: int, seconds: float
) -> dict[str, Any]:
    pool = Pool([HttpBackend(url)], LimitSettings(max_in_flight=in_flight))
    await pool.start()
    made: list[tuple[float, int]] = []
    limits: list[int] = []

    async def ask(number: int, lease: Lease) -> None:
        length = round(tokens * (0.5 + number * GOLDEN % 1))
        sampling = Sampling(max_tokens=length, temperature=1.0, forbid_eos=True)
        prompt = Prompt(
            index=number, text=f"{number}. {TEXT}", api="completions", sampling=sampling
        )
        (done,) = await deliver([prompt], pool, RetryPolicy(), lease, lambda prompt, verdict: None)
        if isinstance(done.outcome, Completion):
            made.append((time.perf_counter(), done.outcome.usage.completion_tokens))
            limits.append(pool.limit)

    began = time.perf_counter()
    watching = asyncio.ensure_future(pool.run())
    number = 0
    async with asyncio.TaskGroup() as group:
        while time.perf_counter() - began < seconds:
            lease = await pool.acquire(tokens=2 * tokens + 200)
            group.create_task(ask(number, lease))
            number += 1
    watching.cancel()
    await pool.aclose()
    counted = [n for at_s, n in made if seconds / 4 <= at_s - began < seconds]
    return {
        "in_flight": in_flight,
        "tokens_per_s": round(sum(counted) / (0.75 * seconds), 1),
        "answers": len(made),
        "last_limit": limits[-1] if limits else None,
    }


async def sweep(url: str, levels: list[int], tokens: int, seconds: float) -> list[dict[str, Any]]:
    await tokens_per_s(url, levels[0], tokens, 5.0)  # for warmth
    rows = []
    choices: list[int | Literal["auto"]] = [*levels, "auto"]
    for in_flight in choices:
        rows.append(await tokens_per_s(url, in_flight, tokens, seconds))
        print(
            f"{in_flight:>5} in flight: {rows[-1]['tokens_per_s']:8.1f} tokens/s, "
            f"{rows[-1]['answers']} answers, limit at the end {rows[-1]['last_limit']}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vllm-python", type=Path, default=Path(".venv-vllm/bin/python"))
    parser.add_argument("--levels", default="4,8,16,32,64")
    parser.add_argument("--tokens", type=int, default=32, help="in an answer, in the mean")
    parser.add_argument("--seconds", type=float, default=40.0, help="at each concurrency")
    args = parser.parse_args()
    models.fetch(MODEL)
    levels = [int(level) for level in args.levels.split(",")]
    arguments = {"max_model_len": "1024", "max_num_seqs": "64"}
    with serving(MODEL, python=args.vllm_python, args=arguments) as [server]:
        rows = uvloop.run(sweep(server.base_url, levels, args.tokens, args.seconds))
    best = max(row["tokens_per_s"] for row in rows[:-1])
    share = round(rows[-1]["tokens_per_s"] / best, 3)
    print(
        json.dumps(
            {"bench": "vllm_limits", "cpus": os.cpu_count(), "auto_share": share, "results": rows}
        )
    )


if __name__ == "__main__":
    main()
