"""Evol-Instruct: its draws, its eliminator, and whole runs of its rounds."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.prompts.fit import join
from engine.recipes.base import Ask, Piece, Recipe
from engine.recipes.evol import OPERATIONS, Answers, Compare, Evol, Evolve, eliminated, unanswered
from engine.recipes.guard import NotAsked, parsed
from engine.recipes.load import load_recipe
from engine.records import Completion, Prompt, Usage
from engine.store import RunStore
from engine.upkeep.verify import problems
from tests.engine.recipes.stages import accepted, dump, ran, stage_folders

ROW = {"instruction": "Sort the list.", "input": "3 1 2", "output": "1 2 3"}


def found(recipe: Recipe, text: str, row: dict[str, Any], finish: str = "stop") -> list[Piece]:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    answer = Completion(text=text, finish_reason=finish, usage=usage, api="chat")
    return parsed(recipe, Ask(index=3, seed=5, row=row), answer)


def test_each_operation_is_drawn_about_as_often_and_another_in_each_round() -> None:
    draws = [
        [Evolve(n)._operation(Ask(index=index, row=ROW)) for n in range(1, 5)]
        for index in range(300)
    ]
    counts = Counter(name for rounds in draws for name in rounds)
    assert counts.keys() == OPERATIONS.keys()
    assert all(120 < count < 290 for count in counts.values())
    assert sum(len(set(rounds)) > 1 for rounds in draws) > 270


def test_what_is_asked() -> None:
    """The task with its input, the operation, and none of the placeholders."""
    seen = set()
    for index in range(40):
        _, (system, user) = join(Evolve(1).prompt(Ask(index=index, row=ROW)))
        assert system.role == "system"
        assert "\n#Given Task#:\nSort the list.\n\n3 1 2\n\n#New Task#:\n" in user.content
        assert "{" not in user.content
        seen.add(user.content)
    assert len(seen) == len(OPERATIONS)
    only = Evol(operations=["breadth"], rounds=2).stages
    assert [stage.name for stage in only] == ["evol/round-1", "evol/round-2", "evol/answers"]
    assert "rarer" in join(only[1].prompt(Ask(index=0, row=ROW)))[1][1].content


@pytest.mark.parametrize(
    ("evolved", "reason"),
    [
        ("Sort the list by the second digit, and say why.", None),
        ("sort  the LIST.\n", "unchanged"),
        ("#New Task#: Sort the list well.", "copied_prompt"),
        ("Do as the Given Task says, and add a proof.", "copied_prompt"),
        ("The rewritten prompt: sort it.", "copied_prompt"),
        ("I'm sorry, but I cannot do that.", "apology"),
        ("I\u2019m very sorry, no.", "apology"),
        ("Write a letter that says how sorry you are.", None),
    ],
)
def test_evolved_texts_that_are_none(evolved: str, reason: str | None) -> None:
    refusal = eliminated(evolved, "Sort the list.")
    assert (refusal and refusal[0]) == reason


def test_words_that_the_parent_has_too_are_no_copy() -> None:
    assert eliminated("Explain what a given task is, twice.", "Explain a given task.") is None


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("Sorry, I cannot see the picture.", "apology"),
        ("I am SORRY " + "so much " * 40, None),
        ("It is sorry " * 27, None),
        ("... !", "says_nothing"),
        ("This is what it is, and so on?", "says_nothing"),
        ("It is what it\u2019s.", "says_nothing"),
        ("It is 7.", None),
        ("∅", None),
        ("因为下雨。", None),
        ("Yes.", None),
    ],
)
def test_answers_that_show_a_task_without_an_answer(output: str, reason: str | None) -> None:
    refusal = unanswered(output)
    assert (refusal and refusal[0]) == reason


def test_a_round_says_what_it_made() -> None:
    (piece,) = found(Evolve(1), " Sort it twice. ", ROW)
    assert piece.record is not None
    first = piece.record
    assert first["instruction"] == "Sort it twice."
    assert first["parent"] == "Sort the list.\n\n3 1 2"
    assert (first["round"], first["operation"] in OPERATIONS) == (1, True)
    assert first["before"] == {
        "instruction": first["parent"],
        "round": 0,
        "operation": "",
        "parent": "",
    }
    (piece,) = found(Evolve(2), "Sort it thrice.", first)
    second = piece.record or {}
    assert second["before"]["parent"] == first["parent"]
    assert second["before"]["round"] == 1
    (piece,) = found(Evolve(2), "Sort it thr", first, "length")
    assert piece.refusal
    assert piece.refusal[0] == "cut_off"
    # A column that is called as ours is not taken for ours.
    (piece,) = found(Evolve(1), "Sort it.", {**ROW, "round": "first", "operation": 7})
    assert piece.record is not None
    assert piece.record["before"]["round"] == 0


def test_the_judge_puts_back_what_gained_nothing() -> None:
    (piece,) = found(Evolve(1), "Sort it twice.", ROW)
    evolved = piece.record or {}
    judge = Compare(1)
    text, _ = join(judge.prompt(Ask(index=0, row=evolved)))
    assert "First task:\nSort the list.\n\n3 1 2\n" in text
    assert "Second task:\nSort it twice.\n" in text
    (equal,) = found(judge, "Equal.", evolved)
    assert equal.record == evolved["before"]
    (other,) = found(judge, "Not equal", evolved)
    assert other.record == {name: evolved[name] for name in judge.fields}
    for row in (Evolve(1).unchanged(ROW), equal.record):
        with pytest.raises(NotAsked):
            judge.prompt(Ask(index=0, row=row))
    (last,) = found(Answers(), "1 2 3", equal.record or {})
    assert (last.record or {})["round"] == 0


def test_options_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose some of constrain"):
        Evol(operations=["wider"])
    with pytest.raises(ConfigError, match="from 1 to 20"):
        load_recipe("evol", None, {"rounds": "0"})  # type: ignore[arg-type]


def scripted(prompt: Prompt) -> str:
    """A model with every fault that the eliminator knows; a function of the prompt."""
    asked = prompt.chat[-1].content
    draw = random.Random(f"{asked}{prompt.sampling.seed}")
    if asked.startswith("Here are two tasks."):
        return draw.choice(["Equal", "Not equal", ""])
    if "#New Task#" in asked:
        task = asked.split("#Given Task#:\n")[1].split("\n\n#New Task#")[0]
        return draw.choice(
            [f"{task} Then word {draw.randrange(1000)}.", task, "#New Task#: It.", "I'm sorry.", ""]
        )
    return draw.choice([f"It is {draw.randrange(1000)}.", "Sorry, no.", "..."])


@pytest.mark.anyio
@pytest.mark.parametrize("judge", [False, True])
@pytest.mark.slow
async def test_every_row_comes_through_the_rounds(
    judge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for 1 and 16 in flight; N rows in, N decided at the end, with their lineage."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"What is {n}?"}) + "\n" for n in range(40)))
    options = {"rounds": 2, "judge": judge}
    for flight in (1, 16):
        result = await ran(
            tmp_path / str(flight), monkeypatch, scripted,
            recipe="evol", recipe_options=options, rows=rows, max_in_flight=flight,
        )  # fmt: skip
        assert result.stop.reached, result.stop.error
    run = tmp_path / "16"
    folders = stage_folders(run)
    for one, other in zip(stage_folders(tmp_path / "1"), folders, strict=True):
        assert dump(one) == dump(other)
        assert list(problems(other)) == []
    *rounds, last = folders
    names = (
        ["1-round-1", "2-judge-1", "3-round-2", "4-judge-2"]
        if judge
        else ["1-round-1", "2-round-2"]
    )
    assert [folder.name for folder in rounds] == names
    assert all(len(accepted(folder)) == 40 for folder in rounds)
    decided = dump(last)
    assert len(decided) == 40
    assert {"apology", "says_nothing", None} == {reason for _, _, reason, *_ in decided}
    rows_ = [record for *_, record, _ in decided]
    assert {row["round"] for row in rows_} == {0, 1, 2}
    for row in rows_:
        assert row["instruction"].startswith(row["parent"])
        assert (row["round"] > 0) == (row["operation"] in OPERATIONS) == bool(row["parent"])
    if judge:
        with RunStore.read(folders[1]) as store:
            evolved = sum(row["round"] == 1 for row in accepted(folders[0]))
            assert store.counts().sent == evolved < 40
        passed = [reason for _, _, reason, *_ in dump(folders[1]) if reason is not None]
        assert "not_asked" in passed
