"""Runs of several stages, for all that reads runs: lineage, upkeep, export, report, view."""

from __future__ import annotations

import io
import json
import re
import shutil
import sqlite3
from collections import Counter
from contextlib import closing, redirect_stdout
from html import escape
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from click.testing import CliRunner

from engine.cli.ending import Ended, say
from engine.cli.main import cli
from engine.errors import (
    DONE_WITH_DEAD_LETTERS,
    ConfigError,
    DiskError,
    InputError,
    UsageError,
)
from engine.records import Answer
from engine.report.stages import costs
from engine.run.generate import Result
from engine.run.progress import Progress, Stop
from engine.stages import Lineage, open_stages, stages_of_run
from engine.store import Counts, RunReader, RunStore
from engine.upkeep.verify import problems
from tests.engine.browser import Chromium
from tests.engine.run.test_chain import accepted, dump, ran, spec, stage_folders
from tests.engine.staged_runs import base, chain, code, invoke, made
from tests.engine.test_view import served, stage_rows

__all__ = ["base", "chain", "made"]  # fixtures

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


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
    # The same where the stage's own folder is named.
    words = (chain / "stages" / "1-ask", *code(base), "--rouge-threshold", "0.3", "--dry-run")
    assert invoke("redecide", *words) == told
    for wrong in (("--stage", "none"), ("--stage", "1-ask", "--target", "5")):
        result = CliRunner().invoke(cli, ["redecide", str(chain), *wrong])
        assert isinstance(result.exception, UsageError)
    dropping = ["redecide", str(chain), "--stage", "ask", "--drop-refused", "unwanted"]
    said = str(CliRunner().invoke(cli, dropping).exception)
    assert f"in a new run: woolmill export {chain} --outcomes names them" in said


async def test_dropping_stale_answers_lets_the_run_go_on(
    chain: Path, base: Path, tmp_path: Path
) -> None:
    """The dataset is that of a run which had these settings from the start, and what was still
    good is not asked again."""
    told = await anyio.to_thread.run_sync(redecide, chain, base, "--rouge-threshold", "0.3")
    assert f"go on with: woolmill redecide {chain} --stage 1-ask --drop-stale\n" in told
    assert re.search(
        r"^and then:   woolmill generate .* --rouge-threshold 0\.3 .*--out ", told, re.M
    )
    again: dict[str, Any] = {"target": 40, "rouge_threshold": 0.3}
    for _ in range(2):  # a start that is refused is refused again
        with pytest.raises(
            ConfigError, match=r"woolmill redecide .*run --stage 1-ask --drop-stale"
        ):
            await ran(chain, base, "Chain", **again)
    with RunReader(chain / "stages" / "2-answer") as run:
        kept = {answer.index: at for answer, at in run.all_answers()}
    words = ("redecide", chain, "--stage", "1-ask", "--drop-stale")  # no recipe is needed for it
    told = await anyio.to_thread.run_sync(invoke, *words)
    assert told.startswith("dropped ")
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


def test_nothing_changes_where_nothing_is_changed(chain: Path, base: Path) -> None:
    told = invoke("redecide", chain, *code(base), "--dry-run")
    assert told == "40 rows would be accepted (now 40): 0 come, 0 go\n"
    was = [dump(folder) for folder in stage_folders(chain)]
    told = redecide(chain, base)
    assert "no answer of a later stage becomes stale" in told
    assert [dump(folder) for folder in stage_folders(chain)] == was


