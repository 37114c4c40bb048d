"""What became of each input row, and which models made what came of it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from click.testing import CliRunner
from pyarrow import parquet

from engine.cli.main import cli
from engine.errors import ConfigError, UsageError
from engine.records import Answer, Completion, Decision, Usage
from engine.stages import Lineage, open_stages, stages_of_run
from engine.store import Manifest, RunStore
from tests.engine.run.test_chain import ran, rows
from tests.engine.staged_runs import base, chain, invoke, made
from tests.engine.store_rows import MANIFEST, prompt
from tests.engine.test_stage_exports import SCORED

__all__ = ["base", "chain", "made"]  # fixtures

pytestmark = pytest.mark.slow


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def manifest(stage: str, **free: Any) -> Manifest:
    decision = {**MANIFEST.decision, "carry": ["id"]}
    return Manifest(
        fixed={"recipe": "own", "stage": stage, "model": "m", "samples": 1},
        decision=decision,
        free=free,
        engine_version=MANIFEST.engine_version,
    )


async def stage(
    folder: Path,
    manifest: Manifest,
    answers: Sequence[tuple[dict[str, Any], str | None]],
    reasons: Sequence[str | None],
) -> None:
    """Answers as (input row, model; None: it failed), and what was decided on the first of them."""
    store = RunStore.open(folder, manifest)
    await store.sent([prompt(i) for i in range(len(answers))], "m")
    usage = Usage(prompt_tokens=7, completion_tokens=3)
    kept = [
        Answer(
            index=i,
            demonstrations=(),
            row=row,
            completion=Completion(text="said", finish_reason="stop", usage=usage, model=model)
            if model
            else None,
            failure=None if model else "refused",
            message="" if model else "no",
        )
        for i, (row, model) in enumerate(answers)
    ]
    await store.answered(kept)
    decisions = [
        Decision(index=i, position=0, reason=reason, record={**answers[i][0], "by": str(i)})
        if reason is None
        else Decision(index=i, position=0, reason=reason, record=None, detail="so")
        for i, reason in enumerate(reasons)
    ]
    await store.decided(decisions, [None] * len(decisions))
    await store.aclose()


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """Six input rows: one refused and one failed when they were written about, one refused by the
    judge, one accepted, one whose judgement is not decided, one that nobody was asked about.
    """
    asked = [{"id": f"q{n}", "text": "why"} for n in range(6)]
    written = ["large", "small", "small", None, "large"]
    reasons = [None, "short", None, "failed:refused", None]
    run = tmp_path / "run"
    below = run / "stages" / "1-write"

    async def make() -> None:
        answers = list(zip(asked, written, strict=False))
        rows = tmp_path / "rows.jsonl"
        lines = [json.dumps(row) for row in asked]
        rows.write_text("\n".join([*lines[:2], "no JSON", *lines[2:]]))
        run.mkdir()
        (run / "bad_rows.jsonl").write_text('{"line": 3}\n')
        await stage(below, manifest("own/write", rows=str(rows)), answers, reasons)
        parents = [{**asked[n], "by": str(n)} for n in (0, 2, 4)]
        judged = manifest("own/judge", rows_identity=[1, 2, 3])
        await stage(run, judged, [(row, "judge") for row in parents], ["low", None])

    anyio.run(make)
    return run


def test_every_input_row_has_its_outcome(judged: Path, tmp_path: Path) -> None:
    told = invoke("export", judged, "--outcomes", "-o", tmp_path / "out.jsonl")
    found = lines(tmp_path / "out.jsonl")
    assert [(line["row"], line["id"], line["outcome"], line["open"]) for line in found] == [
        (0, "q0", "refused", 0),
        (1, "q1", "refused", 0),
        (2, "q2", "accepted", 0),
        (3, "q3", "failed", 0),
        (4, "q4", "open", 1),
        (5, "q5", "open", 1),
    ]
    assert [line["accepted"] for line in found] == [[], [], ["1.0"], [], [], []]
    assert found[0]["refused"] == [
        {"stage": "2-judge", "id": "0.0", "reason": "low", "detail": "so"}
    ]
    assert found[1]["refused"] == [
        {"stage": "1-write", "id": "1.0", "reason": "short", "detail": "so"}
    ]
    assert [line["input"] for line in found] == [{"id": f"q{n}", "text": "why"} for n in range(6)]
    assert told.startswith("6 input rows")
    assert told.splitlines()[1] == "2 refused, 2 open, 1 accepted, 1 failed"
    assert told.splitlines()[2].startswith("1 row besides cannot be read, named in ")
    (tmp_path / "rows.jsonl").unlink()
    told = invoke("export", judged, "--outcomes", "-o", tmp_path / "out.jsonl")
    assert lines(tmp_path / "out.jsonl") == found[:5]
    assert "rows that nobody was asked about have no line: " in told


@pytest.mark.parametrize("asked", ["--outcomes", "--refused"])
def test_a_field_that_is_carried_keeps_its_name(asked: str, tmp_path: Path) -> None:
    """And ours gets another, as in other exports."""
    own = {"row": 900, "outcome": "mine", "reason": "its own", "input": "in"}
    settings = manifest("", rows=str(tmp_path / "rows.jsonl"))
    settings = replace(settings, decision={**settings.decision, "carry": [*own]})
    run = tmp_path / "run"
    anyio.run(stage, run, settings, [(own, "m")], ["short"])
    invoke("export", run, asked, "-o", tmp_path / "out.jsonl")
    (line,) = lines(tmp_path / "out.jsonl")
    assert own.items() <= line.items()
    assert line["woolmill_row"] == 0
    assert line["woolmill_input"] == own
    told = "outcome" if asked == "--outcomes" else "reason"
    assert line[f"woolmill_{told}"] == ("refused" if asked == "--outcomes" else "short")


def test_a_stage_that_was_decided_again_is_refused(judged: Path, tmp_path: Path) -> None:
    """Rows are told apart by their rank, so that those of others would be named."""
    below = judged / "stages" / "1-write"
    shutil.rmtree(below)

    async def again() -> None:
        rows = [({"id": f"q{n}", "text": "why"}, "large") for n in range(5)]
        reasons = ["short", None, None, None, None]
        await stage(below, manifest("own/write", rows="rows.jsonl"), rows, reasons)

    anyio.run(again)
    for asked in ("--outcomes", "--lineage"):
        words = ["export", str(judged), asked, "-o", str(tmp_path / "out.jsonl")]
        error = CliRunner().invoke(cli, words).exception
        assert isinstance(error, ConfigError), asked
        assert "no longer gives" in str(error)


def test_a_row_names_the_models_of_all_stages(judged: Path, tmp_path: Path) -> None:
    invoke("export", judged, "-o", tmp_path / "out.jsonl")
    (row,) = lines(tmp_path / "out.jsonl")
    assert row["model"] == "judge"
    assert row["models"] == ["1-write:small", "2-judge:judge"]
    invoke("export", judged, "-o", tmp_path / "out.parquet")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["models"].to_pylist() == [row["models"]]
    invoke("export", judged / "stages" / "1-write", "-o", tmp_path / "below.jsonl")
    assert all("models" not in row for row in lines(tmp_path / "below.jsonl"))


def test_outcomes_of_samples_are_those_of_the_lineage(base: Path, tmp_path: Path) -> None:
    """Four samples of each row, and a judge that refuses some: counted anew from each decision."""
    (tmp_path / "scored.py").write_text(
        SCORED
        + """
    def refuse(self, row):
        return ("low", "") if row["score"] == 0 else None


