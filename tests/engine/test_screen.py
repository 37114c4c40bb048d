"""Nothing that happens to a terminal or a log ends a run or costs a paid answer.

Real processes before a real server, with real pseudo-terminals, pipes, devices and signals.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import pty
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from fcntl import ioctl
from pathlib import Path
from typing import IO, Any

import anyio
import pytest

from benchmarks.server import Behaviour, Server
from engine import screen
from engine.backends.scripted import ScriptedBackend
from engine.limits import Pool
from engine.run.display import Guarded, PlainDisplay
from engine.run.progress import Progress
from engine.store import RunStore

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

ROOT = Path(__file__).parents[2]
WOOLMILL = [sys.executable, "-m", "engine"]


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """Answers in 0.4 seconds."""
    async with Server(Behaviour(latency_s=0.4)) as server:
        yield server


def command(server: Server, out: Path, *more: str) -> list[str]:
    """A run of some 20 requests, 8 at a time."""
    return [
        *WOOLMILL, "generate", "--no-semantic", "--base-url", server.url, "--target", "60",
        "--max-in-flight", "8", "--out", str(out), *more,
    ]  # fmt: skip


async def started(
    argv: list[str],
    *,
    stdin: int | IO[Any] = DEVNULL,
    stdout: int | IO[Any] = DEVNULL,
    stderr: int | IO[Any] = DEVNULL,
    environment: Mapping[str, str] | None = None,
) -> Process:
    own = {"PYTHONPATH": str(ROOT), **(environment or {})}
    return await asyncio.create_subprocess_exec(
        *argv, cwd=ROOT, stdin=stdin, stdout=stdout, stderr=stderr, env={**os.environ, **own}
    )


async def under_way(server: Server) -> None:
    """Until the server has eight requests."""
    while server.ledger.asked.total() < 8:  # noqa: ASYNC110 - another process brings them
        await anyio.sleep(0.01)


async def ended(process: Process) -> int:
    with anyio.fail_after(40):
        return await process.wait()


def accepted(out: Path) -> int:
    with RunStore.read(out) as store:
        return store.counts().accepted


def session_ended(out: Path) -> bool:
    with RunStore.read(out) as store:
        return store.sessions()[-1].ended_s is not None


def assert_kept(server: Server, out: Path, *, whole: bool) -> None:
    """Every paid answer is in the store; where the run went on, the dataset is there too."""
    with RunStore.read(out) as store:
        counts = store.counts()
    assert counts.answered == server.ledger.paid.total() >= 8
    assert max(server.ledger.paid.values()) == 1
    if whole:
        assert counts.accepted == 60
        assert len(json.loads((out / "alpaca_data.json").read_text())) == 60


class Terminal:
    """A pseudo-terminal: its window, which reads what is shown, and the program's side."""

    def __init__(self, columns: int) -> None:
        self._window, self.side = pty.openpty()
        self.shown = b""
        ioctl(self.side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.set_blocking(self._window, False)
        asyncio.get_running_loop().add_reader(self._window, self._read)

    def _read(self) -> None:
        with suppress(OSError):
            self.shown += os.read(self._window, 65536)
            return
        self.close()

    def close(self) -> None:
        """The window goes away."""
        if self._window >= 0:
            asyncio.get_running_loop().remove_reader(self._window)
            os.close(self._window)
            self._window = -1

    async def ended(self) -> bytes:
        """All that was shown, once nobody has the program's side open any more."""
        os.close(self.side)
        while self._window >= 0:  # noqa: ASYNC110 - the loop's reader ends it
            await anyio.sleep(0.01)
        return self.shown


HANG_UPS = {
    "ssh drops": ("exec {}", 143),
    "under a shell, which hangs up too": ("{}; :", None),
    "ignored, as nohup does": ("trap '' HUP; exec {}", 0),
}


@pytest.mark.parametrize(("form", "status"), HANG_UPS.values(), ids=HANG_UPS)
async def test_a_terminal_that_goes_away(
    server: Server, tmp_path: Path, form: str, status: int | None
) -> None:
    """What is in flight comes home; a run that ignores the hang-up goes on to its target."""
    run = shlex.join(command(server, tmp_path / "run"))
    shell = ["setsid", "-wc", "sh", "-c", form.format(run)]
    terminal = Terminal(100)
    process = await started(shell, stdin=terminal.side, stdout=terminal.side, stderr=terminal.side)
    os.close(terminal.side)
    await under_way(server)
    terminal.close()
    code = await ended(process)
    with anyio.fail_after(20):
        while not session_ended(tmp_path / "run"):  # noqa: ASYNC110 - its shell may end before it
            await anyio.sleep(0.05)
    assert status is None or code == status
    assert_kept(server, tmp_path / "run", whole=status == 0)


async def test_a_window_that_closes_without_a_signal(server: Server, tmp_path: Path) -> None:
    """Each write to the terminal fails from then on; the run goes on and its status is right."""
    terminal = Terminal(100)
    run = command(server, tmp_path / "run")
    process = await started(run, stdout=terminal.side, stderr=terminal.side)
    os.close(terminal.side)
    await under_way(server)
    assert b"in flight" in terminal.shown
    terminal.close()
    assert await ended(process) == 0
    assert_kept(server, tmp_path / "run", whole=True)


SPOILT = {
    "stderr on a full device": "2>/dev/full",
    "stdout on a full device": ">/dev/full",
    "both on a full device": ">/dev/full 2>&1",
    "a reader of one line": "2>&1 | head -1 >/dev/null; exit ${PIPESTATUS[0]}",
    **{
        f"closed {' '.join(fds)}": " ".join(fds)
        for count in (1, 2, 3)
        for fds in itertools.combinations(("0<&-", "1>&-", "2>&-"), count)
    },
}


@pytest.mark.parametrize(("place", "streams"), list(enumerate(SPOILT.values())), ids=SPOILT)
async def test_streams_that_are_no_use(
    server: Server, tmp_path: Path, place: int, streams: str
) -> None:
    more = "--no-progress" if place % 2 else "--log-format=json"
    run = shlex.join(command(server, tmp_path / "run", more))
    assert await ended(await started(["bash", "-c", f"{run} {streams}"])) == 0
    assert_kept(server, tmp_path / "run", whole=True)


async def test_closed_streams_never_become_the_store(server: Server, tmp_path: Path) -> None:
    """Descriptors 0 to 2 are the null device, not a file or a socket of the run's."""
    run = shlex.join(command(server, tmp_path / "run"))
    process = await started(["bash", "-c", f"exec {run} 0<&- 1>&- 2>&-"])
    await under_way(server)
    opened = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in (0, 1, 2)]
    assert opened == [os.devnull] * 3
    assert await ended(process) == 0


