"""What looking at a run costs it: its rate with 200 connections to its page, beside without.

    python -m benchmarks.bench_view [--pairs 5] [--requests 1500] [--in-flight 64]

A real run asks a loopback server that answers after half a second, so the server bounds the rate.
Rounds alternate: alone, then with ``woolmill view`` in a process of its own and clients that ask
for its state as pages do; one in ten never ends its headers. The rate is taken between the first
and the last answer's commit. What counts is the ratio within a pair.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from engine.errors import WoolmillError
from engine.store import RunReader

TOKEN = "bench-token-0123456789-0123456789-0123456789"
POLL_S = 2.0
LATENCY_S = 0.5
SLOW = 10
"""One client in so many never ends its headers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--connections", type=int, default=200)
    options = parser.parse_args()
    command = [sys.executable, "-m", "benchmarks.server", "--port", "0"]
    with subprocess.Popen(
        [*command, "--latency", str(LATENCY_S)], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        try:
            results = measured(url, options)
        finally:
            server.terminate()
    print(json.dumps(results))


def measured(url: str, options: argparse.Namespace) -> dict[str, object]:
    """Both rates of every pair, and the ratio's median with its spread."""
    ratios, said = [], Counter[str]()
    print(f"{'alone':>10} {'watched':>10} {'ratio':>7}   requests/s")
    for number in range(options.pairs):
        rates = {}
        # Each goes first in turn: a machine that slows down favours neither.
        for watched in (False, True) if number % 2 else (True, False):
            rates[watched] = rate(url, options, options.connections if watched else 0, said)
        ratios.append(rates[True] / rates[False])
        print(f"{rates[False]:10.1f} {rates[True]:10.1f} {ratios[-1]:7.4f}", flush=True)
    return {
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_least": round(min(ratios), 4),
        "ratio_most": round(max(ratios), 4),
        "pairs": options.pairs,
        "connections": options.connections,
        "replies": dict(said),
    }


def rate(url: str, options: argparse.Namespace, connections: int, said: Counter[str]) -> float:
    """Answers a second of one run, watched over ``connections``; adds what they were told."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = [sys.executable, "-m", "engine", "generate", "--no-semantic", "--base-url", url]
        command += ["--out", str(folder), "--max-in-flight", str(options.in_flight)]
        command += ["--target", "1000000", "--max-requests", str(options.requests)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
            if connections:
                watch(run, folder, connections, said)
        with RunReader(folder) as store:
            counts = store.counts()
        assert counts.first_at_s is not None
        assert counts.last_at_s is not None
        return (counts.answered - 1) / (counts.last_at_s - counts.first_at_s)


def watch(run: subprocess.Popen[bytes], folder: Path, connections: int, said: Counter[str]) -> None:
    """Serve the run's page and ask it until the run ends."""
    while not _started(folder):
        if run.poll() is not None:
            raise SystemExit(f"the run ended with {run.returncode} before its first answer")
        time.sleep(0.05)  # another process: there is nothing to wait on
    command = [sys.executable, "-m", "engine", "view", str(folder), "--port", "0"]
    env = os.environ | {"WOOLMILL_VIEW_TOKEN": TOKEN}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as view:
        assert view.stdout is not None
        port = int(view.stdout.readline().split("/enter")[0].rsplit(":", 1)[1])
        try:
            asyncio.run(_clients(run, port, connections, said))
        finally:
            view.terminate()


def _started(folder: Path) -> bool:
    try:
        with RunReader(folder) as store:
            return store.counts().answered > 0
    except WoolmillError:  # not there yet, or not whole
        return False


async def _clients(
    run: subprocess.Popen[bytes], port: int, connections: int, said: Counter[str]
) -> None:
    tasks = [
        asyncio.create_task(_client(port, number, said, slow=number % SLOW == 0))
        for number in range(connections)
    ]
    await asyncio.to_thread(run.wait)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _client(port: int, number: int, said: Counter[str], *, slow: bool) -> None:
    """Asks for the state every two seconds over one connection, and opens it anew when it ends."""
    head = f"GET /api/state HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {TOKEN}\r\n"
    await asyncio.sleep(POLL_S * (number % 50) / 50)  # pages are not opened all at once
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            while True:
                writer.write(head.encode() if slow else f"{head}\r\n".encode())
                said[str(await _status(reader))] += 1
                await asyncio.sleep(POLL_S)
        except (OSError, asyncio.IncompleteReadError):
            said["closed"] += 1
        await asyncio.sleep(POLL_S)


async def _status(reader: asyncio.StreamReader) -> int:
    head = await reader.readuntil(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    await reader.readexactly(int(fields.get(b"content-length", b"0")))
    return int(head.split(b" ", 2)[1])


if __name__ == "__main__":
    main()
