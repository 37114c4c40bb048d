"""Scores by a rubric, and pairs judged in both orders."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from engine.prompts.fit import join
from engine.recipes.base import Ask, Piece, Recipe
from engine.recipes.guard import RecipeFault, parsed
from engine.recipes.load import load_recipe
from engine.recipes.pairwise import Pairwise
from engine.records import Completion, Prompt, Usage
from tests.engine.recipes.stages import accepted, dump, ran

PAIR = {"instruction": "Name a river.", "answer_a": "The Rhine.", "answer_b": "Paris."}
SCORES = {"reason": "It is right.", "follows": 5, "truthful": 4, "honest": 5, "helpful": 3}


def found(
    recipe: Recipe, text: str, row: Any, sample: int = 0, finish: str = "stop"
) -> list[Piece]:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    answer = Completion(text=text, finish_reason=finish, usage=usage, api="chat")
    return parsed(recipe, Ask(index=6 + sample, sample=sample, row=row), answer)


def said(better: str) -> str:
    return json.dumps({"reason": "Because.", "better": better})


def test_a_pair_is_shown_in_both_orders() -> None:
    texts = [
        join(Pairwise().prompt(Ask(index=n, sample=n, row=PAIR)))[1][1].content for n in (0, 1)
    ]
    assert "First answer:\nThe Rhine.\n\nSecond answer:\nParis." in texts[0]
    assert "First answer:\nParis.\n\nSecond answer:\nThe Rhine." in texts[1]
    with pytest.raises(RecipeFault, match="the row has no text 'answer_b', but instruction"):
        Pairwise().prompt(Ask(index=0, row={"instruction": "A?", "answer_a": "B"}))
    other = Pairwise(a="x", b="y").prompt(Ask(index=0, row={"question": "A?", "x": "B", "y": "C"}))
    assert "Second answer:\nC" in join(other)[1][1].content


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        ("first", "second", "a"),
        ("second", "first", "b"),
        ("first", "first", None),
        ("second", "second", None),
        ("tie", "tie", None),
        ("first", "tie", None),
    ],
)
def test_both_orders_must_agree(first: str, second: str, winner: str | None) -> None:
    for keep_ties in (False, True):
        recipe = Pairwise(keep_ties=keep_ties)
        rows = [
            found(recipe, said(word), PAIR, n)[0].record for n, word in enumerate((first, second))
        ]
        came = recipe.reduce(Ask(index=7, sample=1, row=PAIR), rows)
        if winner is None and not keep_ties:
            assert came[0] == "tie"  # type: ignore[index]
            continue
        assert isinstance(came, dict)
        assert came["winner"] == (winner or "tie")
        chosen = {"a": "The Rhine.", "b": "Paris."}.get(came["winner"])
        assert came["chosen"] == chosen
        assert (came["rejected"] is None) == (winner is None)


def test_a_judgement_that_is_missing_is_no_verdict() -> None:
    recipe = Pairwise()
    (row,) = found(recipe, said("first"), PAIR)
    assert recipe.reduce(Ask(index=7, row=PAIR), [row.record, None]) == (
        *("no_judgement", "1 of 2 judgements were made"),
    )
    for text, reason in ((said("third"), "invalid"), ("The first.", "bad_format")):
        (piece,) = found(recipe, text, PAIR)
        assert piece.refusal
        assert piece.refusal[0] == reason


def test_scores_are_read_and_the_lowest_decides() -> None:
    row = {"instruction": "Name a river.", "input": "in Europe", "output": "The Rhine."}
    judge = load_recipe("judge", None, {})  # type: ignore[arg-type]
    (piece,) = found(judge, f"```json\n{json.dumps(SCORES)}\n```", row)
    assert piece.refusal is None
    assert piece.record == {**row, **SCORES, "score": 4.25}
    strict = load_recipe("judge", None, {"min_score": "4"})  # type: ignore[arg-type]
    (piece,) = found(strict, json.dumps(SCORES), row)
    assert piece.refusal
    assert piece.refusal[0] == "not_kept"
    (piece,) = found(judge, json.dumps({**SCORES, "helpful": 6}), row)
    assert piece.refusal
    assert piece.refusal[0] == "invalid"
    _, (_, user) = join(judge.prompt(Ask(index=0, row={"question": "Why?", "answer": "So."})))
    assert user.content.endswith("Instruction:\nWhy?\n\nAnswer:\nSo.")


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["pairwise", "judge"])
@pytest.mark.slow
async def test_every_row_is_judged_the_same_whatever_the_concurrency(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scripted(prompt: Prompt) -> str:
        draw = random.Random(f"{prompt.chat}{prompt.sampling.seed}")
        if name == "pairwise":
            return draw.choice([said("first"), said("second"), said("tie"), "?"])
        return json.dumps({**SCORES, "honest": draw.randrange(7)})

    rows = tmp_path / "rows.jsonl"
    lines = [{**PAIR, "instruction": f"Name river {n}.", "output": "Yes."} for n in range(40)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for flight in (1, 16):
        result = await ran(
            tmp_path / str(flight), monkeypatch, scripted,
            recipe=name, rows=rows, max_in_flight=flight,
        )  # fmt: skip
        assert result.stop.reached, result.stop.error
    decided = dump(tmp_path / "16")
    assert decided == dump(tmp_path / "1")
    taken = accepted(tmp_path / "16")
    assert 0 < len(taken) < 40
    if name == "pairwise":
        assert {row["winner"] for row in taken} == {"a", "b"}
        assert len([entry for entry in decided if entry[2] in ("sample", "bad_format")]) == 80
