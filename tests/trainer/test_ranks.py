"""Ranks among each other: work is told from silence."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests.trainer.conftest import toy_records, write_records
from tests.trainer.launch import _context  # its fork server has torch loaded
from trainer.config import ParallelSettings

pytestmark = pytest.mark.slow

TIMEOUT_S = 2.0


def _rank(rank: int, port: int, what: str, log: Path) -> None:
    """Do ``what`` on rank 1 while rank 0 waits, and meet again; the outcome goes into ``log``."""
    from trainer.errors import TrainerError
    from trainer.ranks import Ranks, _Life, noticing_lost_ranks

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }

    def act() -> None:
        if rank == 1 and what == "work":
            time.sleep(2 * TIMEOUT_S)
        elif rank == 1 and what == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)

    try:
        with noticing_lost_ranks():
            ranks = Ranks.start(ParallelSettings(device="cpu", timeout_s=30.0))
            assert ranks.life is not None
            ranks.life.stop()  # the group has a longer timeout, for a slow start
            ranks = replace(ranks, life=_Life(rank, 2, TIMEOUT_S))
            ranks.together(act)
            ranks.together(lambda: None)
        log.write_text("met")
    except TrainerError as exc:
        log.write_text(str(exc))


def run(what: str, folder: Path) -> tuple[list[ForkServerProcess], list[Path]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [folder / f"{rank}" for rank in (0, 1)]
    ranks = [_context.Process(target=_rank, args=(n, port, what, logs[n])) for n in (0, 1)]
    for process in ranks:
        process.start()
    return ranks, logs


def test_work_of_another_rank_is_waited_for(tmp_path: Path) -> None:
    """Twice --timeout_s on one rank: the other waits, and both go on."""
    ranks, logs = run("work", tmp_path)
    for process in ranks:
        process.join(50)
    assert [log.read_text() for log in logs] == ["met", "met"]


def test_a_silent_rank_is_lost(tmp_path: Path) -> None:
    """One that is stopped shows no signs of life: after --timeout_s the other says so."""
    (waiting, hung), logs = run("hang", tmp_path)
    try:
        waiting.join(50)
        assert "another rank does not answer (--timeout_s)" in logs[0].read_text()
    finally:
        hung.kill()
        hung.join()


@pytest.mark.parametrize("begun", [True, False])
def test_ranks_end_when_torchrun_is_killed(llama: Path, tmp_path: Path, begun: bool) -> None:
    """While they train, and before they have loaded anything. They are in sessions of their own;
    the log is theirs until they are gone.
    """
    data = write_records(tmp_path / "data.json", toy_records(40))
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("-m", "trainer", "--model_name_or_path", str(llama), "--data_path", str(data)),
        *("--dataset_cache_dir", str(tmp_path / "cache"), "--model_max_length", "200"),
        *("--max_steps", "100000", "--save_steps", "100000", "--output_dir", str(out)),
    ]
    with (tmp_path / "log").open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        torchrun = subprocess.Popen(command, stdout=log, stderr=log)
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children")
    metrics = out / "metrics.jsonl"

    def ready() -> bool:
        if not begun:
            return len(children.read_text().split()) == 2
        return metrics.exists() and metrics.read_text().count("\n") >= 3

    while not ready():
        assert torchrun.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    torchrun.kill()
    torchrun.wait()
    with (tmp_path / "log").open() as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # returns when the last rank is gone
    assert metrics.exists() == begun
