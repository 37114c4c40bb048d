"""What a run says: lines for the person, one JSON object a step for programs.

``metrics.jsonl`` is the loss curve. A resumed run cuts it back to its checkpoint first, so that
every step stands in it once.
"""

from __future__ import annotations

import functools
import json
import math
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
import torch.distributed as dist

from trainer.errors import ConfigError

__all__ = ["Metrics", "Row", "peak_memory_mib", "say", "say_once"]

Row = dict[str, float | int | None]
"""One line of metrics; None stands for a value that is not finite."""


def say(line: str) -> None:
    """One line to the person."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@functools.cache
def say_once(line: str) -> None:
    """One line to the person, from rank 0 alone, however often it comes up."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        say(line)


def peak_memory_mib(device: torch.device) -> float:
    """The most memory held so far: of the GPU, or else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Metrics:
    """The metrics of one run, on rank 0.

    Args:
        path: the JSON Lines file; created, or cut back to ``from_step`` steps and appended to.
        every: how many steps a printed line stands for.
        report_to: trackers that are told too, one or several of them, or ``none``.
        run_name: what trackers call the run; None: as the folder of ``path`` is called.
        logging_dir: where TensorBoard's files go; None: beside ``path``.

    Raises:
        ConfigError: a tracker is not installed.
    """

    def __init__(
        self,
        path: Path,
        *,
        from_step: int,
        every: int,
        report_to: str | Sequence[str] = (),
        run_name: str | None = None,
        logging_dir: Path | None = None,
    ) -> None:
        self._every = every
        names = report_to.split(",") if isinstance(report_to, str) else report_to
        place = _Place(path.parent, run_name or path.parent.name, logging_dir)
        self._trackers = [_tracker(name, place) for name in names if name != "none"]
        _cut_back(path, from_step)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def step(
        self,
        *,
        step: int,
        loss: float,
        grad_norm: float,
        learning_rate: float,
        tokens: int,
        targets: int,
        fill: float,
        seconds: float,
        cpu_seconds: float,
        peak_memory_mib: float,
    ) -> None:
        """Write one training step's row; print it if its number is due.

        Args:
            step: from 1.
            loss: nats a target token.
            tokens: of the global batch, padding not counted; ``targets`` of them are learned.
            fill: ``tokens`` as a share of what went through the model.
            seconds: wall clock; ``cpu_seconds``: of all threads of rank 0.
        """
        self._write(
            {
                "step": step,
                "loss": _finite(loss),
                "grad_norm": _finite(grad_norm),
                "learning_rate": learning_rate,
                "tokens": tokens,
                "targets": targets,
                "fill": round(fill, 4),
                "tokens_per_s": round(tokens / seconds, 2),
                "cpu_s": round(cpu_seconds, 4),
                "peak_memory_mib": round(peak_memory_mib, 1),
            }
        )
        if step % self._every == 0:
            say(
                f"step {step:>6}  loss {loss:.4f}  grad {grad_norm:.3f}  lr {learning_rate:.2e}"
                f"  {tokens / seconds:,.0f} tokens/s  {peak_memory_mib / 1024:.2f} GiB"
            )

    def evaluation(self, *, step: int, loss: float, targets: int) -> None:
        """Write and print the loss on held-out records."""
        self._write({"step": step, "eval_loss": _finite(loss), "eval_targets": targets})
        say(f"step {step:>6}  held-out loss {loss:.4f}")

    def close(self) -> None:
        """Flush everything to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _write(self, row: Row) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        values = {k: v for k, v in row.items() if k != "step" and v is not None}
        for tracker in self._trackers:
            tracker.log(values, int(row["step"] or 0))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cut_back(path: Path, steps: int) -> None:
    lines: list[str] = []
    if steps and path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # The last line may be torn by a kill.
    kept = (line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= steps)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.rename(path)


@dataclass(frozen=True, slots=True)
class _Place:
    folder: Path
    name: str
    logging_dir: Path | None


class _Tracker(Protocol):
    def __init__(self, place: _Place) -> None: ...

    def log(self, values: dict[str, float | int], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, place: _Place) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(place.logging_dir or place.folder / "tensorboard"))

    def log(self, values: dict[str, float | int], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, place: _Place) -> None:
        import trackio

        self._trackio: Any = trackio
        trackio.init(project="woolmill", name=place.name)

    def log(self, values: dict[str, float | int], step: int) -> None:
        self._trackio.log(values, step=step)

    def close(self) -> None:
        self._trackio.finish()


class _Wandb:
    """Its own variables (WANDB_PROJECT, WANDB_MODE, WANDB_RUN_ID and others) hold. It is given no
    settings: their paths and names are nobody else's business.
    """

    def __init__(self, place: _Place) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "woolmill")
        self._run: Any = wandb.init(project=project, name=place.name, dir=str(place.folder))

    def log(self, values: dict[str, float | int], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, type[_Tracker]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _Wandb,
}
"""By their names in ``--report_to``."""


def _tracker(name: str, place: _Place) -> _Tracker:
    try:
        return _TRACKERS[name](place)
    except ImportError as exc:
        raise ConfigError(f"--report_to {name}: pip install {name}") from exc
