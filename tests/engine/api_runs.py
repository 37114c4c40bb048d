"""Runs by the Python API: a server in this process, rows, and what may not be left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.server import Behaviour, Server
from tests.engine.answers import REFUSED_EVERY

__all__ = [
    "QUICK",
    "ROOT",
    "Loopback",
    "accepted",
    "children",
    "nothing_is_left",
    "numbers",
    "questions",
    "server",
]

ROOT = Path(__file__).parents[2]
QUICK: dict[str, Any] = {"model": "toy", "semantic": False}


class Loopback:
    """A server in a thread of its own."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server")
        self._thread.start()
        self.server = Server(behaviour)
        self._do(self.server.start())
        self.url = f"{self.server.url}/v1"
        self.ledger = self.server.ledger

    def _do(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def close(self) -> None:
        self._do(self.server.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def paid_twice(self) -> int:
        return self.ledger.paid.total() - len(self.ledger.paid)


@pytest.fixture
def server() -> Iterator[Loopback]:
    """Answers within 20 ms, so that there is always something in flight."""
    loopback = Loopback(Behaviour(text="It is so.", latency_s=0.02))
    yield loopback
    loopback.close()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread and no child of a run is left behind by any test."""
    before = {thread.name for thread in threading.enumerate()}
    yield
    left = {thread.name for thread in threading.enumerate()} - before
    assert not {name for name in left if name.startswith("woolmill")}
    assert not children()


def children() -> list[str]:
    """Command lines of the deciding processes that this process has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == os.getpid():
                command = stat.with_name("cmdline").read_bytes()
                if b"engine.decide.child" in command:
                    found.append(command.decode())
    return found


def questions(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"number": n, "question": f"What is {n}?"} for n in range(first, first + count)]


def accepted(count: int) -> list[int]:
    """Numbers of the rows that ``Answers`` gives for so many questions."""
    return [n for n in range(count) if n % REFUSED_EVERY != REFUSED_EVERY - 1]


def numbers(rows: Iterable[dict[str, Any]]) -> list[int]:
    return [row["number"] for row in rows]
