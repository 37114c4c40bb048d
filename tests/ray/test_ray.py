"""Runs whose servers Ray places, on a real cluster of several nodes that lose power, workers and
their head.

``make ray`` builds the environment; WOOLMILL_RAY_PYTHON names its interpreter. In vLLM's place runs
the loopback server (``vllm_double``): what is tested is who starts, ends and asks servers.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.server import Behaviour, Server
from engine.run.display import SilentDisplay
from engine.run.generate import generate
from engine.settings import RunConfig
from engine.store import RunReader

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
DOUBLE = HERE / "vllm_double.py"
IN_FLIGHT = 8
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


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter that has Ray."""
    if (found := os.environ.get("WOOLMILL_RAY_PYTHON")) is None:
        pytest.skip("WOOLMILL_RAY_PYTHON is not set; run make ray")
    return found


class Cluster:
    """A Ray cluster on this machine, and what runs on it."""

    def __init__(self, python: str, folder: Path) -> None:
        self.python = python
        self.folder = folder
        self.paid_file = folder / "paid"
        self.paid_file.touch()
        self.model = folder / "model"
        self.model.mkdir(exist_ok=True)
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
        self._started: list[subprocess.Popen[str]] = []
        with (folder / "cluster.log").open("a") as log:
            self._process = subprocess.Popen(
                [python, str(HERE / "cluster.py")],
                env=self.environment | {"WOOLMILL_HOME": str(folder / "home")},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.address = self.say("add 127.0.0.11 0")

    def say(self, command: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.communicate()
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(MOST_S)

    def woolmill(self, *arguments: str) -> subprocess.Popen[str]:
        """A command under the interpreter that has Ray."""
        process = subprocess.Popen(
            [self.python, "-m", "engine", *arguments],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._started.append(process)
        return process

    def generate(self, out: Path, **more: object) -> subprocess.Popen[str]:
        """A run on servers of its own here."""
        given = settings_of(self.model, out) | {
            "backend": "vllm",
            "serve": True,
            "ray": self.address,
            "replicas": 3,
            "vllm_python": str(self.vllm_python),
            **more,
        }
        config = out.with_suffix(".toml")
        config.write_text(
            "".join(f"{name} = {json.dumps(value)}\n" for name, value in given.items())
        )
        return self.woolmill("generate", "--config", str(config), "--no-progress")

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
        "max_in_flight": IN_FLIGHT,
        "max_tokens": 256,
        "semantic": False,
        "out": str(out),
    }


def doubles() -> set[int]:
    """The servers that run, by their process ids."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(DOUBLE) in words and b"--served-model-name" in words:
            if os.path.basename(words[0]).startswith(b"python") and b"-P" not in words:
                found.add(int(path.parent.name))
    return found


def until(condition: Callable[[], object], what: str) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < MOST_S, what
        time.sleep(0.05)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=150)
    return process.returncode, said


@contextmanager
def a_cluster(python: str, folder: Path, *nodes: str) -> Iterator[Cluster]:
    cluster = Cluster(python, folder)
    try:
        for node in nodes:
            cluster.say(f"add {node} 2")
        yield cluster
    finally:
        cluster.end()


@pytest.fixture(scope="module")
def cluster(python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    with a_cluster(python, folder, "127.0.0.12", "127.0.0.13") as made:
        yield made


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


def test_a_node_loses_power(cluster: Cluster, tmp_path: Path) -> None:
    """Its servers leave, others come on the nodes that are left and on one that is new; as many
    rows as were asked for, byte for byte those of one undisturbed server; what was acknowledged is
    not paid for again; no server is left, and the key is nowhere to be seen.
    """
    before = len(cluster.paid)
    out = tmp_path / "run"
    run = cluster.generate(out)
    until(lambda: len(cluster.paid) > before + 100, "no answers")
    first = cluster.ports
    assert len(doubles()) == 3
    cluster.say("kill 127.0.0.12")
    cluster.say("add 127.0.0.14 2")
    status, said = ended(run)
    assert status == 0, said
    assert "has left" in said
    assert cluster.ports - first, "no replacement was asked"
    assert not doubles()
    dataset = exported(out)
    assert dataset.count(b"\n") == TARGET
    assert dataset == uncut(cluster.model, tmp_path / "uncut")
    paid = Counter(cluster.paid[before:])
    again = sum(times - 1 for times in paid.values())
    assert max(paid.values()) <= 2
    assert again <= 2 * IN_FLIGHT, "more than what was in flight on the node"
    assert len(paid) >= answered(out)
    logs = [out / "ray.log", *cluster.folder.rglob("vllm-*.log")]
    assert not any("VLLM_API_KEY" in log.read_text(errors="replace") for log in logs)


def test_workers_and_the_engine_are_killed(cluster: Cluster, tmp_path: Path) -> None:
    """A killed worker's server ends and another one comes; with the engine all of them end."""
    run = cluster.generate(tmp_path / "run", target=1_000_000)
    until(lambda: len(doubles()) == 3, "three servers")
    victim = min(doubles())
    tether = parent_of(victim)
    os.kill(parent_of(tether), signal.SIGKILL)
    until(lambda: victim not in doubles(), "the server of a worker that was killed lives on")
    until(lambda: len(doubles()) == 3, "no other one came")
    run.kill()
    run.communicate()
    until(lambda: not doubles(), "servers outlive the engine")


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_servers_that_outlive_a_run(cluster: Cluster, tmp_path: Path) -> None:
    """``woolmill serve --ray``: a list of URLs and a key, for as many runs as one likes."""
    urls = tmp_path / "fleet.txt"
    serve = cluster.woolmill(
        *("serve", str(cluster.model), "--ray", cluster.address, "--replicas", "2"),
        *("--urls", str(urls), "--vllm-python", str(cluster.vllm_python)),
    )
    until(lambda: urls.exists() and len(urls.read_text().splitlines()) == 2, "two URLs")
    key = tmp_path / "fleet.txt.key"
    assert key.stat().st_mode & 0o777 == 0o600
    given = settings_of(cluster.model, tmp_path / "run")
    given |= {"endpoints_file": str(urls), "key_file": str(key), "target": 60}
    config = tmp_path / "run.toml"
    config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in given.items()))
    status, said = ended(cluster.woolmill("generate", "--config", str(config), "--no-progress"))
    assert status == 0, said
    assert len(doubles()) == 2
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        assert key.read_text().strip() not in path.read_text(errors="replace")
    status, said = ended(cluster.woolmill("doctor", "--ray", cluster.address))
    assert "3 nodes, 4 CPUs, 0 GPUs" in said
    serve.send_signal(signal.SIGTERM)
    status, said = ended(serve)
    assert status == 143, said
    assert not doubles()
    assert not urls.read_text()
    assert not key.exists()


@pytest.mark.slow
def test_the_head_is_killed(python: str, tmp_path: Path) -> None:
    """Status 69, and no server is left; on a new cluster the same command goes on, to the same
    bytes.
    """
    out = tmp_path / "run"
    with a_cluster(python, tmp_path, "127.0.0.12") as first:
        run = first.generate(out, replicas=2, max_outage_s=3.0)
        until(lambda: len(first.paid) > 50, "no answers")
        first.say("kill 127.0.0.11")
        status, said = ended(run)
        assert status == 69, said
        until(lambda: not doubles(), "servers outlive their cluster")
        paid = len(first.paid)
    with a_cluster(python, tmp_path, "127.0.0.12") as second:
        status, said = ended(second.generate(out, replicas=2))
        assert status == 0, said
        model = second.model
    assert exported(out) == uncut(model, tmp_path / "uncut")
    assert paid < answered(out), "it had been done before"
    twice = [times for times in Counter(second.paid).values() if times > 1]
    assert len(twice) <= 2 * IN_FLIGHT
