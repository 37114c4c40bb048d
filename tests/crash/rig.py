"""A server with a ledger on file, a forking parent for children, folders for what they leave."""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.server import Behaviour, Server

ROOT = Path(__file__).resolve().parents[2]
HUNG, LONGEST_S = 124, 180.0
"""The status of a run that has not ended after so many seconds; the longest here take twenty."""
EARLY, STARTING_S = 0.2, 1.0
"""The share of moments in the start of a run, and how long one may take."""


class LedgerFile(Counter[str]):
    """Counts as the server's ledger does, and writes a line for each event."""

    def __init__(self, event: str, fd: int) -> None:
        self._event = event
        self._fd = fd
        super().__init__()

    def update(self, *args: Any, **kwargs: int) -> None:
        super().update(*args, **kwargs)
        if not args or args[0] is None:
            return
        now = time.monotonic_ns()
        lines = "".join(f"{now} {self._event} {key}\n" for key in args[0])
        os.write(self._fd, lines.encode())


class LedgerServer(AbstractContextManager["LedgerServer"]):
    """The toxic server in a thread with its own event loop; its ledger is the file ``ledger``."""

    def __init__(self, behaviour: Behaviour, ledger: Path) -> None:
        self._fd = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._server = Server(behaviour)
        self._server.ledger.asked = LedgerFile("asked", self._fd)
        self._server.ledger.paid = LedgerFile("paid", self._fd)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ledger-server")

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._server.start(), self._loop).result(10)
        return self

    def __exit__(self, *exc_info: object) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        os.close(self._fd)

    @property
    def url(self) -> str:
        return f"{self._server.url}/v1"


class Parent(AbstractContextManager["Parent"]):
    """The process that forks the children; one child at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._child = 0

    def __enter__(self) -> Self:
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | quiet,
        )
        try:
            self._warm_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _warm_up(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            with LedgerServer(Behaviour(), Path(folder) / "ledger") as server:
                warm = Trial(Path(folder) / "trial", server.url, target=20, in_flight=4, seed=1)
                self._send(warm.order("run"))
                self.start(warm.order("run"))
                self.wait()

    def __exit__(self, *exc_info: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._child:  # a test that failed: its server is gone, which the run would wait for
            send_signal(self._child, signal.SIGKILL)
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def start(self, order: dict[str, Any]) -> int:
        """Fork a child; its pid."""
        self._send(order)
        self._child = int(self._line())
        return self._child

    def wait(self) -> int:
        """The child's exit status; below zero the signal that ended it, ``HUNG`` where it did not
        come to an end.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        if select.select([self._process.stdout], [], [], LONGEST_S)[0]:
            status = int(self._line())
        else:
            send_signal(self._child, signal.SIGKILL)
            self._line()
            status = HUNG
        self._child = 0
        return status

    def _send(self, order: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def _line(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the parent of the children has died")
        return line


@dataclass
class Trial:
    """One run from its first request to its target, however often it is killed."""

    folder: Path
    url: str
    target: int | None
    """Rows wanted; None: each input row is decided."""
    in_flight: int
    seed: int
    mutant: str | None = None
    more: tuple[str, ...] = ()
    """Further arguments of the run."""
    status: int = 0
    """Of the last start."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        (self.folder / "settings.toml").write_text(
            "max_attempts = 1000\ndrain_timeout_s = 20\n", encoding="utf-8"
        )

    def order(self, name: str, failpoint: str | None = None) -> dict[str, Any]:
        """What to tell the parent, for the run ``name``: ``cut`` or ``uncut``."""
        argv = [
            "generate",
            f"--config={self.folder / 'settings.toml'}",
            f"--base-url={self.url}",
            "--model=toy",
            f"--out={self.folder / name}",
            f"--max-in-flight={self.in_flight}",
            f"--seed={self.seed}",
            "--max-tokens=300",
            "--rouge-threshold=0.9",  # the server's few templates would be used up at 0.7
            "--no-semantic",
            "--no-progress",
            *([] if self.target is None else [f"--target={self.target}"]),
            *self.more,
        ]
        return {
            "argv": argv,
            "acks": str(self.acks(name)),
            "stderr": str(self.folder / f"{name}.log"),
            "failpoint": failpoint,
            "mutant": self.mutant,
        }

    def acks(self, name: str) -> Path:
        return self.folder / f"{name}.acks"

    def export(self, parent: Parent, name: str) -> Path:
        """The accepted rows with their ids, by the command line."""
        path = self.folder / f"{name}.jsonl"
        order = self.order(name)
        run = str(self.folder / name)
        order["argv"] = ["export", run, "--format=jsonl", "-o", str(path), "--overwrite"]
        order["acks"] = os.devnull
        parent.start(order)
        if parent.wait():
            raise RuntimeError(Path(order["stderr"]).read_text())
        return path


def start_and_wait(parent: Parent, cut: Trial, rng: random.Random, longest_s: float) -> int:
    """Start the run ``run``, and wait for some moment: one in five while it starts, the others up
    to ``longest_s`` after its first request. Its pid; it may have ended.
    """
    acks = cut.acks("run")
    before = acks.stat().st_size if acks.exists() else 0
    pid = parent.start(cut.order("run"))
    if rng.random() < EARLY:
        time.sleep(rng.uniform(0, STARTING_S))
        return pid
    while b" sent " not in _since(acks, before) and Path(f"/proc/{pid}").exists():
        time.sleep(0.002)
    time.sleep(rng.uniform(0, longest_s))
    return pid


def _since(path: Path, start: int) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(start)
        return file.read()


def judge(ledger: Path, acks: Path, export: Path, uncut: Path) -> dict[str, int]:
    """The checker's verdict, from a process of its own."""
    checker = Path(__file__).with_name("checker.py")
    done = subprocess.run(
        [sys.executable, "-I", str(checker), *map(str, (ledger, acks, export, uncut))],
        check=True,
        capture_output=True,
        text=True,
    )
    verdict: dict[str, int] = json.loads(done.stdout)
    return verdict


def send_signal(pid: int, signum: int) -> None:
    """To a child that may have ended by itself just now."""
    with suppress(ProcessLookupError):
        os.kill(pid, signum)
