"""python -m trainer.evaluate: the loss of a folder on records, as training itself computes it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.conftest import toy_records, write_records
from tests.trainer.launch import finish, start

pytestmark = pytest.mark.slow


def measured(folder: Path) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = json.loads((folder / "loss.json").read_text())
    return told


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_is_the_loss_that_training_tells_of_its_held_out_records(
    llama: Path, tmp_path: Path, ranks: int
) -> None:
    """Of the model before its first step and of the finished one; each file alone."""
    rows = toy_records(40)
    data = write_records(tmp_path / "data.json", rows[:30])
    held_out = write_records(tmp_path / "held_out.json", rows[30:36])
    other = write_records(tmp_path / "other.json", rows[36:])
    common = ["--dataset_cache_dir", str(tmp_path / "cache"), "--model_max_length", "200"]
    out = tmp_path / "out"
    arguments = [
        *("--model_name_or_path", str(llama), "--data_path", str(data), *common),
        *("--eval_data_path", str(held_out), "--eval_on_start", "--max_steps", "4"),
        *("--learning_rate", "3e-3", "--export_dtype", "float32", "--output_dir", str(out)),
    ]
    assert [end.exit_code for end in finish(start(arguments, tmp_path / "logs"))] == [0]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    before, after = (line["eval_loss"] for line in lines if "eval_loss" in line)
    assert after < before

    for model, loss in ((llama, before), (out, after)):
        scores = tmp_path / "scores"
        arguments = [
            *("--model_name_or_path", str(model), "--data_path", str(held_out), str(other)),
            *(*common, "--output_dir", str(scores)),
        ]
        run = start(arguments, tmp_path / "logs", ranks=ranks, command="trainer.evaluate")
        ends = finish(run)
        assert {end.exit_code for end in ends} == {0}, [end.output for end in ends]
        first, second = measured(scores)
        assert first["data"] == str(held_out)
        assert first["records"] == 6
        assert math.isclose(first["loss"], loss, rel_tol=1e-6)
        assert second["records"] == 4
        assert second["loss"] != first["loss"]


def test_what_is_wrong_is_one_line(llama: Path, tmp_path: Path) -> None:
    arguments = ["--model_name_or_path", str(llama), "--data_path", str(tmp_path / "none.json")]
    run = start(
        [*arguments, "--output_dir", str(tmp_path / "out")], tmp_path, command="trainer.evaluate"
    )
    (end,) = finish(run)
    assert end.exit_code == 78
    assert end.output.startswith("trainer: ")
    assert not (tmp_path / "out" / "loss.json").exists()
