"""What the tests on Ray share: the environment, the runs, and what is looked at afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.server import Behaviour, Server
from engine.run.display import SilentDisplay
from engine.run.generate import generate
from engine.settings import RunConfig
from engine.store import RunReader

__all__ = [
    "HERE",
    "MOST_S",
    "QUICK",
    "TARGET",
    "Place",
    "answered",
    "doubles",
    "ended",
    "exported",
    "settings_of",
    "uncut",
    "until",
]

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
DOUBLE = HERE / "vllm_double.py"
TARGET = 1500
MOST_S = 60.0
QUICK = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}
"""A node or head that is gone is noticed within seconds, and not within fifteen or sixty."""


class Place:
    """Where a test's runs happen: a model that is none, what takes vLLM's place, what was paid."""

    def __init__(self, python: str, folder: Path) -> None:
        self.python = python
        self.folder = folder
        self.model = folder / "model"
        self.model.mkdir(exist_ok=True)
        self.paid_file = folder / "paid"
        self.paid_file.touch()
        self.vllm_python = folder / "python"
        double = f"PYTHONPATH={shlex.quote(str(ROOT))} {shlex.quote(sys.executable)} {DOUBLE}"
        self.vllm_python.write_text(f'#!/bin/sh\nshift 3\nexec env {double} "$@"\n')
        self.vllm_python.chmod(0o755)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": os.environ["HOME"],
            "PYTHONPATH": str(ROOT),
            "WOOLMILL_PAID": str(self.paid_file),
            **QUICK,
        }
        self.of_nodes = self.environment | {"WOOLMILL_HOME": str(folder / "home")}
        self._started: list[subprocess.Popen[str]] = []

    def woolmill(self, *arguments: str, within: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """A command under the interpreter that has Ray, ``within`` another one."""
        process = subprocess.Popen(
            [*within, self.python, "-m", "engine", *arguments],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._started.append(process)
        return process

    def generate(
        self, out: Path, within: tuple[str, ...] = (), **given: Any
    ) -> subprocess.Popen[str]:
        """A run with these settings beside those that all have."""
        config = out.with_suffix(".toml")
        settings = settings_of(self.model, out) | given
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in settings.items()]
        config.write_text("".join(lines))
        return self.woolmill("generate", "--config", str(config), "--no-progress", within=within)

    def on_ray(self, address: str, replicas: int, **more: Any) -> dict[str, Any]:
        """The settings of a run that has servers of its own on a cluster."""
        servers = {"serve": True, "ray": address, "replicas": replicas}
        return servers | {"vllm_python": str(self.vllm_python)} | more

    def kill_all(self) -> None:
        """End what a test that failed has left."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.communicate()

    @property
    def paid(self) -> list[str]:
        """Each answer that was made, by prompt and seed."""
        return [line.split()[1] for line in self.paid_file.read_text().splitlines()]

    @property
    def ports(self) -> set[str]:
        """Of the servers that have made an answer."""
        return {line.split()[0] for line in self.paid_file.read_text().splitlines()}


def settings_of(model: Path, out: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "target": TARGET,
        "max_in_flight": 8,
        "max_tokens": 256,
        "semantic": False,
        "out": str(out),
    }


def doubles() -> dict[int, str]:
    """The servers that run: their process ids, and the address at which each listens."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[1:2] == [os.fsencode(DOUBLE)]:
            found[int(path.parent.name)] = os.fsdecode(words[words.index(b"--host") + 1])
    return found


def until(condition: Callable[[], object], what: str) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < MOST_S, what
        time.sleep(0.05)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=150)
    return process.returncode, said


def uncut(model: Path, out: Path) -> bytes:
    """The dataset of the same run with one server that nobody disturbs."""

    async def run() -> None:
        async with Server(Behaviour(model=str(model), root=str(model))) as server:
            given = settings_of(model, out) | {"base_url": (server.url,)}
            result = await generate(RunConfig.model_validate(given), SilentDisplay())
            assert result.stop.reached

    asyncio.run(run())
    return exported(out)


def exported(out: Path) -> bytes:
    made = out.with_suffix(".jsonl")
    command = [sys.executable, "-m", "engine", "export", str(out), "-o", str(made)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return made.read_bytes()


def answered(out: Path) -> int:
    with RunReader(out) as run:
        return sum(1 for _ in run.all_answers())
