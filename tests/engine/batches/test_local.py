"""Batches without a provider: carried elsewhere, and by vLLM's run-batch in a child."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from engine.store import RunReader
from tests.engine.batches.runs import ROOT, environment
from tests.engine.batches.world import answer_elsewhere

pytestmark = pytest.mark.slow

FAKE = ROOT / "tests" / "engine" / "backends" / "fake_vllm"


def woolmill(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engine", *arguments],
        env=environment(**env),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def generate(out: Path, *options: str, target: int = 24, **env: str) -> tuple[int, str]:
    run = woolmill(
        *("generate", "--backend", "batch", "--model", "m", "--target", str(target)),
        *("--out", str(out), "--no-semantic", "--no-progress", "--poll", "0.05", *options),
        **env,
    )
    return run.returncode, run.stderr


def test_batches_are_carried_elsewhere_and_back(tmp_path: Path) -> None:
    out, requests, answers = tmp_path / "run", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    status, said = generate(out, "--provider", "file", "--wait", "0")
    assert status == 75, said
    made = woolmill("batch", "export", str(out), "-o", str(requests))
    assert made.returncode == 0, made.stderr
    first = json.loads(requests.read_text().splitlines()[0])
    assert first["url"] == "/v1/chat/completions"
    assert woolmill("batch", "export", str(out), "-o", str(requests)).returncode == 65

    answer_elsewhere(requests, answers, slice(3))
    short = woolmill("batch", "import", str(out), str(answers))
    assert short.returncode == 65
    assert "5 of 8 requests have no answer" in short.stderr

    answer_elsewhere(requests, answers)
    foreign = {"custom_id": "00000000-1-00000000", "response": {"status_code": 200, "body": {}}}
    answers.write_text(f"{json.dumps(foreign)}\nno json\n{answers.read_text()}")
    brought = woolmill("batch", "import", str(out), str(answers))
    assert brought.returncode == 0, brought.stderr
    assert "8 answers to 8 requests, 2 lines that answer none of them" in brought.stdout
    status, said = generate(out, "--provider", "file")
    assert status == 0, said
    with RunReader(out) as run:
        assert run.counts().answered == 8
        assert run.counts().accepted == 24


def test_what_is_missing_in_part_is_asked_again(tmp_path: Path) -> None:
    out, requests, answers = tmp_path / "run", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    assert generate(out, "--provider", "file", "--wait", "0")[0] == 75
    assert woolmill("batch", "export", str(out), "-o", str(requests)).returncode == 0
    answer_elsewhere(requests, answers, slice(3))
    assert woolmill("batch", "import", str(out), str(answers), "--partial").returncode == 0
    status, said = generate(out, "--provider", "file", "--wait", "0")
    assert status == 75, said
    assert "3 answered, 5 unsent" in said
    again = tmp_path / "again.jsonl"
    assert woolmill("batch", "export", str(out), "-o", str(again)).returncode == 0
    left = {json.loads(line)["custom_id"] for line in again.read_text().splitlines()}
    all_ = {json.loads(line)["custom_id"] for line in requests.read_text().splitlines()}
    assert len(left & all_) == 5


def test_batches_are_listed_and_forgotten(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert generate(out, "--provider", "file", "--wait", "0")[0] == 75
    listed = woolmill("batches", str(out))
    assert listed.returncode == 0, listed.stderr
    assert "8 requests" in listed.stdout
    assert "1 open with 8 requests; 0 answers so far" in listed.stdout
    report = woolmill("report", str(out), "--format", "json")
    assert json.loads(report.stdout)["in_flight"] == 8
    forgotten = woolmill("batches", str(out), "--forget")
    assert "forgot 1 batch with 8 requests" in forgotten.stdout
    assert "0 open" in woolmill("batches", str(out)).stdout
    assert woolmill("verify", str(out)).returncode == 0


def python(folder: Path, **env: str) -> Path:
    """An interpreter whose environment has the fake vLLM."""
    path = folder / "python"
    given = " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items())
    paths = shlex.quote(f"{FAKE}:{ROOT}")
    path.write_text(f'#!/bin/sh\nPYTHONPATH={paths} {given} exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def test_run_batch_in_a_child(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    options = ("--provider", "vllm", "--model", str(model), "--vllm-python")
    status, said = generate(tmp_path / "run", *options, str(python(tmp_path)))
    assert status == 0, said
    with RunReader(tmp_path / "run") as run:
        assert run.counts().accepted == 24
        assert run.counts().wasted == 0


def test_what_a_child_wrote_before_it_died_is_kept(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    dies = python(tmp_path, VLLM_FAKE_DIES=str(tmp_path / "mark"))
    options = ("--provider", "vllm", "--model", str(model), "--vllm-python", str(dies))
    status, said = generate(tmp_path / "run", *options)
    assert status == 0, said
    assert "4 answered, 4 unsent" in said
