"""Runs of several stages, for all that reads runs: lineage, upkeep, export, report, view."""

from __future__ import annotations

import re
import shutil
from html import escape
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from click.testing import CliRunner

from engine.cli.main import cli
from engine.errors import ConfigError
from engine.stages import Lineage, open_stages, stages_of_run
from engine.store import RunReader
from engine.upkeep.verify import problems
from tests.engine.browser import Chromium
from tests.engine.run.test_chain import accepted, dump, ran, spec, stage_folders
from tests.engine.test_view import served, stage_rows

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each kind, made once."""
    return tmp_path_factory.mktemp("staged")


@pytest.fixture(scope="module")
def made(base: Path) -> Path:
    async def make() -> None:
        await ran(base / "chain", base, "Chain", target=40)

    anyio.run(make)
    return base / "chain"


@pytest.fixture
def chain(made: Path, tmp_path: Path) -> Path:
    """A run of three stages: ask, answer, judge."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def invoke(*words: object) -> str:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def code(base: Path) -> tuple[str, str]:
    return "--recipe", spec(base, "Chain")


# -- lineage --------------------------------------------------------------------------------------


def test_a_row_s_lineage_is_what_it_was_made_of(chain: Path) -> None:
    """Checked by the fields: each stage of this recipe keeps those of the row it was given."""
    stages = stages_of_run(chain)
    assert [stage.name for stage in stages] == ["1-ask", "2-answer", "3-judge"]
    with open_stages(stages) as runs:
        lineage = Lineage(stages, runs)
        for decision in runs[-1].decisions(accepted=True):
            (one, n, p), (two, m, q) = lineage.parents(decision.index)
            assert (one, two) == ("2-answer", "1-ask")
            answer, question = runs[1].decision(n, p), runs[0].decision(m, q)
            assert answer is not None
            assert question is not None
            assert answer.record
            assert question.record
            assert decision.record
            assert answer.record["answer"] == decision.record["answer"]
            assert question.record["question"] == answer.record["question"]


# -- deciding again -------------------------------------------------------------------------------


def redecide(chain: Path, base: Path, *more: str) -> str:
    return invoke("redecide", chain, "--stage", "ask", *code(base), *more)


def test_a_dry_run_says_what_would_change_and_changes_nothing(chain: Path, base: Path) -> None:
    was = [dump(folder) for folder in stage_folders(chain)]
    told = redecide(chain, base, "--rouge-threshold", "0.3", "--dry-run")
    assert "would be accepted" in told
    assert "duplicate_rouge" in told
    assert "stage 2-answer" in told
    assert "stage 3-judge" in told
    assert [dump(folder) for folder in stage_folders(chain)] == was
    assert not list((chain / "stages" / "1-ask").glob(".trial*"))


async def test_dropping_stale_answers_lets_the_run_go_on(
    chain: Path, base: Path, tmp_path: Path
) -> None:
    """The dataset is that of a run which had these settings from the start, and what was still
    good is not asked again."""
    await anyio.to_thread.run_sync(redecide, chain, base, "--rouge-threshold", "0.3")
    again: dict[str, Any] = {"target": 40, "rouge_threshold": 0.3}
    for _ in range(2):  # a start that is refused is refused again
        with pytest.raises(
            ConfigError, match=r"woolmill redecide .*run --stage 1-ask --drop-stale"
        ):
            await ran(chain, base, "Chain", **again)
    with RunReader(chain / "stages" / "2-answer") as run:
        kept = {answer.index: at for answer, at in run.all_answers()}
    told = await anyio.to_thread.run_sync(redecide, chain, base, "--drop-stale")
    assert "dropped" in told
    for folder in stage_folders(chain):
        assert list(problems(folder)) == []
    with RunReader(chain / "stages" / "2-answer") as run:
        left = {answer.index: at for answer, at in run.all_answers()}
        assert run.counts().wasted == len(kept) - len(left)
    assert 0 < len(left) < len(kept)
    await ran(chain, base, "Chain", **again)
    await ran(tmp_path / "new", base, "Chain", **again)
    assert accepted(chain) == accepted(tmp_path / "new")
    with RunReader(chain / "stages" / "2-answer") as run:
        now = {answer.index: at for answer, at in run.all_answers()}
    assert left.items() <= now.items()
    for folder in stage_folders(chain):
        assert list(problems(folder)) == []


# -- the view -------------------------------------------------------------------------------------


def test_the_browser_shows_a_refused_row_with_all_that_it_was_made_of(
    chain: Path, chromium: Chromium
) -> None:
    """A row that the last stage refused, its answer, its parent and its grandparent; and the page
    of another stage, with rows of its own."""
    with RunReader(chain) as run:
        refused = next(run.decisions(accepted=False))
    with open_stages(stages_of_run(chain)) as runs:
        (_, n, p), (_, m, q) = Lineage(stages_of_run(chain), runs).parents(refused.index)
        own, parents = runs[2].answers(refused.index, 1)[0], runs[1].answers(n, 1)[0]
        question = runs[0].decision(m, q)
        first = next(runs[0].decisions(accepted=False))
    assert own.completion is not None
    assert parents.completion is not None
    assert question is not None
    assert question.record
    with served(chain) as page:
        seen = chromium.open(f"{page.link}#{refused.index}.{refused.position}")
        assert seen.console == []
        assert "low: " in seen.dom
        for text in (own.completion.text, parents.completion.text, question.record["question"]):
            assert escape(text, quote=False) in seen.dom
        assert f"stage 2-answer, row {n}.{p}</summary>" in seen.dom
        assert f"stage 1-ask, row {m}.{q}</summary>" in seen.dom
        assert "Judge: " in seen.dom
        assert "Answer: " in seen.dom
        assert "Give three questions" in seen.dom
        options = re.findall(r'<option value="(\d-[^"]+)"', seen.dom)
        assert options == ["1-ask", "2-answer", "3-judge"]
        there = chromium.open(f"{page.link}&stage=1-ask#{first.index}.{first.position}")
        assert there.console == []
        assert f"<h2>row {first.index}.{first.position}</h2>" in there.dom
        assert "short" in there.dom
        assert "/report?stage=1-ask" in there.dom


def test_the_stages_are_searched_and_counted_apart(chain: Path) -> None:
    with served(chain) as page:
        found = {
            name: page.get(f"/api/state?stage={name}").json()["accepted"]
            for name in ("1-ask", "2-answer", "3-judge")
        }
        assert found == {stage.name: len(accepted(stage.folder)) for stage in stages_of_run(chain)}
        assert page.get("/api/state").json()["accepted"] == found["3-judge"]
        asked = page.get("/api/rows?stage=1-ask&q=w1").json()["rows"]
        assert asked
        assert all("w1" in row["text"] for row in asked)
        metrics = page.get("/metrics").text
        assert f'woolmill_accepted_records_total{{stage="1-ask"}} {found["1-ask"]}' in metrics
        assert 'woolmill_target_records{stage="3-judge"} 40' in metrics
        assert metrics.count("# TYPE woolmill_accepted_records_total") == 1


def test_a_parent_that_is_another_now_is_not_shown(chain: Path, base: Path) -> None:
    """After a stage was decided again, rows behind it do not get a stranger for a parent."""
    last = next(d for d in reversed(dump(chain)))
    redecide(chain, base, "--rouge-threshold", "0.2")
    rows = stage_rows(chain)
    parent = rows[1].row(last[0], 0)["parent"]
    assert parent["missing"].startswith("what it was made of is no longer there")
    for each in rows:
        each.close()
