"""A recipe over input rows, beside the peers that people use for it: the same rows, the same
prompt, the same loopback server.

Each peer gets an environment of its own under ``--cache``, built here, and does the job as its own
documentation does it (``benchmarks/peers``). Three runs of each: answers that are all good, for
rows a second and CPU a row (of its processes, the start included); answers of which ``--bad``
cannot be parsed, drawn anew for each request; and one that is killed in the middle with all its
processes and started again by the same command. A request is paid again when the server makes a
second answer to what it had answered before the kill.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.server import Behaviour, Server

HERE = Path(__file__).parent
CACHE = Path.home() / ".cache" / "woolmill-peers"
PEERS = {
    "woolmill": (),
    "curator": ("bespokelabs-curator",),
    "data_designer": ("data-designer",),
    "distilabel": ("distilabel[openai]", "requests"),
    "datatrove": ("datatrove", *"openai httpx aiofiles aiosqlite orjson xxhash".split()),
}
"""Peer: what pip is asked for."""
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TELEMETRY_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "NEMO_TELEMETRY_ENABLED": "false",
    "CURATOR_DISABLE_RICH_DISPLAY": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
"""Nobody reports home, or asks the network for anything, while it is measured."""


@dataclass(kw_only=True)
class Outcome:
    """What one peer did. Rows are those that are there at the end."""

    version: str = ""
    failed: str = ""
    rows_per_s: float = 0.0
    cpu_ms: float = 0.0
    """A row, start included."""
    bad_rows: int = 0
    """With bad answers: rows that are there."""
    bad_told: int = 0
    """Of those that are not, the ones that it names."""
    bad_requests: int = 0
    killed_rows: int = 0
    killed_at: int = 0
    """Requests that were paid when it was killed."""
    paid_again: int = 0
    notes: list[str] = field(default_factory=list)


def question(number: int) -> str:
    return f"What is remarkable about the number {number}?"


def answer(prompt: str, asked: int, bad: float) -> str:
    """The server's answer to the ``asked``-th request with this prompt."""
    if random.Random(f"{prompt} {asked}").random() < bad:
        return "Of course! It is remarkable, as many others are, in that it has a name: {answer"
    return json.dumps({"answer": "It has a name, as many others have." * 4, "certainty": 3})


def serve(port: Any, latency_s: float, bad: float) -> None:
    async def run() -> None:
        server = Server(
            Behaviour(
                answer=lambda prompt, asked: answer(prompt, asked, bad),
                latency_s=latency_s,
                latency_spread=0.5,
                max_model_len=32_768,
            )
        )
        await server.start()
        port.send(server.url)
        await asyncio.Event().wait()

    import uvloop

    uvloop.run(run())


@contextmanager
def server(latency_s: float, bad: float) -> Iterator[str]:
    """The URL of a server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, latency_s, bad), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def ledger(url: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{url}/ledger") as reply:
        return json.load(reply)


def interpreter(peer: str, cache: Path) -> Path:
    """The Python of a peer's environment; built where it is not there. Raises RuntimeError."""
    if peer == "woolmill":
        return Path(sys.executable)
    folder = cache / peer
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        print(f"building the environment of {peer} in {folder}", file=sys.stderr, flush=True)
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        for command in ([sys.executable, "-m", "venv", folder], [*install, *PEERS[peer]]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"does not install: {last_line(done.stderr)}")
        ready.touch()
    return python


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "without a word"


class Run:
    """One start of a peer's program for a job: ``peers/JOB_PEER.py``."""

    def __init__(
        self,
        peer: str,
        python: Path,
        rows: Path,
        url: str,
        folder: Path,
        at: int,
        *,
        job: str = "peer",
    ) -> None:
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            **QUIET,
            "OPENAI_API_KEY": "none",
        }
        if peer == "woolmill":
            environment["PYTHONPATH"] = str(HERE.parent)
        program = HERE / "peers" / f"{job}_{peer}.py"
        self._log, self._out = (folder.with_suffix(end).open("w+") for end in (".log", ".out"))
        self._began = time.monotonic()
        self.process = subprocess.Popen(
            [python, program, rows, f"{url}/v1", folder, str(at)],
            stdout=self._out,
            stderr=self._log,
            stdin=subprocess.DEVNULL,
            env=environment,
            cwd=folder,
            text=True,
            start_new_session=True,
        )

    def kill(self) -> None:
        """The program and all its processes."""
        if self.process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def result(self, limit_s: float) -> tuple[dict[str, int], float, float]:
        """What it printed at its end, seconds, and seconds of CPU. Raises RuntimeError."""
        alarm = time.monotonic() + limit_s
        while True:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > alarm:
                self.kill()
                raise RuntimeError(f"was not done after {limit_s:.0f} s")
            time.sleep(0.02)  # wait4 alone gives its CPU, and it cannot wait for a limited time
        seconds = time.monotonic() - self._began
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            self._log.seek(0)
            raise RuntimeError(last_line(self._log.read()))
        self._out.seek(0)
        lines = [line for line in self._out if line.startswith('{"rows"')]
        return json.loads(lines[-1]), seconds, usage.ru_utime + usage.ru_stime


