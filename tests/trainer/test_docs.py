"""The commands of docs/training.md, run one after the other as a reader would, on a tiny model."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_commands import ROOT, steps
from trainer.fetched import located

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def home(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which ``smollm2`` is a tiny model."""
    (tmp_path / "home" / "models").mkdir(parents=True)
    (tmp_path / "home" / "models" / "smollm2").symlink_to(llama)
    monkeypatch.setenv("WOOLMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def test_the_page_leads_from_a_run_to_a_model_that_answers(home: Path) -> None:
    listed = steps(ROOT / "docs" / "training.md")
    last = next(i for i, (_, line) in enumerate(listed) if "--config train.toml" in line)
    outputs = []
    for file, line in listed[: last + 1]:
        if file:
            (home / file).write_text(line)
            continue
        program, *arguments = shlex.split(line)
        command = {
            "python": [sys.executable],
            "woolmill": [sys.executable, "-m", "engine"],
            "torchrun": [sys.executable, "-m", "torch.distributed.run"],
        }[program]
        if {"trainer", "trainer.evaluate"} & set(arguments):
            arguments += ["--dataset_cache_dir", "cache", "--model_max_length", "240"]
        if "generate" in arguments:
            arguments.append("--no-semantic")
        done = subprocess.run(
            [*command, *arguments], cwd=home, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        outputs.append(done.stdout)
    assert any("⟦" in output for output in outputs)  # trainer.show
    assert "eval_loss" in (home / "out" / "metrics.jsonl").read_text()
    assert any("> Name three rivers." in output for output in outputs)
    assert any("resumed from checkpoint-" in output for output in outputs)
    for folder in ("out", "out-lora", "out-file"):
        for path in (home / folder).glob("*.safetensors"):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o644
    assert (home / "out-lora" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_fetched_model_is_found_by_name_and_missed_in_time(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert located("smollm2") == str(home / "home" / "models" / "smollm2")
    assert located("./smollm2") == "./smollm2"
    monkeypatch.setenv("WOOLMILL_HOME", str(home / "empty"))
    command = [sys.executable, "-m", "trainer", "--model_name_or_path", "smollm2"]
    done = subprocess.run(
        [*command, "--data_path", "none.json", "--output_dir", str(home / "out")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 78
    assert "woolmill models fetch smollm2" in done.stderr
    assert not (home / "out").exists()
