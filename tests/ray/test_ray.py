"""Runs whose servers Ray places, on a real cluster of several nodes that lose power, workers and
their head.

``make ray`` builds the environment; WOOLMILL_RAY_PYTHON names its interpreter. In vLLM's place runs
the loopback server (``vllm_double``): what is tested is who starts, ends and asks servers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import found_in_command_lines, found_in_files
from tests.ray.rig import (
    HERE,
    MOST_S,
    TARGET,
    Place,
    answered,
    doubles,
    ended,
    exported,
    uncut,
    until,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

IN_FLIGHT = 8


class Cluster(Place):
    """A Ray cluster of several nodes on this machine."""

    def __init__(self, python: str, folder: Path) -> None:
        super().__init__(python, folder)
        with (folder / "cluster.log").open("a") as log:
            self._process = subprocess.Popen(
                [python, str(HERE / "cluster.py")],
                env=self.of_nodes,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.address: str = self.say("add 127.0.0.11 0")

    def say(self, command: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self.kill_all()
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(MOST_S)

    def run(self, out: Path, replicas: int = 3, **more: Any) -> subprocess.Popen[str]:
        """A run on servers of its own here."""
        return self.generate(out, **self.on_ray(self.address, replicas, **more))


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


def test_a_node_loses_power(cluster: Cluster, tmp_path: Path) -> None:
    """Its servers leave, others come on the nodes that are left and on one that is new; as many
    rows as were asked for, byte for byte those of one undisturbed server; what was acknowledged is
    not paid for again; no server is left, and the key is nowhere to be seen.
    """
    before = len(cluster.paid)
    out = tmp_path / "run"
    run = cluster.run(out)
    until(lambda: len(cluster.paid) > before + 100, "no answers")
    first = cluster.ports
    assert len(doubles()) == 3
    key = key_of(min(doubles()))
    assert not list(found_in_command_lines(key))
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
    assert key.decode() not in said
    for folder in (tmp_path, cluster.folder, Path("/tmp/ray/session_latest/logs").resolve()):
        assert not list(found_in_files(folder, key))


def key_of(server: int) -> bytes:
    """What a server asks for, from its environment."""
    variables = Path(f"/proc/{server}/environ").read_bytes().split(b"\0")
    (found,) = (each for each in variables if each.startswith(b"VLLM_API_KEY="))
    return found.partition(b"=")[2]


def test_workers_and_the_engine_are_killed(cluster: Cluster, tmp_path: Path) -> None:
    """A killed worker's server ends and another one comes; with the engine all of them end."""
    run = cluster.run(tmp_path / "run", target=1_000_000)
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
    given: dict[str, Any] = {"endpoints_file": str(urls), "key_file": str(key), "target": 60}
    status, said = ended(cluster.generate(tmp_path / "run", **given))
    assert status == 0, said
    assert len(doubles()) == 2
    assert not list(found_in_command_lines(key.read_bytes().strip()))
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
        run = first.run(out, 2, max_outage_s=3.0)
        until(lambda: len(first.paid) > 50, "no answers")
        first.say("kill 127.0.0.11")
        status, said = ended(run)
        assert status == 69, said
        until(lambda: not doubles(), "servers outlive their cluster")
        paid = len(first.paid)
    with a_cluster(python, tmp_path, "127.0.0.12") as second:
        status, said = ended(second.run(out, 2))
        assert status == 0, said
        model = second.model
    assert exported(out) == uncut(model, tmp_path / "uncut")
    assert paid < answered(out), "it had been done before"
    twice = [times for times in Counter(second.paid).values() if times > 1]
    assert len(twice) <= 2 * IN_FLIGHT
