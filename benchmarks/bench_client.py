"""What a request costs the client: the whole engine beside bare sockets, httpx and the openai SDK.

    python -m benchmarks.bench_client [--in-flight 64,1024,4096] [--requests 60000]

Every client runs in a process of its own against the loopback server in another, with the same
Alpaca prompts (3 kB) and answers (three records, 1.5 kB), not streamed; httpx with its pool as
large as the number in flight, the SDK with such a pool and as it comes (which never has more than
1,000 in flight, and closes all but 100 connections as soon as they are idle). CPU is the client's
own, all threads and processes, user and system. The engine does everything that a run does
(sampling, prompts, HTTP, parsing, filters, ROUGE-L against all before, the store with its syncs),
its start of about a second included; only near-duplicates by meaning are off. "wire" is the
engine's HTTP backend with limits and retries alone. The recipes are TOML files over input rows
with prompts of the same length by chat; JSON answers are validated by a schema.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import httptools
import httpx
import orjson
import uvloop

PROMPT = "You are asked to come up with a set of diverse tasks. " * 55 + "\n###\n4. Instruction:"
BODY = {"model": "toy", "max_tokens": 512, "temperature": 1.0, "top_p": 1.0, "stop": ["\n20"]}
Ask = Callable[[int], Awaitable[None]]


def prompt(index: int) -> str:
    return f"{index:08d} {PROMPT}"


async def keep_busy(ask: Ask, requests: int, in_flight: int) -> None:
    """``requests`` calls of ``ask``, ``in_flight`` at a time."""
    numbers = iter(range(requests))

    async def worker() -> None:
        for number in numbers:
            await ask(number)

    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(worker())


class _Socket(asyncio.Protocol):
    """The least that can be done: bytes out, httptools in, no checks, no timeouts."""

    def __init__(self) -> None:
        self._parser: Any = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._answer: asyncio.Future[bytes] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        assert self._answer is not None
        self._answer.set_result(b"".join(self._body))
        self._body.clear()

    async def post(self, data: bytes) -> bytes:
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        return await self._answer


async def bare_sockets(port: int, requests: int, in_flight: int) -> None:
    loop = asyncio.get_running_loop()
    idle = [(await loop.create_connection(_Socket, "127.0.0.1", port))[1] for _ in range(in_flight)]

    async def ask(number: int) -> None:
        body = orjson.dumps({**BODY, "prompt": prompt(number)})
        connection = idle.pop()
        answer = await connection.post(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b"
            % (len(body), body)
        )
        idle.append(connection)
        assert orjson.loads(answer)["choices"][0]["text"]

    await keep_busy(ask, requests, in_flight)


def with_pool_of(size: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=size, max_keepalive_connections=size)
    return httpx.AsyncClient(limits=limits, timeout=600)


async def httpx_default(port: int, requests: int, in_flight: int) -> None:
    async with with_pool_of(in_flight) as client:

        async def ask(number: int) -> None:
            response = await client.post(
                f"http://127.0.0.1:{port}/v1/completions", json={**BODY, "prompt": prompt(number)}
            )
            assert response.json()["choices"][0]["text"]

        await keep_busy(ask, requests, in_flight)


async def openai_sdk(port: int, requests: int, in_flight: int) -> None:
    await _openai_sdk(port, requests, in_flight, None)


async def openai_sdk_large_pool(port: int, requests: int, in_flight: int) -> None:
    await _openai_sdk(port, requests, in_flight, with_pool_of(in_flight))


async def _openai_sdk(
    port: int, requests: int, in_flight: int, http_client: httpx.AsyncClient | None
) -> None:
    from openai import AsyncOpenAI

    client = AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1",
        api_key="none",
        timeout=600,
        http_client=http_client,
    )

    async def ask(number: int) -> None:
        answer = await client.completions.create(
            model="toy", prompt=prompt(number), max_tokens=512, stop=["\n20"]
        )
        assert answer.choices[0].text

    await keep_busy(ask, requests, in_flight)
    await client.close()


async def wire(port: int, requests: int, in_flight: int) -> None:
    from engine.backends.openai.backend import HttpBackend
    from engine.limits import LimitSettings, Pool
    from engine.records import Completion, Prompt, Sampling
    from engine.run.deliver import RetryPolicy, deliver

    backend = HttpBackend(f"http://127.0.0.1:{port}", stream=False)
    pool = Pool([backend], LimitSettings(max_in_flight=in_flight))
    await pool.start()
    sampling = Sampling(max_tokens=512, stop=("\n20",))

    async def ask(number: int) -> None:
        asked = Prompt(index=number, text=prompt(number), api="completions", sampling=sampling)
        lease = await pool.acquire(tokens=1500)
        (done,) = await deliver([asked], pool, RetryPolicy(), lease, lambda prompt, verdict: None)
        assert isinstance(done.outcome, Completion)

    await keep_busy(ask, requests, in_flight)
    await pool.aclose()


async def whole_engine(port: int, requests: int, in_flight: int) -> int:
    """A run with so large a target that it takes about ``requests``; how many answers it got."""
    from engine.run.display import SilentDisplay
    from engine.run.generate import generate
    from engine.settings import RunConfig

    with tempfile.TemporaryDirectory(prefix="woolmill-bench-") as folder:
        config = RunConfig(
            base_url=(f"http://127.0.0.1:{port}",),
            target=int(requests * 2.5),
            out=Path(folder) / "run",
            max_in_flight=in_flight,
            max_requests=requests,
            max_barren_requests=requests,  # the server's vocabulary is soon used up
            max_tokens=512,
            semantic=False,
        )
        result = await generate(config, SilentDisplay())
        if result.progress.answered < requests and not result.stop.reached:
            print(f"stopped early: {result.stop.error}", file=sys.stderr, flush=True)
    return result.progress.answered


TEXT_RECIPE = """
[recipe]
name = "answers"
version = "1"
compare = "{{ question }}"
[stage]
system = "You answer briefly."
user = "{{ question }} {{ material }}"
answer = { format = "text" }
give = { question = "{{ question }}", answer = "{{ text }}" }
"""
JSON_RECIPE = """
[recipe]
name = "scores"
version = "1"
compare = "{{ question }}"
[stage]
system = "You answer in JSON."
user = "{{ question }} {{ material }}"
give = { question = "{{ question }}", answer = "{{ answer }}", score = "{{ score }}" }
keep = "score >= 1"
[stage.answer]
format = "json"
[stage.answer.schema]
type = "object"
required = ["answer", "score"]
[stage.answer.schema.properties]
answer = { type = "string" }
score = { type = "integer", minimum = 0, maximum = 9 }
"""


async def text_recipe(port: int, requests: int, in_flight: int) -> int:
    return await _recipe(TEXT_RECIPE, port, requests, in_flight)


async def json_recipe(port: int, requests: int, in_flight: int) -> int:
    return await _recipe(JSON_RECIPE, port, requests, in_flight)


async def _recipe(recipe: str, port: int, requests: int, in_flight: int) -> int:
    """A run of a recipe over ``requests`` input rows, with prompts as long as Alpaca's; how many
    answers it got.
    """
    from engine.run.display import SilentDisplay
    from engine.run.generate import generate
    from engine.settings import RunConfig

    material = PROMPT[:2900]
    with tempfile.TemporaryDirectory(prefix="woolmill-bench-") as folder:
        place = Path(folder)
        (place / "recipe.toml").write_text(recipe)
        with (place / "rows.jsonl").open("w") as rows:
            for number in range(requests):
                words = " ".join(f"w{number * 7919 % 10007 + place}" for place in range(12))
                row = {"question": f"{number} {words}?", "material": material}
                rows.write(json.dumps(row) + "\n")
        config = RunConfig(
            base_url=(f"http://127.0.0.1:{port}",),
            recipe=str(place / "recipe.toml"),
            rows=place / "rows.jsonl",
            out=place / "run",
            max_in_flight=in_flight,
            max_barren_requests=requests,
            max_tokens=512,
            semantic=False,
        )
        result = await generate(config, SilentDisplay())
    return result.progress.answered


CLIENTS: dict[str, Callable[[int, int, int], Awaitable[int | None]]] = {
    "bare sockets": bare_sockets,
    "woolmill wire": wire,
    "woolmill whole engine": whole_engine,
    "woolmill TOML recipe": text_recipe,
    "woolmill JSON recipe": json_recipe,
    "httpx": httpx_default,
    "openai SDK": openai_sdk,
    "openai SDK with a large pool": openai_sdk_large_pool,
}


def usages(client: str) -> list[resource.struct_rusage]:
    """Of this process; of the engine's, also of the one that it decides in, which has ended."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    with_children = "engine" in client or "recipe" in client
    return [resource.getrusage(who) for who in whose[: 2 if with_children else 1]]