async def test_a_drop_that_is_cut_short_is_no_run_that_goes_on(
    chain: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last stage's answers go first, so that the stage before still refuses; the same command
    drops the rest."""
    words = ("--rouge-threshold", "0.3", "--drop-stale")
    dropping, seen = RunStore.drop_answers, list[str]()

    def cut_short(store: RunStore, *requests: Any, **group: Any) -> None:
        seen.append(store.folder.name)
        if len(seen) == 2:
            raise DiskError("no more")
        dropping(store, *requests, **group)

    monkeypatch.setattr(RunStore, "drop_answers", cut_short)
    with pytest.raises(AssertionError, match="no more"):
        await anyio.to_thread.run_sync(redecide, chain, base, *words)
    assert seen == ["run", "2-answer"]
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="--drop-stale"):
        await ran(chain, base, "Chain", target=40, rouge_threshold=0.3)
    told = await anyio.to_thread.run_sync(redecide, chain, base, *words)
    assert "dropped " in told
    for folder in stage_folders(chain):
        assert list(problems(folder)) == []


# -- verify, salvage, merge -----------------------------------------------------------------------


def test_verify_covers_all_stages(chain: Path, base: Path) -> None:
    told = invoke("verify", chain)
    assert [line[:15].split(":")[0] for line in told.splitlines()] == [
        "stage 1-ask",
        "stage 2-answer",
        "stage 3-judge",
    ]
    assert told.count(": sound (") == 3
    redecide(chain, base, "--rouge-threshold", "0.3")
    told = invoke("verify", chain)
    assert "of its answers are about rows that stage 1-ask no longer gives" in told
    assert told.count(": sound (") == 3


def test_verify_names_the_stage_that_is_damaged_and_salvage_saves_the_rest(
    chain: Path, tmp_path: Path
) -> None:
    was = [dump(folder) for folder in stage_folders(chain)]
    with closing(sqlite3.connect(chain / "stages" / "2-answer" / "run.sqlite")) as store:
        store.execute("UPDATE answer SET body = replace(body, 'a', 'b') WHERE request = 3")
        store.commit()
    result = CliRunner().invoke(cli, ["verify", str(chain)])
    assert isinstance(result.exception, InputError)
    assert "stage 2-answer: " in result.output
    assert "row 3" in result.output
    assert "stage 1-ask: " not in result.output
    told = invoke("salvage", chain, "-o", tmp_path / "saved")
    assert "stage 2-answer: lost: 1 answer, to be asked for again" in told
    saved = [dump(folder) for folder in stage_folders(tmp_path / "saved")]
    assert saved[0] == was[0]
    assert saved[2] == was[2]


def test_a_stage_that_is_gone_is_missed(chain: Path) -> None:
    shutil.rmtree(chain / "stages" / "1-ask")
    result = CliRunner().invoke(cli, ["verify", str(chain)])
    assert isinstance(result.exception, InputError)
    assert "stage 1 is missing" in result.output


OTHER = {
    "renamed": ("ask", "reply", "judge"),
    "added": ("ask", "answer", "judge", "more"),
    "taken away": ("ask", "judge"),
    "one stage": ("",),
}


@pytest.mark.parametrize("names", OTHER.values(), ids=OTHER)
async def test_other_stages_are_refused_and_leave_the_run_as_it_was(
    names: tuple[str, ...], chain: Path, base: Path, tmp_path: Path
) -> None:
    """No folder of a new stage is left, in which what went on would miss rows."""
    stage = '[[stage]]\nname = "{}"\nuser = "Go on."\ngive = {{ text = "{{{{ text }}}}" }}\n'
    recipe = tmp_path / "other.toml"
    recipe.write_text('[recipe]\nname = "chain"\n' + "".join(map(stage.format, names)))
    was = stage_folders(chain)
    with pytest.raises(ConfigError, match="1-ask, 2-answer, 3-judge; the recipe: "):
        await ran(chain, base, "Chain", target=60, recipe=str(recipe))
    assert stage_folders(chain) == was
    await ran(chain, base, "Chain", target=60)
    assert len(accepted(chain)) == 60


async def test_a_run_that_misses_a_stage_is_not_given_an_empty_one(chain: Path, base: Path) -> None:
    shutil.rmtree(chain / "stages" / "1-ask")
    with pytest.raises(ConfigError, match=r"other stages .*\(2-answer, 3-judge; the recipe: 1-ask"):
        await ran(chain, base, "Chain", target=60)
    assert not (chain / "stages" / "1-ask").exists()


async def test_a_salvaged_run_of_stages_goes_on(chain: Path, base: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    await anyio.to_thread.run_sync(invoke, "salvage", chain, "-o", saved)
    await ran(saved, base, "Chain", target=60)
    await ran(chain, base, "Chain", target=60)
    assert accepted(saved) == accepted(chain)


async def test_a_merge_takes_the_last_stages_and_says_so(
    chain: Path, base: Path, tmp_path: Path
) -> None:
    await ran(tmp_path / "other", base, "Chain", target=20, seed=6)
    out = tmp_path / "both"
    words = ("merge", chain, tmp_path / "other", "-o", out, *code(base))
    told = await anyio.to_thread.run_sync(invoke, *words)
    assert "only the rows of the runs' last stages" in told
    merged = accepted(out)
    assert merged[:40] == accepted(chain)
    assert all(row in merged[40:] for row in accepted(tmp_path / "other"))
    assert [stage.name for stage in stages_of_run(out)] == [""]
    assert list(problems(out)) == []


# -- report ---------------------------------------------------------------------------------------


def test_a_report_has_a_line_for_each_stage_and_their_sums(chain: Path, base: Path) -> None:
    told = json.loads(invoke("report", chain, *code(base)))
    assert [stage["stage"] for stage in told["stages"]] == ["1-ask", "2-answer", "3-judge"]
    for stage, folder in zip(told["stages"], stage_folders(chain), strict=True):
        assert stage["accepted"] == len(accepted(folder))
        reasons = Counter(reason for _, _, reason, _, _ in dump(folder) if reason)
        assert stage["rejected"] == reasons
    for kind in ("prompt", "completion"):
        tokens = [stage["tokens"][kind] for stage in told["stages"]]
        assert told["all_stages"]["tokens"][kind] == sum(tokens) > 0
    text = invoke("report", chain, "--format", "md", *code(base))
    assert "## Stages" in text
    assert "| stage | 3-judge |" in text, "the figures are those of the last one"
    assert "all stages" in text
    page = invoke("report", chain, "--format", "html", *code(base))
    assert "<h2>Stages</h2>" in page
    assert re.search(r"<p>Stage (<[^>]+>)*3-judge(</[^>]+>)*\. Of ", page)
    alone = json.loads(invoke("report", chain / "stages" / "1-ask", *code(base)))
    assert alone["accepted"] == told["stages"][0]["accepted"]
    assert alone["stages"] == []


def test_what_a_run_of_several_stages_cost_is_told_of_the_stage_and_of_all() -> None:
    """By the report and the page alike: neither is taken for the other."""
    several = {
        "figures": {"cost": 1.5, "cost_without_answer": 0.0},
        "stages": [{}, {}],
        "all_stages": {"cost": 2.75, "cost_without_answer": 0.5},
    }
    assert costs(several) == [
        ("cost of this stage", 1.5),
        ("cost of all stages", 2.75),
        ("at most, for attempts of which no answer is kept of all stages", 0.5),
    ]
    alone = {"figures": {"cost": 1.5, "cost_without_answer": None}, "stages": []}
    assert costs(alone) == [("cost", 1.5)]


def test_the_end_of_a_run_has_a_line_for_each_stage(base: Path, tmp_path: Path) -> None:
    words = ["generate", "--recipe", spec(base, "Chain"), "--backend", "scripted", "--seed", "5"]
    words += ["--no-semantic", "--target", "10", "--out", str(tmp_path / "run"), "--no-progress"]
    result = CliRunner().invoke(cli, words)
    told = [line for line in result.output.splitlines() if line.startswith("stage ")]
    assert [line.split(":")[0] for line in told] == [
        "stage 1-ask",
        "stage 2-answer",
        "stage 3-judge",
    ]
    assert "10 accepted" in told[2]
    assert "refused (low " in told[2]


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


@pytest.mark.parametrize("kind", ["Pools", "Votes"])
async def test_a_run_killed_while_its_store_was_made_starts_over(kind: str, tmp_path: Path) -> None:
    """With and without input rows; an empty file is all that such a kill leaves."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.sqlite").touch()
    result = await ran(tmp_path / "run", tmp_path, kind)
    assert result.stop.reached


def told_at_the_end(result: Result) -> str:
    """What a run of two stages says that came to this."""
    stages = [("ask", Counts()), ("judge", Counts())]
    with redirect_stdout(io.StringIO()) as said:
        say(Ended(result=result, stages=stages), as_json=False)
    return said.getvalue()


def test_rows_that_an_early_stage_lost_are_told(tmp_path: Path) -> None:
    """Requests that failed in any stage, and not those about which there was nothing to ask."""
    progress = Progress(target=5, accepted=5)
    progress.before["ask"] = Progress(target=5, failed=2)
    result = Result(progress=progress, stop=Stop(), seconds=1.0, folder=tmp_path)
    assert Ended(result=result).failed_requests == 2
    assert Ended(result=result).status == DONE_WITH_DEAD_LETTERS
    assert Ended(result=result).reason == "done; 2 requests failed permanently"
    assert "again" not in told_at_the_end(result), "only the last stage's are asked again"
    progress.failed = 1
    assert "again    those of stage judge: woolmill redecide" in told_at_the_end(result)
    kept: dict[str, Any] = {"index": 0, "demonstrations": (), "completion": None}
    assert Answer(**kept, failure="bad_request").failed
    assert not Answer(**kept, failure="not_asked").failed
