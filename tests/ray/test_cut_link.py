"""A node whose cable is cut and mended: hosts are network namespaces, each with a ``ray start``."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.ray.rig import Place, doubles, ended, exported, uncut, until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip"),
]

NETWORK = "10.214.57"
TAG = f"wm{os.getpid() % 10000}"
PORT = 6379


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def inside(number: int) -> tuple[str, ...]:
    """What runs a command on a host."""
    return ("ip", "netns", "exec", f"{TAG}h{number}")


def address(number: int) -> str:
    return f"{NETWORK}.{number}"


@contextmanager
def hosts(count: int) -> Iterator[None]:
    """So many, each at an end of a switch."""
    with ExitStack() as stack:
        ip("link", "add", f"{TAG}sw", "type", "bridge")
        stack.callback(ip, "link", "del", f"{TAG}sw")
        ip("link", "set", "dev", f"{TAG}sw", "up")
        for number in range(1, count + 1):
            name, cable = f"{TAG}h{number}", f"{TAG}c{number}"
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", "dev", cable, "master", f"{TAG}sw")
            ip("link", "set", "dev", cable, "up")
            ip("-n", name, "addr", "add", f"{address(number)}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", name, "link", "set", "dev", device, "up")
        yield


def cable(number: int, state: str) -> None:
    ip("link", "set", "dev", f"{TAG}c{number}", state)


@contextmanager
def ray_on(place: Place, number: int, cpus: int) -> Iterator[None]:
    """A node on a host; the first is the head. Everything that runs there ends with it."""
    head = ("--head", f"--port={PORT}", "--include-dashboard=false")
    node = (f"--address={address(1)}:{PORT}",)
    command = [
        *inside(number),
        *(str(Path(place.python).with_name("ray")), "start", *(head if number == 1 else node)),
        *(f"--node-ip-address={address(number)}", f"--num-cpus={cpus}"),
        *("--disable-usage-stats", "--block"),
    ]
    log_file = place.folder / f"node{number}.log"
    with (
        log_file.open("wb") as log,
        subprocess.Popen(command, env=place.of_nodes, stdout=log, stderr=log) as started,
    ):
        try:
            until(lambda: "runtime started" in log_file.read_text(), f"node {number}")
            yield
        finally:
            listed = ["ip", "netns", "pids", f"{TAG}h{number}"]
            pids = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split()
            subprocess.run(["kill", "-9", *pids], check=False, capture_output=True)
            started.wait()


def of_host(number: int) -> set[int]:
    """The servers that run there."""
    return {pid for pid, host in doubles().items() if host == address(number)}


def test_a_cable_is_cut_and_mended(python: str, tmp_path: Path) -> None:
    """The server behind it leaves and another one comes. When the cable is mended the node finds
    that it is no longer one, and its server ends: nobody is asked twice, and none is left.
    """
    place = Place(python, tmp_path)
    out = tmp_path / "run"
    with hosts(3), ExitStack() as nodes:
        for number, cpus in ((1, 0), (2, 1), (3, 2)):
            nodes.enter_context(ray_on(place, number, cpus))
        given = place.on_ray(f"{address(1)}:{PORT}", 2, max_in_flight=2)
        run = place.generate(out, inside(1), **given)
        until(lambda: of_host(2) and of_host(3), "a server on each of two hosts")
        until(lambda: len(place.paid) > 20, "no answers")
        (behind,) = of_host(2)
        cable(2, "down")
        until(lambda: len(of_host(3)) == 2, "no other server came")
        assert of_host(2) == {behind}, "it cannot know yet"
        cable(2, "up")
        until(lambda: not of_host(2), "the server of a node that is none lives on")
        status, said = ended(run)
        assert status == 0, said
        assert said.count("has left") == 1
        assert said.count("has joined") == 2, "the second of two, and the one that came"
        assert not doubles()
    place.kill_all()
    assert exported(out) == uncut(place.model, tmp_path / "uncut")