async def test_nobody_reads_standard_error(server: Server, tmp_path: Path) -> None:
    """The pipe is full from the start; nothing waits for it."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with suppress(BlockingIOError):
        while True:
            os.write(write, bytes(65536))
    os.set_blocking(write, True)
    process = await started(
        command(server, tmp_path / "run"),
        stderr=write,
    )
    assert await ended(process) == 0
    assert_kept(server, tmp_path / "run", whole=True)
    os.close(read)
    os.close(write)


TERMINALS = {
    "no width": ({}, 0),
    "one column": ({}, 1),
    "dumb": ({"TERM": "dumb"}, 100),
    "no TERM": ({"TERM": ""}, 100),
    "ASCII": ({"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, 100),
}


@pytest.mark.parametrize(("environment", "columns"), TERMINALS.values(), ids=TERMINALS)
async def test_poor_terminals(
    server: Server, tmp_path: Path, environment: dict[str, str], columns: int
) -> None:
    """Of any width, kind and encoding; all of them say how the run ends."""
    terminal = Terminal(columns)
    run, side = command(server, tmp_path / "run"), terminal.side
    process = await started(run, stdout=side, stderr=side, environment=environment)
    assert await ended(process) == 0
    shown = await terminal.ended()
    assert b"accepted 60 of 60" in shown
    assert b"Traceback" not in shown
    assert_kept(server, tmp_path / "run", whole=True)


async def test_signals_that_mean_nothing(server: Server, tmp_path: Path) -> None:
    """A stop and its end, a new width, a broken pipe, a user's signal: the run goes on."""
    process = await started(command(server, tmp_path / "run"), stderr=PIPE)
    await under_way(server)
    meaningless = "TSTP CONT WINCH PIPE USR1 USR2 CHLD URG CONT"
    for name in meaningless.split():
        process.send_signal(signal.Signals[f"SIG{name}"])
        await anyio.sleep(0.02)
    with anyio.fail_after(40):
        _, said = await process.communicate()
    assert process.returncode == 0
    assert b"SIGUSR1: going on; accepted " in said
    assert_kept(server, tmp_path / "run", whole=True)


@pytest.mark.parametrize("signals", ["HUP HUP HUP", "TERM HUP", "INT HUP"])
async def test_a_hang_up_never_leaves_at_once(server: Server, tmp_path: Path, signals: str) -> None:
    """A closing terminal and its shell both send one, a service manager one after SIGTERM."""
    process = await started(command(server, tmp_path / "run"))
    await under_way(server)
    for name in signals.split():
        process.send_signal(signal.Signals[f"SIG{name}"])
        await anyio.sleep(0.05)
    assert await ended(process) == (130 if signals.startswith("INT") else 143)
    assert_kept(server, tmp_path / "run", whole=False)


