"""What a run says: lines for the person, one JSON object a step for programs.

``metrics.jsonl`` is the loss curve. A resumed run cuts it back to its checkpoint first, so that
every step stands in it once.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from trainer.errors import ConfigError

__all__ = ["Metrics", "Row", "peak_memory_mib", "say"]

Row = dict[str, float | int | None]
"""One line of metrics; None stands for a value that is not finite."""


def say(line: str) -> None:
    """One line to the person."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def peak_memory_mib(device: torch.device) -> float:
    """The most memory held so far: of the GPU, or else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Metrics:
    """The metrics of one run, on rank 0.

    Args:
        path: the JSON Lines file; created, or cut back to ``from_step`` steps and appended to.
        report_to: also TensorBoard or trackio, where installed.
    """

    def __init__(
        self,
        path: Path,
        *,
        from_step: int,
        every: int,
        report_to: Literal["none", "tensorboard", "trackio"],
    ) -> None:
        self._every = every
        self._tracker = _tracker(report_to, path.parent)
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
        if self._tracker is not None:
            self._tracker.close()

    def _write(self, row: Row) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._tracker is not None:
            values = {k: v for k, v in row.items() if k != "step" and v is not None}
            self._tracker.log(values, int(row["step"] or 0))


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


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: dict[str, float | int], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, folder: Path) -> None:
        import trackio  # type: ignore[import-not-found]

        self._trackio: Any = trackio
        trackio.init(project="woolmill", name=folder.name)

    def log(self, values: dict[str, float | int], step: int) -> None:
        self._trackio.log(values, step=step)

    def close(self) -> None:
        self._trackio.finish()


def _tracker(report_to: str, folder: Path) -> _TensorBoard | _Trackio | None:
    if report_to == "none":
        return None
    try:
        return _TensorBoard(folder) if report_to == "tensorboard" else _Trackio(folder)
    except ImportError as exc:
        raise ConfigError(f"--report_to {report_to}: pip install {report_to}") from exc
