"""Metrics: one whole line a step, also over a cut; other trackers where installed."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import ConfigError
from trainer.metrics import Metrics


def log(metrics: Metrics, step: int, loss: float = 2.0) -> None:
    metrics.step(
        step=step, loss=loss, grad_norm=1.0, learning_rate=0.1, tokens=90, targets=30, fill=0.9,
        seconds=3.0, cpu_seconds=2.0, peak_memory_mib=512.0,
    )  # fmt: skip


def test_a_resumed_run_cuts_its_curve_back(tmp_path: Path, capsys: Any) -> None:
    """Rows after the checkpoint go, and so does the half line that a kill left; every second row is
    printed, all are written, and what is not finite is null, not NaN.
    """
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path, from_step=0, every=2, report_to="none")
    first.evaluation(step=0, loss=3.0, targets=7)
    for step in (1, 2, 3):
        log(first, step, float("nan") if step == 2 else 2.0)
    first.close()
    assert capsys.readouterr().out.count("\nstep ") == 1
    path.write_text(path.read_text() + '{"step": 4, "lo')
    second = Metrics(path, from_step=2, every=1, report_to="none")
    log(second, 3, loss=1.5)
    second.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row.get("loss") for row in rows] == [None, 2.0, None, 1.5]
    assert rows[3]["tokens_per_s"] == 30.0


def test_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """trackio gets finite values only; a tracker that is not installed is a setting's fault."""
    calls: list[Any] = []
    fake: Any = types.ModuleType("trackio")
    fake.init = lambda **kwargs: calls.append(kwargs)
    fake.log = lambda values, step: calls.append((step, sorted(values)))
    fake.finish = lambda: calls.append("finished")
    monkeypatch.setitem(sys.modules, "trackio", fake)
    metrics = Metrics(tmp_path / "m.jsonl", from_step=0, every=1, report_to="trackio")
    metrics.evaluation(step=5, loss=float("inf"), targets=7)
    metrics.close()
    assert calls == [
        {"project": "woolmill", "name": tmp_path.name},
        (5, ["eval_targets"]),
        "finished",
    ]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="--report_to tensorboard: pip install tensorboard"):
        Metrics(tmp_path / "m.jsonl", from_step=0, every=1, report_to="tensorboard")


def test_wandb_is_told_names_and_numbers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own variables choose the project; the run's settings stay here."""
    calls: list[Any] = []
    fake: Any = types.ModuleType("wandb")
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append("finished"),
    )

    def init(**kwargs: Any) -> Any:
        calls.append(kwargs)
        return run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    metrics = Metrics(
        tmp_path / "m.jsonl", from_step=0, every=1, report_to=("wandb",), run_name="night"
    )
    metrics.evaluation(step=5, loss=2.0, targets=7)
    metrics.close()
    assert calls == [
        {"project": "mine", "name": "night", "dir": str(tmp_path)},
        (5, {"eval_loss": 2.0, "eval_targets": 7}),
        "finished",
    ]
