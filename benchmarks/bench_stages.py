"""What stages and pools cost: a chain of three beside bare sockets, a pool beside a free recipe.

    python -m benchmarks.bench_stages [--requests 30000] [--latency 0.5] [--peers]

The loopback server answers after ``--latency`` seconds. *Chain*: three stages share 512 requests in
flight (ask, answer, judge; each row of a stage goes on as soon as it is committed); bare sockets
make as many requests, 512 at a time, with nothing else to do. *Pool*: a recipe that shows accepted
rows, 256 in flight, beside the same recipe without them. *Peers* (``--peers``, and nothing else):
the same three stages over the rows of a file, as each tool's own documentation does it
(``benchmarks/peers/chain_*``), start included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.bench_client import bare_sockets, raise_open_files, spawn_server
from benchmarks.bench_recipes import CACHE, Run, interpreter, server
from engine.recipes.base import Ask, Part, Recipe
from engine.records import Completion
from engine.run.display import SilentDisplay
from engine.run.generate import generate
from engine.settings import RunConfig
from engine.store import RunStore

MATERIAL = "Write what a careful person would, and no more than that. " * 20


class Stage(Recipe):
    """One request for a row, one row of an answer."""

    asks = "any"
    fields = ("id", "text")

    def __init__(self, name: str, *, needs_rows: bool) -> None:
        self.name = f"bench/{name}"
        self.needs_rows = needs_rows

    def prompt(self, ask: Ask) -> list[Part]:
        row = ask.row or {"text": f"topic {ask.index}"}
        return [Part(MATERIAL), Part(row["text"], "shorten")]

    def parse(self, ask: Ask, answer: Completion) -> list[dict[str, Any]]:
        return [{"id": ask.row["id"] if ask.row else ask.index, "text": answer.text[:400]}]


class Chain(Stage):
    """Ask, answer, judge."""

    def __init__(self) -> None:
        super().__init__("chain", needs_rows=False)

    @property
    def stages(self) -> Sequence[Recipe]:
        return (
            Stage("ask", needs_rows=False),
            Stage("answer", needs_rows=True),
            Stage("judge", needs_rows=True),
        )


class Free(Stage):
    """Two records an answer, compared with all before."""

    fields = ("text",)
    most = 2

    def __init__(self) -> None:
        super().__init__("free", needs_rows=False)

    def prompt(self, ask: Ask) -> list[Part]:
        shown = ask.choose(ask.pool, 3, "shown")
        return [Part(MATERIAL), *(Part(row["text"][:200], "drop") for row in shown)]

    def parse(self, ask: Ask, answer: Completion) -> list[dict[str, Any]]:
        words = [f"w{ask.draw(place, 'word') % 100_000}" for place in range(16)]
        return [{"text": " ".join(words[:8])}, {"text": " ".join(words[8:])}]

    def compared(self, row: dict[str, Any]) -> str:
        return str(row["text"])


class Pooled(Free):
    """The same, with accepted rows in its prompts."""

    pooled = True


async def run(port: int, recipe: str, in_flight: int, **settings: Any) -> tuple[int, float]:
    """Requests answered and seconds from start to end."""
    with tempfile.TemporaryDirectory(prefix="woolmill-bench-") as folder:
        out = Path(folder) / "run"
        config = RunConfig(
            base_url=(f"http://127.0.0.1:{port}",),
            recipe=f"{__file__}:{recipe}",
            out=out,
            max_in_flight=in_flight,
            max_tokens=64,
            semantic=False,
            **settings,
        )
        began = time.perf_counter()
        result = await generate(config, SilentDisplay())
        seconds = time.perf_counter() - began
        assert result.stop.reached, result.stop.error
        answered = 0
        for store in (out, *(out / "stages").glob("*")):
            with RunStore.read(store) as reader:
                answered += reader.counts().answered
    return answered, seconds


PEERS = ("woolmill", "distilabel", "data_designer")
TOPICS, PEER_IN_FLIGHT, LIMIT_S = 2000, 64, 600.0


def beside_peers(latency_s: float, cache: Path) -> dict[str, float]:
    """Rows a second that went through three stages; a peer that fails says why and is left out."""
    rates = {}
    for peer in PEERS:
        with tempfile.TemporaryDirectory(prefix="woolmill-bench-") as name, ExitStack() as stack:
            rows = Path(name) / "rows.jsonl"
            rows.write_text(
                "".join(f'{{"id": {n}, "topic": "the number {n}"}}\n' for n in range(TOPICS))
            )
            folder = Path(name) / peer
            folder.mkdir()
            try:
                url = stack.enter_context(server(latency_s, 0))
                run = Run(
                    peer, interpreter(peer, cache), rows, url, folder, PEER_IN_FLIGHT, job="chain"
                )
                stack.callback(run.kill)
                made, seconds, cpu_s = run.result(LIMIT_S)
            except RuntimeError as error:
                print(f"{peer:14} {error}", flush=True)
                continue
        rates[peer] = made["rows"] / seconds
        cpu_ms = 1000 * cpu_s / max(1, made["rows"])
        print(
            f"{peer:14} {made['rows']:,} of {TOPICS:,} rows through three stages,"
            f" {rates[peer]:6,.0f} rows/s, {cpu_ms:6.2f} ms of CPU a row",
            flush=True,
        )
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=30_000)
    parser.add_argument("--latency", type=float, default=0.5)
    parser.add_argument("--peers", action="store_true", help="beside distilabel and DataDesigner")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where their environments are")
    args = parser.parse_args()
    raise_open_files()
    if args.peers:
        rates = beside_peers(args.latency, args.cache)
        print(json.dumps({"bench": "stages", "latency_s": args.latency, "rows_per_s": rates}))
        return
    serving, port = spawn_server("--latency", str(args.latency))
    rows: dict[str, float] = {}
    try:
        target = args.requests // 3
        answered, seconds = uvloop.run(run(port, "Chain", 512, target=target))
        rows["chain"] = answered / seconds
        began = time.perf_counter()
        uvloop.run(bare_sockets(port, answered, 512))
        rows["bare sockets"] = answered / (time.perf_counter() - began)
        for name in ("Free", "Pooled"):
            answered, seconds = uvloop.run(run(port, name, 256, target=2 * target))
            rows[name.lower()] = answered / seconds
    finally:
        serving.terminate()
        serving.wait()
    print(f"chain of three stages  {rows['chain']:8,.0f} requests/s, 512 in flight")
    print(f"bare sockets           {rows['bare sockets']:8,.0f} requests/s")
    print(f"  the chain's share    {rows['chain'] / rows['bare sockets']:8.1%}")
    print(f"free recipe            {rows['free']:8,.0f} requests/s, 256 in flight")
    print(f"pool recipe            {rows['pooled']:8,.0f} requests/s")
    print(f"  the pool's share     {rows['pooled'] / rows['free']:8.1%}")
    print(json.dumps({"bench": "stages", "latency_s": args.latency, **rows}))


if __name__ == "__main__":
    main()