Scores.refuse = Both.refuse
"""
    )
    recipe = f"{tmp_path / 'scored.py'}:Both"
    run = tmp_path / "run"

    async def make() -> None:
        await ran(run, base, "Rounds", recipe=recipe, rows=rows(tmp_path))

    anyio.run(make)
    invoke("export", run, "--outcomes", "--recipe", recipe, "-o", tmp_path / "out.jsonl")
    stages = stages_of_run(run)
    wanted: Counter[tuple[int, str | None]] = Counter()
    with open_stages(stages) as runs:
        for place, reader in enumerate(runs):
            lineage = Lineage(stages[: place + 1], runs[: place + 1])
            for each in reader.decisions(accepted=None if place else False):
                wanted[lineage.root(each.index, each.position)[0], each.reason] += 1
    found: Counter[tuple[int, str | None]] = Counter()
    for line in lines(tmp_path / "out.jsonl"):
        found[line["row"], None] += len(line["accepted"])
        for refused in line["refused"]:
            found[line["row"], refused["reason"]] += 1
        assert line["open"] == 0
        assert line["outcome"] == ("accepted" if line["accepted"] else "refused")
    assert +found == wanted
    assert {reason for _, reason in wanted} == {None, "low"}


def test_a_run_without_input_rows_has_no_outcomes(chain: Path, tmp_path: Path) -> None:
    words = ["export", str(chain), "--outcomes", "-o", str(tmp_path / "out.jsonl")]
    error = CliRunner().invoke(cli, words).exception
    assert isinstance(error, UsageError)
    assert "--rows" in str(error)
    error = CliRunner().invoke(cli, [*words, "--take", "3"]).exception
    assert isinstance(error, UsageError)
    assert "--outcomes goes alone" in str(error)
    assert not (tmp_path / "out.jsonl").exists()
