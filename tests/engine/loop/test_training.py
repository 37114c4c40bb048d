"""The trainer as a child: what it is told, what it says, and how it ends with the loop."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InputError, UnavailableError
from engine.files import open_log
from engine.loop.training import losses, trainer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PROGRAM = "tests.engine.loop.stand_in"


def train(folder: Path, do: str, *, processes: int = 1, **own: Any) -> None:
    trainer(
        PROGRAM,
        {"do": do},
        {"output_dir": folder / "out", **own},
        processes=processes,
        cache=folder / "cache",
        log=folder / "training.log",
    )


def test_it_gets_the_person_s_flags_and_the_loop_s_own(tmp_path: Path) -> None:
    """Those of the loop come last, where they win."""
    trainer(
        PROGRAM,
        {"do": "stop", "output_dir": "elsewhere", "learning_rate": 1e-5},
        {"output_dir": tmp_path, "resume": True, "data_path": ["a", "b", "c"]},
        processes=1,
        cache=tmp_path / "cache",
        log=tmp_path / "log",
    )
    assert (tmp_path / "flags").read_text().split("\n") == [
        *("--template", "chat", "--do", "stop", "--output_dir", str(tmp_path)),
        *("--learning_rate", "1e-05", "--resume", "True", "--data_path", "a", "b", "c"),
        *("--dataset_cache_dir", str(tmp_path / "cache")),
    ]


def test_what_it_says_last_is_the_error_with_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        train(tmp_path, "fail")
    log = tmp_path / "training.log"
    assert str(raised.value) == (
        f"training: data.jsonl:3: field 'output' is missing; its log is {log}"
    )
    with pytest.raises(InputError, match=r"data.jsonl:3: field 'output' is missing"):
        train(tmp_path, "fail", processes=2)  # torchrun's own status is 1, and it speaks last
    with pytest.raises(UnavailableError, match="it ended with status 3; its log is"):
        train(tmp_path, "die")  # the line of the start before is not taken for its own
    assert "step 1" in log.read_text()


def loop_process(folder: Path) -> subprocess.Popen[bytes]:
    """A process that waits for its trainer, which has begun."""
    code = (
        "import sys; from pathlib import Path; from tests.engine.loop.test_training import train\n"
        "train(Path(sys.argv[1]), 'wait')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    while not (folder / "out" / "waits").exists():
        assert process.poll() is None
    return process


def test_at_ctrl_c_it_saves_where_it_is(tmp_path: Path) -> None:
    process = loop_process(tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.wait() == -signal.SIGINT
    assert (tmp_path / "out" / "saved").exists()


def test_killed_with_its_loop_it_is_gone_before_the_next_start(tmp_path: Path) -> None:
    """The lock of the log is free when nothing of it is left."""
    process = loop_process(tmp_path)
    process.kill()
    process.wait()
    with open_log(tmp_path / "training.log") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
    assert not (tmp_path / "out" / "saved").exists()


def test_a_start_waits_for_what_is_left_of_the_last_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Event()

    def start() -> None:
        trainer(
            PROGRAM, {"do": "stop"}, {"output_dir": tmp_path}, processes=1, cache=tmp_path,
            log=tmp_path / "log",
        )  # fmt: skip
        done.set()

    with open_log(tmp_path / "log") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        thread = threading.Thread(target=start)
        thread.start()
        while not caplog.messages:
            time.sleep(0.01)
        assert caplog.messages[0].startswith("waiting for the end of what an earlier start left")
        assert not (tmp_path / "flags").exists()
    thread.join()
    assert done.is_set()


def test_several_processes_are_torchrun_s(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="training: it ended with status"):
        trainer(
            "tests.engine.loop.no_such_module",
            {},
            {},
            processes=2,
            cache=tmp_path,
            log=tmp_path / "log",
        )
    assert "torch/distributed/run.py" in (tmp_path / "log").read_text()


def test_losses_that_are_none_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "loss.json").write_text('[{"loss": 1.5, "data": "a"}, {"loss": 2.0}]')
    assert losses(tmp_path) == [1.5, 2.0]
    (tmp_path / "loss.json").write_text('{"loss": 1}')
    with pytest.raises(InputError, match=r"loss\.json: is not what the trainer writes"):
        losses(tmp_path)
