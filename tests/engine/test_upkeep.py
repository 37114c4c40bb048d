"""verify, salvage, redecide and merge, on runs that the engine made."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import orjson
import pytest
from click.testing import CliRunner

from engine.cli import main as cli
from engine.errors import ConfigError, OutputError, WoolmillError
from engine.export import export
from engine.recipes.seeds import KEPT, bundled_seeds
from engine.records import Decision, Record, Usage
from engine.run.display import SilentDisplay
from engine.run.generate import generate
from engine.settings import RunConfig
from engine.store import RunStore
from engine.upkeep.merge import merge_runs
from engine.upkeep.redecide import redecide_run
from engine.upkeep.salvage import salvage_run
from engine.upkeep.verify import problems

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

LOOSE = {"rouge_threshold": 0.9, "semantic": False}


async def run(folder: Path, **settings: Any) -> None:
    config = RunConfig.model_validate(
        {"backend": "scripted", "out": folder, "target": 60, **LOOSE, **settings}
    )
    result = await generate(config, SilentDisplay())
    assert result.stop.reached


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that differ in their seed."""
    folder = tmp_path_factory.mktemp("runs")
    anyio.run(run, folder / "a")

    async def other() -> None:
        await run(folder / "b", seed=1)

    anyio.run(other)
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "runs"))


def decisions(folder: Path) -> list[Decision]:
    with RunStore.read(folder) as reader:
        return list(reader.decisions())


def accepted(folder: Path) -> dict[tuple[int, int], Record]:
    """The accepted rows by their place."""
    return {(d.index, d.position): d.record for d in decisions(folder) if d.record and d.accepted}


async def test_deciding_again_gives_the_same(runs: Path) -> None:
    """Under unchanged settings, decisions are a pure function of the answers."""
    before = decisions(runs / "a")
    done = await redecide_run(runs / "a", None, {})
    assert done.accepted == done.accepted_before == 60
    assert decisions(runs / "a") == before
    assert list(problems(runs / "a")) == []


async def test_a_stricter_threshold_and_back(runs: Path) -> None:
    """Another threshold gives other decisions; the old one gives the old ones back."""
    before = decisions(runs / "a")
    done = await redecide_run(runs / "a", None, {"rouge_threshold": 0.25})
    assert done.accepted < 60
    with RunStore.read(runs / "a") as reader:
        assert reader.manifest.decision["rouge_threshold"] == 0.25
        assert reader.counts().answered == done.answers
    await redecide_run(runs / "a", None, {"rouge_threshold": 0.9})
    assert decisions(runs / "a") == before


@pytest.mark.parametrize("dry", [True, False])
def test_redecide_says_which_rows_come_and_go(runs: Path, dry: bool) -> None:
    """As many as there are, the first five by name, with why each one goes."""
    command = ["redecide", str(runs / "a"), "--rouge-threshold"]
    before = accepted(runs / "a")
    told = CliRunner().invoke(cli.cli, [*command, "0.25", *["--dry-run"] * dry])
    assert told.exit_code == 0, told.output
    if dry:
        assert accepted(runs / "a") == before
        CliRunner().invoke(cli.cli, [*command, "0.25"])
    after = accepted(runs / "a")
    gone, come = sorted(before.keys() - after.keys()), after.keys() - before.keys()
    assert len(gone) > 5
    assert f"{len(come)} come, {len(gone)} go" in told.output
    for index, position in gone[:5]:
        text = before[index, position]["instruction"][:50]
        (line,) = [x for x in told.output.splitlines() if x.startswith(f"  - {index}.{position}  ")]
        assert text in line
        assert line.endswith("(duplicate_rouge)")
    back = CliRunner().invoke(cli.cli, [*command, "0.9"]).output
    assert f"{len(gone)} come, {len(come)} go" in back
    assert f"  + {gone[0][0]}.{gone[0][1]}  " in back


async def test_a_redecided_run_goes_on_under_its_new_settings(runs: Path) -> None:
    """The old settings are refused by name; with the new ones the run goes on to its target."""
    await redecide_run(runs / "a", None, {"rouge_threshold": 0.7})
    with pytest.raises(ConfigError, match="rouge_threshold"):
        await run(runs / "a")
    await run(runs / "a", rouge_threshold=0.7)
    with RunStore.read(runs / "a") as reader:
        assert reader.counts().accepted == 60


async def test_a_lower_target_takes_fewer(runs: Path) -> None:
    """--target bounds what is accepted; the first records are the same."""
    before = [d for d in decisions(runs / "a") if d.accepted]
    await redecide_run(runs / "a", None, {"target": 10})
    assert [d for d in decisions(runs / "a") if d.accepted] == before[:10]


