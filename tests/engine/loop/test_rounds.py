"""Rounds: what each is made from, what is kept, what stays on the disk, and that a finished one is
never done again. Runs are real; a double of the trainer writes what the real one leaves behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.errors import ConfigError, StoppedError
from engine.loop import figures, rounds
from engine.loop.ledger import Round
from engine.loop.people import HELD_OUT, SHOWN
from engine.loop.rounds import TRAIN, VALIDATION, Loop
from engine.loop.settings import load_loop
from engine.recipes.seeds import read_seeds
from engine.settings import RunConfig
from engine.store import RunStore

pytestmark = pytest.mark.slow


class Trainer:
    """Writes folders of a model, and the losses that it was given, in turn."""

    def __init__(self, *held_out: float) -> None:
        self.held_out = list(held_out)
        self.trained: list[dict[str, Any]] = []
        self.measured: list[str] = []

    def __call__(
        self, program: str, given: Any, own: dict[str, Any], *, processes: int, **_: Path
    ) -> None:
        out = Path(own["output_dir"])
        out.mkdir(exist_ok=True)
        if program == "trainer":
            self.trained.append({**own, "processes": processes, **given})
            (out / "model.safetensors").write_text(own["model_name_or_path"])
            (out / "checkpoint-5").mkdir(exist_ok=True)
            return
        assert program == "trainer.evaluate"
        self.measured.append(own["model_name_or_path"])
        told = [self.held_out.pop(0), *(9.0 for _ in own["data_path"][1:])]
        (out / "loss.json").write_text(json.dumps([{"loss": loss} for loss in told]))


@pytest.fixture(autouse=True)
def no_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs are counted in test_figures.py: to load the parser takes longer than a run."""
    monkeypatch.setattr(figures, "_distinct_verbs", lambda run: None)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    double = Trainer(2.0, 1.5, 1.75, 1.25, 1.0)
    monkeypatch.setattr(rounds, "trainer", double)
    return double


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "first").mkdir()
    return tmp_path / "first"


def settings(tmp_path: Path, model: Path, **more: Any) -> dict[str, Any]:
    generate = {"backend": "scripted", "target": 15, "semantic": False}
    given = generate | more.get("generate", {})
    more["generate"] = {name: value for name, value in given.items() if value is not None}
    return {"out": tmp_path / "loop", "model": str(model), "validation": 0.2, **more}


def played(tmp_path: Path, model: Path, **more: Any) -> list[Round]:
    return list(engine.loop.run(**settings(tmp_path, model, **more)))


def files(tmp_path: Path) -> Iterator[str]:
    for path in sorted((tmp_path / "loop").rglob("*")):
        if path.is_file():
            yield str(path.relative_to(tmp_path / "loop"))


def test_rounds_go_on_from_the_model_that_was_kept_last(
    tmp_path: Path, model: Path, trainer: Trainer
) -> None:
    """The second one's held-out loss rises: its model is not kept, and the third starts where it
    did.
    """
    done = played(tmp_path, model, rounds=3, keep=3, train={"max_steps": 7}, processes=2)
    first = str(tmp_path / "loop" / "round-1" / "model" / "first")
    assert [each["model_name_or_path"] for each in trainer.trained] == [str(model), first, first]
    assert [(each.loss_before, each.loss, each.kept) for each in done] == [
        (2.0, 1.5, True),
        (1.5, 1.75, False),
        (1.5, 1.25, True),
    ]
    assert [each.started_from for each in done] == [0, 1, 1]
    assert {each["max_steps"] for each in trainer.trained} == {7}
    assert {each["processes"] for each in trainer.trained} == {2}
    assert all(each.accepted == 15 and each.own_loss == 9.0 for each in done)
    assert all(each.trained == 12 for each in done)


def test_always_keeps_what_is_worse(tmp_path: Path, model: Path, trainer: Trainer) -> None:
    done = played(tmp_path, model, rounds=3, always=True)
    assert [each.kept for each in done] == [True, True, True]
    assert [each.started_from for each in done] == [0, 1, 2]
    assert [each.loss_before for each in done] == [2.0, 1.5, 1.5]


def test_the_first_model_can_be_trained_on_all_rows_so_far(
    tmp_path: Path, model: Path, trainer: Trainer
) -> None:
    played(tmp_path, model, rounds=3, start="first", with_seeds=False)
    rows = [[path.parent.parent.name for path in each["data_path"]] for each in trainer.trained]
    assert rows == [["round-1"], ["round-1", "round-2"], ["round-1", "round-3"]]
    assert {each["model_name_or_path"] for each in trainer.trained} == {str(model)}


def test_held_out_tasks_are_neither_shown_nor_trained_on(
    tmp_path: Path, model: Path, trainer: Trainer
) -> None:
    played(tmp_path, model, keep=2)
    loop = tmp_path / "loop"
    held_out = {task.id for task in read_seeds(loop / "people" / HELD_OUT)}
    texts = [task.instruction for task in read_seeds(loop / "people" / HELD_OUT)]
    assert len(held_out) == 40
    for number in (1, 2):
        with RunStore.read(loop / f"round-{number}" / "run") as run:
            shown = {name for answer, _ in run.all_answers() for name in answer.demonstrations}
            assert shown & {task.id for task in read_seeds(loop / "people" / SHOWN)}
            assert not shown & held_out
            assert str(loop / "people" / HELD_OUT) in map(str, run.manifest.decision["against"])
    for each in trainer.trained:
        assert loop / "people" / SHOWN in each["data_path"]
        trained_on = "".join(path.read_text() for path in each["data_path"])
        assert not any(json.dumps(text)[1:-1] in trained_on for text in texts)


