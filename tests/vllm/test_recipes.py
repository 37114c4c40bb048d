"""Whole runs on a real vLLM: answers held to a schema, the stages of Self-Instruct, and run-batch
in a child.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from engine.backends.vllm.servers import Server
from engine.store import RunReader
from tests.vllm.test_real_vllm import ROOT

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

ROWS = 40
SORTED = """
[recipe]
name = "sorted"
[rows]
[stage]
user = "Is a {{ thing }} alive? Tell a story first."
give = { thing = "{{ thing }}", alive = "{{ alive }}", sure = "{{ sure }}" }
[stage.answer]
format = "json"
[stage.answer.schema]
type = "object"
required = ["alive", "sure"]
additionalProperties = false
[stage.answer.schema.properties]
alive = { enum = ["yes", "no"] }
sure = { enum = [1, 2, 3] }
"""


def woolmill(*arguments: str | Path, timeout: float = 590) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "engine", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done


def rows_file(folder: Path, count: int) -> Path:
    things = ["stone", "horse", "river", "oak", "lamp", "crow", "cloud", "rose"]
    path = folder / "things.jsonl"
    lines = [json.dumps({"thing": f"{things[n % 8]} number {n}"}) for n in range(count)]
    path.write_text("\n".join(lines))
    return path


def sort_things(folder: Path, count: int, *options: str | Path) -> Path:
    """A run of the recipe above over ``count`` rows; its folder."""
    spec, run = folder / "sorted.toml", folder / "run"
    spec.write_text(SORTED)
    woolmill(
        *("generate", "--recipe", spec, "--rows", rows_file(folder, count), "--out", run),
        *("--max-tokens", "48", "--no-progress", *options),
    )
    return run


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_that_is_held_to_a_schema(server: Server, tmp_path: Path) -> None:
    """All rows are decided, and each accepted one fits."""
    run = sort_things(tmp_path, ROWS, "--base-url", server.base_url)
    with RunReader(run) as store:
        counts = store.counts()
        assert counts.decided == ROWS
        # An answer may end at its limit in the blanks that JSON allows between two tokens.
        assert set(counts.reasons) <= {"cut_off"}
        accepted = [decision.record for decision in store.decisions(accepted=True)]
    assert len(accepted) > ROWS // 2
    schema = {
        "properties": {"alive": {"enum": ["yes", "no"]}, "sure": {"enum": [1, 2, 3]}},
        "required": ["thing", "alive", "sure"],
    }
    assert all(jsonschema_rs.is_valid(schema, record) for record in accepted)


def test_self_instruct(server: Server, tmp_path: Path) -> None:
    """Its three stages reach their target on the small model."""
    run = tmp_path / "run"
    woolmill(
        *("generate", "--recipe", "self-instruct", "--target", "10", "--out", run),
        *("--base-url", server.base_url, "--no-progress"),
    )
    woolmill("export", run, "-o", tmp_path / "rows.jsonl")
    assert len(rows_of(tmp_path / "rows.jsonl")) == 10


def test_run_batch_in_a_child(python: Path, tmp_path: Path) -> None:
    """Each input row is decided on an answer of vLLM's own run-batch."""
    run = sort_things(
        *(tmp_path, 8, "--backend", "batch", "--provider", "vllm", "--model", "smollm2"),
        *("--vllm-python", python, "--vllm-arg", "max_model_len=2048"),
    )
    with RunReader(run) as store:
        counts = store.counts()
        assert counts.decided == counts.answered == 8
        assert set(counts.reasons) <= {"cut_off"}
    assert not list((run / "batches").glob("*.jsonl"))
