"""The process that decides: slow, stopped, killed, left behind, impossible to start."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
import pytest

from engine.backends.scripted import ScriptedBackend
from engine.decide.process import Deciding
from engine.errors import InputError, InternalError, UnavailableError
from engine.limits import Pool
from engine.run import generate as generate_module
from engine.run.display import SilentDisplay
from engine.run.generate import Result, generate
from engine.run.progress import Progress
from engine.settings import RunConfig
from engine.store import RunReader
from engine.store.inserts import Inserts
from engine.store.writer import Work
from engine.upkeep.verify import problems
from tests.engine.synthetic import answer_of

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

ROOT = Path(__file__).parents[2]


class Watched(Deciding):
    """Tells the ids of its processes."""

    pids: list[int]

    async def start(self) -> None:
        await super().start()
        assert self._process is not None
        type(self).pids.append(self._process.pid)


class Watcher(SilentDisplay):
    """Acts on progress, and keeps what is said."""

    def __init__(self, act: Callable[[Progress], None] = lambda progress: None) -> None:
        self.act = act
        self.notes: list[str] = []

    def refresh(self, progress: Progress, pool: Pool) -> None:
        self.act(progress)

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def pids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the processes that decide, as they start."""
    Watched.pids = []
    monkeypatch.setattr(generate_module, "Deciding", Watched)
    return Watched.pids


async def ran(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    watcher: Watcher,
    backend: ScriptedBackend | None = None,
    **settings: object,
) -> Result:
    backend = backend or ScriptedBackend(answer_of)
    monkeypatch.setattr(generate_module, "make_backends", lambda config: [backend])
    config = RunConfig.model_validate(
        {"backend": "scripted", "out": folder, "semantic": False, "target": 600, **settings}
    )
    return await generate(config, watcher)


def rows(folder: Path) -> list[tuple[int, int, str | None]]:
    with RunReader(folder) as run:
        return [(d.index, d.position, d.reason) for d in run.decisions()]


def in_decisions(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Have every Python process that starts from now on run ``code`` first."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(code))
    monkeypatch.setenv("PYTHONPATH", str(folder))


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def test_one_that_is_killed_is_replaced_and_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pids: list[int]
) -> None:
    """Killed in the middle of the run: the same decisions as without, and the person is told."""

    killed: list[int] = []

    def kill(progress: Progress) -> None:
        if not killed and progress.accepted > 50:
            killed.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)

    monkeypatch.setattr("engine.run.pipeline.showing.REFRESH_S", 0.002)
    watcher = Watcher(kill)
    slow = ScriptedBackend(answer_of, delay_s=0.02, max_in_flight=8)
    result = await ran(tmp_path / "killed", monkeypatch, watcher, slow)
    assert result.stop.reached
    assert len(pids) == 2
    assert any("ended by SIGKILL; starting another" in note for note in watcher.notes)
    await ran(tmp_path / "whole", monkeypatch, Watcher())
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert not list(problems(tmp_path / "killed"))


async def test_one_that_dies_again_and_again_ends_the_run_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pids: list[int]
) -> None:
    code = """
        import os
        from engine.decide.decider import Decider
        Decider.decide = lambda self, answers, limit: os._exit(9)
    """
    with monkeypatch.context() as patched:
        in_decisions(patched, tmp_path / "site", code)
        result = await ran(tmp_path / "run", monkeypatch, Watcher())
    assert isinstance(result.stop.error, UnavailableError)
    assert "status 9, and another too" in str(result.stop.error)
    assert len(pids) == 2
    result = await ran(tmp_path / "run", monkeypatch, Watcher())
    assert result.stop.reached
    assert result.progress.accepted == 600


async def test_the_loop_and_the_requests_go_on_while_it_stands_still_fault_076(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pids: list[int]
) -> None:
    """Stopped for half a second: requests are answered meanwhile, and it catches up."""
    answered: list[int] = []

    def stop_and_go(progress: Progress) -> None:
        if not answered and progress.accepted > 50:
            os.kill(pids[0], signal.SIGSTOP)
            asyncio.get_running_loop().call_later(0.5, os.kill, pids[0], signal.SIGCONT)
            asyncio.get_running_loop().call_later(
                0.5, lambda: answered.append(progress.answered - answered[0])
            )
            answered.append(progress.answered)

    monkeypatch.setattr("engine.run.pipeline.showing.REFRESH_S", 0.002)
    backend = ScriptedBackend(answer_of, delay_s=0.02, max_in_flight=4)
    result = await ran(tmp_path, monkeypatch, Watcher(stop_and_go), backend)
    assert result.stop.reached
    assert answered[1] > 20