def test_no_round_repeats_what_was_trained_on(
    tmp_path: Path, model: Path, trainer: Trainer
) -> None:
    """It draws otherwise, and stays clear of the rows of rounds that were kept, validation too."""
    played(tmp_path, model, rounds=3, keep=3)
    loop = tmp_path / "loop"
    rows = []
    for number in (1, 2, 3):
        with RunStore.read(loop / f"round-{number}" / "run") as run:
            assert run.manifest.fixed["seed"] == number - 1
            against = [Path(path) for path in run.manifest.decision["against"][1:]]
            rows.append([str(d.record) for d in run.decisions(accepted=True)])
        kept = [1] if number > 1 else []
        assert against == [
            loop / f"round-{each}" / "data" / name for each in kept for name in (TRAIN, VALIDATION)
        ]
    assert not set(rows[0]) & set(rows[1])


def test_the_disk_holds_what_keep_says_and_the_model_to_go_on_from(
    tmp_path: Path, model: Path, trainer: Trainer
) -> None:
    played(tmp_path, model, rounds=2, keep=1)
    there = list(files(tmp_path))
    assert "round-1/model/first/model.safetensors" in there  # the second round was not kept
    assert "round-2/model/first/model.safetensors" in there
    assert "round-1/run/run.sqlite" not in there
    assert "round-2/run/run.sqlite" in there
    assert f"round-1/data/{TRAIN}" in there
    played(tmp_path, model, rounds=3, keep=1)
    there = list(files(tmp_path))
    assert not [path for path in there if path.startswith(("round-1/model", "round-2/model"))]
    assert f"round-2/data/{TRAIN}" in there
    assert not [path for path in there if "checkpoint" in path]


def test_a_finished_round_is_never_done_again(
    tmp_path: Path, model: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = played(tmp_path, model, rounds=1)
    monkeypatch.setattr(engine.loop, "_generate", None)
    assert played(tmp_path, model, rounds=1) == first
    assert len(trainer.trained) == 1


def test_cut_between_any_two_steps_it_goes_on_with_the_next(
    tmp_path: Path, model: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is done once, whichever of them an earlier start was cut behind."""
    points: list[str] = []

    class Cut(Exception):
        pass

    def cut(name: str) -> None:
        if name not in points:
            points.append(name)
            raise Cut(name)

    monkeypatch.setattr(rounds, "failpoint", cut)
    for _ in range(50):
        try:
            done = played(tmp_path, model, rounds=1)
            break
        except Cut:
            continue
    assert len(points) == 9
    assert done[0].kept
    assert len(trainer.measured) == 2
    # Its end is known by the name of the folder alone, which it did not get the first time.
    assert len(trainer.trained) == 2


def test_the_model_that_is_trained_answers_the_next_round(tmp_path: Path, model: Path) -> None:
    """Under a folder of the first one's name, so that its defaults of sampling stay its own."""
    config = load_loop(None, {"out": tmp_path / "loop", "model": str(model)})
    asked: list[RunConfig] = []
    with Loop(config, asked.append, print) as loop:
        assert loop._run_of(1, 0).model == str(model)
        assert loop._run_of(2, 1).model == str(tmp_path / "loop/round-1/model/first")
    teacher = load_loop(None, settings(tmp_path, model))
    with Loop(teacher, asked.append, print) as loop:
        assert loop._run_of(2, 1).model is None


def test_other_settings_and_a_second_loop_are_refused(
    tmp_path: Path, model: Path, trainer: Trainer
) -> None:
    played(tmp_path, model, rounds=1)
    with pytest.raises(ConfigError, match=r"began with \[generate\] target = 15, not 16"):
        played(tmp_path, model, generate={"target": 16})
    config = load_loop(None, settings(tmp_path, model))
    with Loop(config, lambda _: None, print), pytest.raises(StoppedError, match="in use by pid"):
        Loop(config, lambda _: None, print)


def test_the_folder_of_a_run_is_not_taken_for_a_loop_s(tmp_path: Path, model: Path) -> None:
    run = tmp_path / "loop"
    run.mkdir()
    (run / "run.sqlite").touch()
    with pytest.raises(ConfigError, match="holds a run already; choose another --out"):
        played(tmp_path, model)
    assert list(run.iterdir()) == [run / "run.sqlite"]


def test_too_few_seeds_are_known_before_anything_is_made(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match="--held-out 500: of 200 seed tasks"):
        played(tmp_path, model, held_out=500)
    assert not (tmp_path / "loop").exists()


PLAIN = """
[recipe]
name = "plain"
[stage]
user = "Say something about {{ thing }}."
give = { instruction = "{{ thing }}", output = "{{ text }}" }
refuse = [{ field = "output", words_below = 1000 }]
"""


def test_rows_that_are_not_compared_have_no_validation_part(
    tmp_path: Path, model: Path, trainer: Trainer
) -> None:
    """Which is known at once; and a round without any row has nothing to learn from."""
    (tmp_path / "plain.toml").write_text(PLAIN)
    (tmp_path / "things.jsonl").write_text('{"thing": "bread"}\n{"thing": "salt"}\n')
    table = {"recipe": str(tmp_path / "plain.toml"), "rows": str(tmp_path / "things.jsonl")}
    generate = {**table, "target": None}
    with pytest.raises(ConfigError, match="the rows of recipe plain are not compared"):
        played(tmp_path, model, generate=generate)
    with pytest.raises(StoppedError, match="round 1 has no row to train on"):
        played(tmp_path, model, validation=0, with_seeds=False, generate=generate)
    assert trainer.trained == []
