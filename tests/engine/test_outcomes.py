"""What became of each input row, and which models made what came of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import pytest
from click.testing import CliRunner
from pyarrow import parquet

from engine.cli.main import cli
from engine.errors import UsageError
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
    answers: list[tuple[dict[str, Any], str | None]],
    reasons: list[str | None],
    size: int | None = None,
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
    if size is not None:
        await store.keep_size(size)
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
        await stage(below, manifest("own/write", rows="rows.jsonl"), answers, reasons, size=6)
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
        (5, None, "open", 1),
    ]
    assert [line["accepted"] for line in found] == [[], [], ["1.0"], [], [], []]
    assert found[0]["refused"] == [
        {"stage": "2-judge", "id": "0.0", "reason": "low", "detail": "so"}
    ]
    assert found[1]["refused"] == [
        {"stage": "1-write", "id": "1.0", "reason": "short", "detail": "so"}
    ]
    assert [line["input"] and line["input"]["id"] for line in found] == [
        *("q0", "q1", "q2", "q3", "q4"),
        None,
    ]
    assert told.startswith("6 input rows")
    assert told.splitlines()[1] == "2 refused, 2 open, 1 accepted, 1 failed"


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