async def test_other_seeds_cannot_decide_a_run(runs: Path, tmp_path: Path) -> None:
    """Records are compared with the seeds, so that these must be the run's own."""
    other = tmp_path / "seeds.jsonl"
    tasks = [
        {
            "id": f"seed_{i}",
            "name": "n",
            "instruction": f"Say {i}",
            "instances": [{"input": "", "output": f"{i}"}],
            "is_classification": False,
        }
        for i in range(5)
    ]
    other.write_bytes(b"".join(orjson.dumps(task) + b"\n" for task in tasks))
    with pytest.raises(ConfigError, match="--seeds"):
        await redecide_run(runs / "a", other, {})


async def test_merged_runs_hold_no_duplicates_and_are_deterministic(
    runs: Path, tmp_path: Path
) -> None:
    """The first run's records come first and unchanged; the same merge gives the same bytes."""
    accepted = await merge_runs([runs / "a", runs / "b"], tmp_path / "ab", None, {})
    assert await merge_runs([runs / "a", runs / "b"], tmp_path / "again", None, {}) == accepted
    assert 60 < accepted
    datasets = []
    for name in ("ab", "again"):
        with RunStore.read(tmp_path / name) as reader:
            export(reader, "jsonl", tmp_path / f"{name}.jsonl")
            texts = [d.record["instruction"] for d, _ in reader.accepted() if d.record]
            assert len(set(texts)) == len(texts) == accepted
        datasets.append((tmp_path / f"{name}.jsonl").read_bytes())
        assert list(problems(tmp_path / name)) == []
    assert datasets[0] == datasets[1]
    first = [d for d in decisions(runs / "a") if d.accepted]
    assert [d for d in decisions(tmp_path / "ab") if d.accepted][: len(first)] == first


async def test_merge_refuses_what_does_not_go_together(runs: Path, tmp_path: Path) -> None:
    """A copy of a run, an output that exists, a run with another prompt form."""
    shutil.copytree(runs / "a", tmp_path / "copy")
    with pytest.raises(ConfigError, match="twice"):
        await merge_runs([runs / "a", tmp_path / "copy"], tmp_path / "new", None, {})
    with pytest.raises(OutputError, match="exists"):
        await merge_runs([runs / "a", runs / "b"], tmp_path / "copy", None, {})
    await run(tmp_path / "chat", api="chat")
    with pytest.raises(ConfigError, match="its api is chat"):
        await merge_runs([runs / "a", tmp_path / "chat"], tmp_path / "new", None, {})


def test_verify_says_what_is_wrong_with_its_exit_code_fault_103(runs: Path) -> None:
    """Sound: 0 and the counts. A changed row, an edited dataset: each is named, and 65."""
    run_ = runs / "a"
    sound = CliRunner().invoke(cli.cli, ["verify", str(run_)])
    assert (sound.exit_code, sound.output.count("60 accepted")) == (0, 1)
    with RunStore.read(run_) as reader:
        export(reader, "alpaca", run_ / "alpaca_data.json")
    assert CliRunner().invoke(cli.cli, ["verify", str(run_)]).exit_code == 0
    with (run_ / "alpaca_data.json").open("ab") as file:
        file.write(b"\n")
    edited = CliRunner().invoke(cli.cli, ["verify", str(run_)])
    assert isinstance(edited.exception, WoolmillError)
    assert edited.exception.exit_code == 65
    assert "alpaca_data.json: is not what the 60 accepted records give" in edited.output
    with closing(sqlite3.connect(run_ / "run.sqlite", isolation_level=None)) as connection:
        connection.execute("UPDATE answer SET body = replace(body, 'stop', 'Stop') WHERE request=2")
    assert "table answer, row 2" in CliRunner().invoke(cli.cli, ["verify", str(run_)]).output


def test_the_commands_of_upkeep_work_from_the_command_line(runs: Path, tmp_path: Path) -> None:
    """salvage, redecide and merge print what they did and leave sound runs."""
    for argv in (
        ["salvage", f"{runs}/a", "-o", f"{tmp_path}/saved"],
        ["redecide", f"{tmp_path}/saved", "--rouge-threshold", "0.5", "--no-semantic"],
        ["merge", f"{runs}/a", f"{runs}/b", "-o", f"{tmp_path}/merged", "--target", "80"],
    ):
        done = CliRunner().invoke(cli.cli, argv)
        assert done.exit_code == 0, (argv, done.output, done.exception)
    assert list(problems(tmp_path / "saved")) == []
    with RunStore.read(tmp_path / "merged") as reader:
        assert reader.counts().accepted == 80