def cpu_s(client: str) -> float:
    """User and system, in all."""
    return sum(usage.ru_utime + usage.ru_stime for usage in usages(client))


def measure(client: str, port: int, requests: int, in_flight: int) -> dict[str, Any]:
    """In a process of its own: one client once for warmth, then timed."""
    run = CLIENTS[client]
    uvloop.run(_as_coroutine(run(port, 200, min(in_flight, 64))))
    gc.collect()
    cpu, began = cpu_s(client), time.perf_counter()
    done = uvloop.run(_as_coroutine(run(port, requests, in_flight))) or requests
    seconds, cpu = time.perf_counter() - began, cpu_s(client) - cpu
    return {
        "client": client,
        "in_flight": in_flight,
        "requests": done,
        "per_s": round(done / seconds, 1),
        "cpu_us": round(cpu / done * 1e6, 1),
        "peak_mb": round(sum(usage.ru_maxrss for usage in usages(client)) / 1024, 1),
    }


async def _as_coroutine(work: Awaitable[int | None]) -> int | None:
    return await work


def spawn_server(*arguments: str) -> tuple[subprocess.Popen[str], int]:
    """A server on a free port, once it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.server", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline().rsplit(":", 1)[1])


def compare(
    clients: list[str], levels: list[int], requests: int, latency_s: float, sdk_python: str
) -> list[dict[str, Any]]:
    results = []
    server, port = spawn_server("--latency", str(latency_s))
    try:
        for in_flight in levels:
            for client in clients:
                slow = client.startswith(("httpx", "openai SDK"))
                count = min(requests, max(2 * in_flight, 1500)) if slow else requests
                python = sdk_python if client.startswith("openai SDK") else sys.executable
                command = [python, "-m", "benchmarks.bench_client", "--one", client]
                command += ["--port", str(port), "--in-flight", str(in_flight)]
                output = subprocess.run(
                    [*command, "--requests", str(count)],
                    check=True, stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                result = json.loads(output.stdout.splitlines()[-1])
                results.append({"latency_s": latency_s, **result})
                print(
                    f"{latency_s:5.1f} s {in_flight:6,} {client:28} {result['per_s']:10,.0f}/s "
                    f"{result['cpu_us']:9,.0f} µs {result['peak_mb']:7.0f} MB",
                    flush=True,
                )
    finally:
        server.terminate()
        server.wait()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--in-flight", default="64,1024,4096")
    parser.add_argument("--requests", type=int, default=60_000)
    parser.add_argument("--clients", default=",".join(CLIENTS))
    parser.add_argument("--latency", type=float, help="only with answers this late")
    parser.add_argument(
        "--sdk-python",
        default=sys.executable,
        help="another environment's interpreter, with openai, httptools, httpx, orjson, uvloop",
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    levels = [int(level) for level in args.in_flight.split(",")]
    if args.one:
        print(json.dumps(measure(args.one, args.port, args.requests, levels[0])))
        return
    raise_open_files()
    print(f"{'latency':>7} {'flying':>6} {'client':28} {'requests':>12} {'CPU':>12} {'peak':>10}")
    clients = args.clients.split(",")
    if args.latency is None:
        results = compare(clients, levels, args.requests, 0.0, args.sdk_python)
        results += compare(clients, [1024], args.requests, 0.5, args.sdk_python)
    else:
        results = compare(clients, levels, args.requests, args.latency, args.sdk_python)
    print(json.dumps({"bench": "client", "cpus": os.cpu_count(), "results": results}))


def raise_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 20_000 if hard == resource.RLIM_INFINITY else min(20_000, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


if __name__ == "__main__":
    main()
