"""Run the trainer's real command in processes of its own, cheaply.

torchrun and a fresh interpreter cost ten seconds a run; a fork server that has torch and
transformers loaded costs a tenth of one. What runs is ``trainer.train.main`` with torchrun's
environment.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

__all__ = ["Finished", "Run", "curve", "finish", "start"]

# Read when the server imports its packages.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["trainer.loop", "trainer.lora", "peft"])


@dataclass(frozen=True)
class Finished:
    """One rank's end."""

    exit_code: int
    """Negative: the signal that ended it."""
    output: str


@dataclass(frozen=True)
class Run:
    """The processes of a run under way."""

    processes: list[ForkServerProcess]
    logs: list[Path]


def start(
    arguments: Sequence[str],
    logs: Path,
    *,
    ranks: int = 1,
    failpoint: str | None = None,
    file_limit: int | None = None,
    command: str = "trainer.train",
) -> Run:
    """Start ``python -m trainer ARGUMENTS`` on ``ranks`` processes.

    Args:
        command: the module whose ``main`` runs.
        file_limit: bytes that a file may have: a disk that is full for large files.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs.mkdir(parents=True, exist_ok=True)
    run = Run([], [logs / f"rank{rank}.log" for rank in range(ranks)])
    for rank in range(ranks):
        environment: dict[str, str] = {}
        if ranks > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        process = _context.Process(
            target=_main,
            args=(list(arguments), environment, run.logs[rank], failpoint, file_limit, command),
        )
        process.start()
        run.processes.append(process)
    return run


def finish(run: Run, *, wait_s: float = 100.0, patience_s: float = 50.0) -> list[Finished]:
    """Wait for rank 0 ``wait_s``, and for the others ``patience_s`` more; who is not done then is
    killed, which counts as -9.
    """
    out: list[Finished] = []
    for process, log in zip(run.processes, run.logs, strict=True):
        process.join(patience_s if out else wait_s)
        if process.exitcode is None:
            process.kill()
            process.join()
        assert process.exitcode is not None
        out.append(Finished(process.exitcode, log.read_text()))
        process.close()
    return out


def curve(output_dir: Path) -> list[tuple[float, float, float]]:
    """(loss, gradient norm, learning rate) of every step, exactly."""
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    return [(row["loss"], row["grad_norm"], row["learning_rate"]) for row in steps]


def _main(
    arguments: list[str],
    environment: dict[str, str],
    log: Path,
    failpoint: str | None,
    file_limit: int | None,
    command: str,
) -> None:
    os.environ.update(environment)
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    import torch

    from trainer import failpoints

    main = importlib.import_module(command).main
    torch.set_num_threads(1)
    failpoints.arm(failpoint)
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    with contextlib.suppress(SystemExit):
        code = main(arguments)
        sys.stdout.flush()
        os._exit(code)