def test_an_older_dataset_is_said_and_is_no_problem(runs: Path) -> None:
    """As while a run goes on to a higher target: exit 0, a line, and not a word of salvage. Also
    where the note of exports is lost, and where the folder was moved.
    """
    run_ = runs / "a"
    dataset = run_ / "alpaca_data.json"
    with RunStore.read(run_) as reader:
        export(reader, "alpaca", dataset)

    async def go_on() -> None:
        await run(run_, target=70)

    anyio.run(go_on)
    for change in (lambda: None, (run_ / "exports.json").unlink, lambda: run_.rename(runs / "c")):
        change()
        folder = run_ if run_.exists() else runs / "c"
        done = CliRunner().invoke(cli.cli, ["verify", str(folder)])
        assert done.exit_code == 0, (done.output, done.exception)
        assert "is older than the store, which holds 70 accepted records" in done.output
        assert "70 accepted" in done.output.splitlines()[-1]
        assert "woolmill salvage" not in done.output
    # It is ours, so that it may be renewed.
    again = ["export", str(runs / "c"), "-o", str(runs / "c" / "alpaca_data.json")]
    assert CliRunner().invoke(cli.cli, again).exit_code == 0
    assert "is older" not in CliRunner().invoke(cli.cli, ["verify", str(runs / "c")]).output


def test_salvage_is_offered_for_damage_alone(runs: Path) -> None:
    """An edited export is a problem of its own, and the store beside it is sound."""
    run_ = runs / "a"
    (run_ / "alpaca_data.json").write_text("[]  ")
    edited = CliRunner().invoke(cli.cli, ["verify", str(run_)])
    assert isinstance(edited.exception, WoolmillError)
    assert edited.exception.exit_code == 65
    assert "1 problem with exports; the store itself is sound" in str(edited.exception)
    assert "woolmill salvage" not in str(edited.exception)
    with closing(sqlite3.connect(run_ / "run.sqlite", isolation_level=None)) as connection:
        connection.execute("UPDATE answer SET body = replace(body, 'stop', 'Stop') WHERE request=2")
    damaged = CliRunner().invoke(cli.cli, ["verify", str(run_)])
    assert "woolmill salvage" in str(damaged.exception)


async def test_a_clock_and_a_sum_that_cannot_be_are_no_damage(tmp_path: Path) -> None:
    """A wall clock set back between two answers; tokens whose sum is beyond 64 bits."""
    await run(tmp_path / "run", target=5)
    with RunStore.read(tmp_path / "run") as reader:
        manifest, answers = reader.manifest, [answer for answer, _ in reader.all_answers()]
    store = RunStore.open(tmp_path / "copy", manifest)
    usage = Usage(prompt_tokens=2**63 - 1, completion_tokens=2**63 - 1)
    for i in range(4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("time.time", lambda i=i: 1e9 - 3600 * i)
            completion = answers[0].completion
            assert completion is not None
            huge = replace(answers[0], index=i, completion=replace(completion, usage=usage))
            await store.answered([huge])
    await store.aclose()
    assert list(problems(tmp_path / "copy")) == []
    told = CliRunner().invoke(cli.cli, ["report", str(tmp_path / "copy"), "--format", "json"])
    assert told.exit_code == 0, told.exception


async def test_a_run_with_seeds_of_its_own_needs_no_word_of_them(tmp_path: Path) -> None:
    """redecide, merge and salvage find them in the run's folder, and leave them in the new one."""
    seeds = tmp_path / "seeds.jsonl"
    lines = bundled_seeds().read_bytes().splitlines(keepends=True)[:40]
    seeds.write_bytes(b"".join(lines))
    for name in ("a", "b"):
        await run(tmp_path / name, target=10, seeds=seeds, seed=ord(name))
    seeds.unlink()
    assert (await redecide_run(tmp_path / "a", None, {})).accepted == 10
    assert await merge_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "ab", None, {}) > 10
    await redecide_run(tmp_path / "ab", None, {"target": 12})
    await anyio.to_thread.run_sync(salvage_run, tmp_path / "a", tmp_path / "saved")
    await redecide_run(tmp_path / "saved", None, {})
    (tmp_path / "saved" / KEPT).unlink()
    with pytest.raises(ConfigError, match="name those with --seeds"):
        await redecide_run(tmp_path / "saved", None, {})


def test_a_new_run_never_takes_a_place_that_is_taken(runs: Path, tmp_path: Path) -> None:
    """Not even a dangling link's."""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for argv in (["salvage", f"{runs}/a"], ["merge", f"{runs}/a", f"{runs}/b"]):
        for output in (tmp_path / "link", runs / "b"):
            done = CliRunner().invoke(cli.cli, [*argv, "-o", str(output)])
            assert isinstance(done.exception, OutputError)
    assert not (tmp_path / "nowhere").exists()