async def test_who_wants_to_leave_at_once_does_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pids: list[int]
) -> None:
    """It stands still for ever; the second interrupt ends the run, and it goes on later."""

    def stop(progress: Progress) -> None:
        if progress.accepted > 50 and not stopped:
            stopped.append(progress.decided_answers)
            os.kill(pids[0], signal.SIGSTOP)
            for wait_s in (0.3, 0.6):
                asyncio.get_running_loop().call_later(wait_s, os.kill, os.getpid(), signal.SIGINT)

    stopped: list[int] = []
    monkeypatch.setattr("engine.run.pipeline.showing.REFRESH_S", 0.002)
    backend = ScriptedBackend(answer_of, delay_s=0.02, max_in_flight=4)
    with anyio.fail_after(20):
        result = await ran(tmp_path, monkeypatch, Watcher(stop), backend)
    assert result.stop.signum == signal.SIGINT
    assert result.progress.answered > result.progress.decided_answers
    assert gone(pids[0])
    assert (await ran(tmp_path, monkeypatch, Watcher())).stop.reached


async def test_a_store_that_refuses_decisions_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Inserts.commit

    def picky(self: Inserts, group: Sequence[Work]) -> None:
        if any(work.decided for work in group):
            raise InputError("no decisions here")
        commit(self, group)

    with monkeypatch.context() as patched, anyio.fail_after(20):
        patched.setattr(Inserts, "commit", picky)
        result = await ran(tmp_path, patched, Watcher())
    assert isinstance(result.stop.error, InputError)
    assert (await ran(tmp_path, monkeypatch, Watcher())).stop.reached


async def test_fault_109_decisions_that_lag_hold_sending_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that answers at once and decisions that take their time: never more than the window
    is sent and undecided, sending waits at its edge, and the run still reaches its target.
    """
    code = """
        import time
        from engine.decide.decider import Decider
        decide = Decider.decide
        def slow(self, answers, **options):
            time.sleep(0.05)
            return decide(self, answers, **options)
        Decider.decide = slow
    """
    seen: list[Progress] = []
    ahead: list[int] = []

    def answer(prompt: object) -> str:
        if seen:
            ahead.append(backend.calls.total() - seen[0].decided_answers)
        return answer_of(prompt)  # type: ignore[arg-type]

    monkeypatch.setattr("engine.run.plan.WINDOW", 40)
    in_decisions(monkeypatch, tmp_path / "site", code)
    backend = ScriptedBackend(answer)
    result = await ran(tmp_path / "run", monkeypatch, Watcher(seen.append), backend)
    assert result.stop.reached
    assert max(ahead) == 40


async def test_what_makes_a_start_impossible_is_said_and_nothing_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same error as in this process, before anything is paid."""
    backend = ScriptedBackend(answer_of)
    missing = tmp_path / "missing.jsonl"
    with pytest.raises(InputError, match=r"missing\.jsonl"):
        await ran(tmp_path / "run", monkeypatch, Watcher(), backend, against=(missing,))
    assert backend.calls.total() == 0


async def test_a_bug_in_it_shows_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops in order, with status 70 and the traceback of the other process."""
    code = """
        from engine.decide.decider import Decider
        Decider.decide = lambda self, answers, limit: 1 / 0
    """
    in_decisions(monkeypatch, tmp_path / "site", code)
    result = await ran(tmp_path / "run", monkeypatch, Watcher())
    assert isinstance(result.stop.error, InternalError)
    assert result.stop.error.exit_code == 70
    assert "ZeroDivisionError" in str(result.stop.error.__cause__)


def test_it_ends_with_its_parent_has_no_keys_and_is_deaf_to_the_terminal(tmp_path: Path) -> None:
    """A run that is killed leaves no process behind; an interrupt reaches the run alone."""
    code = f"""
        import os, signal
        from engine.cli.main import main
        from engine.decide.process import Deciding
        tell = Deciding.tell
        def told(self, below):
            if below > 20:
                pid = self._process.pid
                keys = b"sk-canary" in open(f"/proc/{{pid}}/environ", "rb").read()
                print(pid, os.getpgid(pid) != os.getpgrp(), keys, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            tell(self, below)
        Deciding.tell = told
        main(["generate", "--backend", "scripted", "--no-semantic", "--out", {str(tmp_path)!r},
              "--target", "500"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=os.environ | {"OPENAI_API_KEY": "sk-canary"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL
    pid, apart, keys = done.stdout.split()
    assert apart == "True"
    assert keys == "False"
    deadline = time.monotonic() + 10
    while not gone(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone(int(pid))


async def test_a_module_of_the_folder_one_is_in_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A downloaded folder with a package ``engine`` or a module ``numpy`` in it."""
    (tmp_path / "engine" / "decide").mkdir(parents=True)
    for name in ("engine/__init__.py", "engine/decide/child.py", "numpy.py"):
        (tmp_path / name).write_text("open('run-by-mistake', 'w')")
    monkeypatch.chdir(tmp_path)
    result = await ran(tmp_path / "run", monkeypatch, Watcher(), target=10)
    assert result.stop.reached
    assert not (tmp_path / "run-by-mistake").exists()


def test_no_room_for_the_process_is_said(tmp_path: Path) -> None:
    """Few file descriptors (``ulimit -n``): one line, and no bug of ours."""
    command = (
        "ulimit -n 20; exec "
        f"{sys.executable} -m engine generate --backend scripted --target 3 --no-semantic "
        f"--no-progress --out {tmp_path / 'run'}"
    )
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 69
    assert "ulimit -n" in done.stderr
    assert "Traceback" not in done.stderr
