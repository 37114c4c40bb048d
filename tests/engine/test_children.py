"""A child of the event loop: what is said to it and by it, and that it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.files import tail_lines
from engine.processes.children import Child, environment, start_async

pytestmark = pytest.mark.anyio

ECHO = """
from engine.processes.frames import frame, keep_pipes, read_frame
source, out = keep_pipes()
while (said := read_frame(source)) is not None:
    out.writelines(frame(said.head.upper(), [said.body]))
    out.flush()
"""
DEAF = "import time; time.sleep(600)"


async def started(program: str) -> Child:
    return await start_async(
        [sys.executable, "-P", "-c", program],
        environment("engine"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


async def test_a_child_answers_and_ends_with_its_input() -> None:
    child = await started(ECHO)
    for number in range(3):
        child.send(b"hello %d" % number, [b"x" * 100_000, b"y"])
    heard = []
    async for message in child.messages():
        heard.append(message)
        if len(heard) == 3:
            await child.close(20.0)
    assert [message.head for message in heard] == [b"HELLO 0", b"HELLO 1", b"HELLO 2"]
    assert all(message.body == b"x" * 100_000 + b"y" for message in heard)
    assert await child.wait() == 0
    child.send(b"too late")  # nothing happens


async def test_a_child_that_does_not_end_is_ended() -> None:
    child = await started(DEAF)
    await child.close(0.05)
    assert await child.wait() == -9


@pytest.mark.parametrize(
    ("after", "most", "lines"),
    [
        (0, 1 << 16, ["one", "two", "three"]),
        (4, 1 << 16, ["two", "three"]),
        (0, 5, ["hree"]),
        (9, 5, ["hree"]),
        (100, 5, []),
    ],
)
def test_the_end_of_a_log(tmp_path: Path, after: int, most: int, lines: list[str]) -> None:
    path = tmp_path / "log"
    path.write_text("one\ntwo\nthree\n")
    assert tail_lines(path, after=after, most=most) == lines


def test_a_log_that_is_not_there_has_no_end(tmp_path: Path) -> None:
    assert tail_lines(tmp_path / "none") == []
