"""What is held by a tether dies with whoever held it, whoever cleans up and in whatever order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from engine.processes.children import tethered

COMMAND = tethered()
SERVER = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
STARTER = """
import subprocess, sys, time
held = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)
time.sleep(600)
"""


def of_group(group: int) -> dict[int, tuple[int, str]]:
    """The living processes of a group: the parent of each, and its state."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, of, *_ = path.read_text().rpartition(")")[2].split()
            if int(of) == group and state != "Z":
                found[int(path.parent.name)] = (int(parent), state)
    return found


def wait_until_none(group: int) -> None:
    for _ in range(1000):
        if not of_group(group):
            return
        time.sleep(0.01)
    raise AssertionError(f"left behind: {of_group(group)}")


@pytest.fixture
def held() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A tethered command that runs, and its process id."""
    with subprocess.Popen(
        [*COMMAND, sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as tether:
        assert tether.stdout is not None
        yield tether, int(tether.stdout.readline())
        with suppress(ProcessLookupError):
            os.killpg(tether.pid, signal.SIGKILL)


def second_of(tether: int, server: int) -> int:
    """The process that holds the tether too: nobody's child of those here."""
    (found,) = (
        pid
        for pid, (parent, _) in of_group(tether).items()
        if pid not in (tether, server) and parent not in (tether, server)
    )
    return found


def test_the_starter_s_end(held: tuple[subprocess.Popen[str], int]) -> None:
    """The other end is closed: nothing is left."""
    tether, _ = held
    assert tether.stdin is not None
    assert len(of_group(tether.pid)) == 3
    tether.stdin.close()
    wait_until_none(tether.pid)


@pytest.mark.parametrize("killed", ["tether", "second"])
def test_one_of_the_two_that_hold_it_is_killed_first(
    held: tuple[subprocess.Popen[str], int], killed: str
) -> None:
    """As Ray kills the children of a worker that ends: the other one still sees the end."""
    tether, server = held
    assert tether.stdin is not None
    second = second_of(tether.pid, server)
    os.kill(tether.pid if killed == "tether" else second, signal.SIGKILL)
    time.sleep(0.1)
    assert server in of_group(tether.pid), "the command itself goes on until the end"
    tether.stdin.close()
    wait_until_none(tether.pid)


def test_the_starter_is_killed(tmp_path: Path) -> None:
    """With SIGKILL, children and all: whatever it started ends."""
    command = [sys.executable, "-c", STARTER, *COMMAND, sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        server = int(starter.stdout.readline())
        group = os.getpgid(server)
        os.kill(group, signal.SIGKILL)  # its child, the tether
        starter.kill()
    wait_until_none(group)


def test_the_command_s_end() -> None:
    """It ends by itself: its status is the tether's, and what it printed is at its end."""
    for code, said in (("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)):
        with subprocess.Popen(
            [*COMMAND, sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        ) as tether:
            assert tether.stdout is not None
            assert tether.stdout.read() == b""  # before anybody closed the tether
            assert tether.wait() == said
        wait_until_none(tether.pid)


def test_an_end_in_order(held: tuple[subprocess.Popen[str], int]) -> None:
    """SIGTERM to the group ends the command; the tether's status says how."""
    tether, _ = held
    os.killpg(tether.pid, signal.SIGTERM)
    assert tether.wait() == 128 + signal.SIGTERM
    assert tether.stdin is not None
    tether.stdin.close()
    wait_until_none(tether.pid)