async def test_the_folder_of_the_metrics_goes_away(server: Server, tmp_path: Path) -> None:
    """Said once, and the run goes on."""
    process = await started(
        command(server, tmp_path / "run", "--metrics-file", str(tmp_path / "gone" / "m.prom")),
        stderr=PIPE,
    )
    with anyio.fail_after(40):
        _, said = await process.communicate()
    assert process.returncode == 0
    assert said.count(b"--metrics-file: ") == 1
    assert_kept(server, tmp_path / "run", whole=True)


@pytest.mark.parametrize("how", ["renamed", "removed"])
async def test_a_run_folder_that_goes_away(server: Server, tmp_path: Path, how: str) -> None:
    """The disk's error is the status, and the missing dataset a line beside it."""
    process = await started(command(server, tmp_path / "run", "--target", "300"), stderr=PIPE)
    await under_way(server)
    while not accepted(tmp_path / "run"):  # noqa: ASYNC110 - another process brings them
        await anyio.sleep(0.02)
    if how == "renamed":
        (tmp_path / "run").rename(tmp_path / "moved")
    else:
        shutil.rmtree(tmp_path / "run")
    with anyio.fail_after(40):
        _, said = await process.communicate()
    errors = [line for line in said.decode().splitlines() if "error: " in line]
    assert process.returncode == 74, said
    assert "was removed or replaced" in errors[0]
    assert "holds no run" in errors[1]
    assert b"Traceback" not in said


def test_results_on_a_full_device_are_an_error(tmp_path: Path) -> None:
    """A report that nobody gets is not status 0."""
    run = [*WOOLMILL, "generate", "--backend", "scripted", "--no-semantic", "--target", "3"]
    subprocess.run([*run, "--out", tmp_path], check=True, cwd=ROOT, capture_output=True)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*WOOLMILL, "report", tmp_path], stdout=full, stderr=PIPE, cwd=ROOT, text=True
        )
    assert done.returncode == 74
    assert done.stderr.startswith("woolmill: error: standard output: No space left on device")
    assert done.stderr.count("\n") == 1


class Broken:
    """A display with a bug; rich leaves the process on a closed pipe, which is one too."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    def refresh(self, progress: Progress, pool: Pool) -> None:
        self.calls += 1
        raise self.error

    def note(self, message: str) -> None:
        self.calls += 1
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("boom"), OSError(5, "EIO"), SystemExit(1)])
async def test_a_display_with_a_bug_is_left(
    caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    """It is said once, what was to be shown is shown by the next, and nobody asks it again."""
    broken, other = Broken(error), io.StringIO()
    display = Guarded(broken, PlainDisplay(other))
    pool = Pool([ScriptedBackend()])
    display.note("first")
    display.note("second")
    display.refresh(Progress(target=1), pool)
    assert broken.calls == 1
    assert other.getvalue() == "woolmill: first\nwoolmill: second\n"
    assert [record.getMessage() for record in caplog.records] == [
        f"the display failed and is left, the run goes on ({type(error).__name__}: {error})"
    ]


def test_text_for_nobody_is_bounded_and_waits_for_nobody() -> None:
    """A writer is done at once, and memory does not grow, though no byte is ever taken."""
    read, write = os.pipe()
    pump = screen._Pump(write)
    began = time.monotonic()
    for _ in range(1000):
        assert pump.write(bytes(10_000)) == 10_000
    assert time.monotonic() - began < 30  # were a writer to wait, it would wait for ever
    assert sum(map(len, pump._waiting)) <= screen.MOST_WAITING_BYTES
    os.set_blocking(read, False)
    while pump._size:
        with suppress(BlockingIOError):
            os.read(read, 1 << 20)
    os.close(read)
    assert pump.write(b"to nobody") == 9
    pump.drain()


ENCODED = {"ascii": "* a - b... \\u4e16", "latin-1": "* a · b... \\u4e16", "utf-8": "● a · b… 世"}


@pytest.mark.parametrize("encoding", ENCODED)
def test_every_text_can_be_shown(encoding: str) -> None:
    """Signs of ours have plain forms where an encoding lacks them, others show their number."""
    with screen.sturdy_streams():
        text = "● a · b… 世"
        assert text.encode(encoding, screen.ERRORS).decode(encoding) == ENCODED[encoding]