@contextmanager
def phase(outcome: Outcome, name: str) -> Iterator[None]:
    """What fails in one of the runs is noted, and the others are made."""
    try:
        yield
    except RuntimeError as error:
        outcome.notes.append(f"{name}: {error}")


def measure(peer: str, python: Path, rows: Path, folder: Path, args: Any) -> Outcome:
    outcome = Outcome()
    started: list[Run] = []

    def start(url: str, name: str) -> Run:
        where = folder / name
        where.mkdir(exist_ok=True)
        started.append(Run(peer, python, rows, url, where, args.in_flight))
        return started[-1]

    try:
        _phases(outcome, start, args)
    finally:
        for run in started:
            run.kill()
    return outcome


def _phases(outcome: Outcome, start: Callable[[str, str], Run], args: Any) -> None:
    with phase(outcome, "good answers"), server(args.latency, 0) as url:
        made, seconds, cpu_s = start(url, "good").result(args.limit)
        outcome.rows_per_s = made["rows"] / seconds
        outcome.cpu_ms = 1000 * cpu_s / max(1, made["rows"])
        if made["rows"] < args.rows:
            outcome.notes.append(f"good answers: {made['rows']} of {args.rows} rows")
    with phase(outcome, "bad answers"), server(args.latency, args.bad) as url:
        made, _, _ = start(url, "bad").result(args.limit)
        outcome.bad_rows, outcome.bad_told = made["rows"], made["told_lost"]
        outcome.bad_requests = ledger(url)["paid"]
    with phase(outcome, "kill -9"), server(args.latency, 0) as url:
        run, until = start(url, "killed"), time.monotonic() + args.limit
        while ledger(url)["paid"] < args.rows // 2:
            if run.process.poll() is not None or time.monotonic() > until:
                run.kill()
                raise RuntimeError("did not get to the middle of the run")
            time.sleep(0.01)  # the server's count is all that tells, and it cannot be waited on
        run.kill()
        time.sleep(1)  # what it had sent comes to its end at the server, which says no word of it
        outcome.killed_at = ledger(url)["paid"]
        try:
            made, _, _ = start(url, "killed").result(args.limit)
            outcome.killed_rows = made["rows"]
        finally:
            outcome.paid_again = ledger(url)["paid_twice"]


def version(peer: str, python: Path) -> str:
    name = PEERS[peer][0].partition("[")[0] if PEERS[peer] else "woolmill"
    code = f"from importlib.metadata import version; print(version({name!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.1, help="seconds to an answer")
    parser.add_argument("--bad", type=float, default=0.05, help="share that cannot be parsed")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each run")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--only", default=",".join(PEERS), help="comma-separated peers")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end what was started
    folder = Path(tempfile.mkdtemp(prefix="bench-recipes-"))
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(f"{json.dumps({'number': n, 'question': question(n)})}\n" for n in range(args.rows))
    )
    outcomes: dict[str, Outcome] = {}
    print(
        f"{'':14} {'rows/s':>7} {'CPU ms/row':>10} | {args.bad:.0%} bad: {'rows':>6} {'named':>6}"
        f" {'paid':>6} | killed at {'rows':>6} {'paid again':>10}"
    )
    for peer in args.only.split(","):
        try:
            python = interpreter(peer, args.cache)
            (folder / peer).mkdir()
            outcome = measure(peer, python, rows, folder / peer, args)
            outcome.version = version(peer, python)
            print(
                f"{peer:14} {outcome.rows_per_s:7.0f} {outcome.cpu_ms:10.2f} |"
                f" {outcome.bad_rows:14} {outcome.bad_told:6} {outcome.bad_requests:6} |"
                f" {outcome.killed_at:9} {outcome.killed_rows:6} {outcome.paid_again:10}"
                f"  {outcome.version} {'; '.join(outcome.notes)}",
                flush=True,
            )
        except RuntimeError as error:
            outcome = Outcome(failed=str(error))
            print(f"{peer:14} {error}", flush=True)
        outcomes[peer] = outcome
    shutil.rmtree(folder, ignore_errors=True)
    figures = {peer: asdict(outcome) for peer, outcome in outcomes.items()}
    print(json.dumps({"rows": args.rows, "in_flight": args.in_flight, "peers": figures}))


if __name__ == "__main__":
    main()
