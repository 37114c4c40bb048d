"""Programs that use the Python API: killed, interrupted, edited, run as what they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import engine
from benchmarks.server import Behaviour
from engine.store import RunStore
from tests.engine.api_runs import (
    ROOT,
    Loopback,
    nothing_is_left,
    server,
)

pytestmark = pytest.mark.slow

__all__ = ["nothing_is_left", "server"]  # fixtures

SCRIPT = """
import sys
import engine
from helper import opening

print("loaded", __name__, file=sys.stderr, flush=True)


class Mine(engine.Recipe):
    fields = ("number", "answer")

    def prompt(self, ask):
        return [engine.Part(opening + ask.row["question"])]

    def parse(self, ask, answer):
        return [{"number": ask.row["number"], "answer": answer.text}]


def main():
    url, count = sys.argv[1], int(sys.argv[2])
    rows = [{"number": n, "question": f"What is {n}?"} for n in range(count)]
    order = dict(base_url=url, model="toy", semantic=False, max_in_flight=8)
    for row in engine.generate(Mine, rows=rows, out="run", **order):
        print(row["number"], flush=True)


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A script with a recipe of its own, beside a module that it imports."""
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "helper.py").write_text('opening = "Say: "\n')
    (folder / "script.py").write_text(SCRIPT)
    return folder / "script.py"


def command(script: Path, *arguments: object) -> dict[str, Any]:
    paths = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
    return {
        "args": [sys.executable, str(script), *map(str, arguments)],
        "cwd": script.parents[1],
        "env": paths,
        "text": True,
    }


def test_a_script_that_is_killed_goes_on(program: Path, server: Loopback) -> None:
    """kill -9 three times in the middle, then the same command: every row once, in order."""
    order = command(program, server.url, 300)
    for until in (5, 60, 150):
        with subprocess.Popen(**order, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) >= until:
                    process.kill()
                    break
        assert process.returncode == -signal.SIGKILL
    done = subprocess.run(**order, capture_output=True, check=True)
    assert [int(line) for line in done.stdout.split()] == list(range(300))
    with engine.open_run(program.parents[1] / "run") as run:
        assert len(run) == 300
        assert server.paid_twice <= run.counts.sent - 300  # those that were in flight


def test_ctrl_c_in_a_script_drains_and_keeps(program: Path, server: Loopback) -> None:
    order = command(program, server.url, 2000)
    with subprocess.Popen(**order, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if int(line) == 20:
                process.send_signal(signal.SIGINT)
                break
        said = process.stderr.read()
        process.stdout.close()
    assert process.returncode == -signal.SIGINT
    assert said.rstrip().endswith("KeyboardInterrupt")
    with RunStore.read(program.parents[1] / "run") as run:
        assert 20 <= run.counts().answered < 2000
        assert run.counts().answered == run.counts().sent == server.ledger.paid.total()
        assert run.sessions()[-1].ended_s is not None


def test_ctrl_c_twice_leaves_at_once(program: Path) -> None:
    """A server that would take a minute does not hold up a person who insists."""
    slow = Loopback(Behaviour(text="It is so.", latency_s=60))
    try:
        order = command(program, slow.url, 20)
        with subprocess.Popen(**order, stderr=subprocess.PIPE) as process:
            wait_until(lambda: slow.ledger.live > 0)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert process.poll() is None  # it waits for what is in flight
            process.send_signal(signal.SIGINT)
            process.wait(20)
        assert time.monotonic() - began < 20
        assert process.returncode == -signal.SIGINT
    finally:
        slow.close()


def wait_until(condition: Any) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_program_that_ends_with_rows_left(program: Path, server: Loopback) -> None:
    """A generator in a variable when the interpreter ends: drained, kept, and no hanging."""
    program.write_text(
        SCRIPT.replace(
            "    for row in engine.generate(", "    global rest\n    rest = engine.generate("
        ).replace("**order):\n        print(row", "**order)\n    row = next(rest)\n    print(row")
    )
    order = command(program, server.url, 2000)
    done = subprocess.run(**order, capture_output=True, check=True, timeout=30)
    assert done.stdout == "0\n"
    with RunStore.read(program.parents[1] / "run") as run:
        assert run.counts().answered == run.counts().sent == server.ledger.paid.total() < 2000
        assert run.sessions()[-1].ended_s is not None


def test_a_script_may_be_edited_where_it_is_a_program(program: Path, server: Loopback) -> None:
    """What is below ``if __name__`` is no part of the recipe; what is above it is."""
    order = command(program, server.url, 5)
    subprocess.run(**order, capture_output=True, check=True)
    program.write_text(
        SCRIPT.replace("    main()", "    print('again', file=sys.stderr)\n    main()")
    )
    again = subprocess.run(**order, capture_output=True, check=True)
    assert again.stdout.split() == ["0", "1", "2", "3", "4"]
    program.write_text(SCRIPT.replace("answer.text}", "answer.text.upper()}"))
    refused = subprocess.run(**order, capture_output=True, check=False)
    assert "recipe_source" in refused.stderr


def test_a_script_is_not_run_again_as_a_program(program: Path, server: Loopback) -> None:
    """Without ``if __name__``, one line says what to do, before the module is loaded again."""
    program.write_text(SCRIPT.replace('if __name__ == "__main__":\n    main()', "main()"))
    done = subprocess.run(**command(program, server.url, 5), capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("loaded") == 1
    assert 'below `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]
    assert server.ledger.asked.total() == 0
    program.write_text(
        program.read_text().replace(
            "engine.generate(Mine", f"engine.generate({f'{program}:Mine'!r}"
        )
    )
    done = subprocess.run(**command(program, server.url, 5), capture_output=True, check=False)
    assert 'below `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]
    assert server.ledger.asked.total() == 0


def test_a_recipe_that_only_this_process_finds_is_told(program: Path, server: Loopback) -> None:
    """A class below ``if __name__`` is there for the script alone."""
    inside = SCRIPT.replace("class Mine", "if __name__ == '__main__':\n  class Mine")
    head, _, rest = inside.partition("class Mine")
    body, _, tail = rest.partition("\n\ndef main")
    program.write_text(f"{head}class Mine{body.replace(chr(10), chr(10) + '  ')}\n\ndef main{tail}")
    done = subprocess.run(**command(program, server.url, 5), capture_output=True, check=False)
    assert "there is no Mine" in done.stderr.splitlines()[-1]
    assert server.ledger.asked.total() == 0
