"""``respond``: rows of instructions, questions and chats in, answered rows out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.prompts.fit import join
from engine.recipes.base import Ask, Piece
from engine.recipes.guard import RecipeFault, parsed
from engine.recipes.load import load_recipe
from engine.recipes.respond import Respond
from engine.records import Completion, Usage
from engine.run.display import SilentDisplay
from engine.run.generate import generate
from engine.settings import RunConfig
from engine.store import RunStore

pytestmark = pytest.mark.slow

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": "What is rain?"},
]
SHAREGPT = [{"from": "human", "value": "What is snow?"}, {"from": "gpt", "value": "Cold rain."}]


def turns(row: dict[str, Any], system: str = "") -> list[tuple[str, str]]:
    text, messages = join(Respond(system=system).prompt(Ask(index=0, row=row)))
    return [(turn.role, turn.content) for turn in messages] or [("user", text)]


def found(row: dict[str, Any], text: str, **changed: Any) -> list[Piece]:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    answer = Completion(text=text, finish_reason="stop", usage=usage, api="chat")
    return parsed(Respond(), Ask(index=0, row=row), replace(answer, **changed))


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "Add.", "input": "1 and 2"}, [("user", "Add.\n\n1 and 2")]),
        ({"instruction": "Greet.", "input": ""}, [("user", "Greet.")]),
        ({"question": "Why?"}, [("user", "Why?")]),
        ({"problem": "2 + 2"}, [("user", "2 + 2")]),
        ({"prompt": "Write.", "system": "Be terse."}, [("system", "Be terse."), ("user", "Write.")]),
        ({"messages": CHAT}, [(turn["role"], turn["content"]) for turn in CHAT]),
        ({"conversations": SHAREGPT}, [("user", "What is snow?")]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
         [("user", "Hi")]),
    ],
)  # fmt: skip
def test_rows_of_any_usual_form_are_asked(
    row: dict[str, Any], asked: list[tuple[str, str]]
) -> None:
    assert turns(row) == asked


def test_the_system_turn_of_a_row_comes_before_the_option() -> None:
    assert turns({"question": "Why?"}, "Be brief.")[0] == ("system", "Be brief.")
    assert turns({"question": "Why?", "system": "Sing."}, "Be brief.")[0] == ("system", "Sing.")
    assert turns({"messages": CHAT}, "Be brief.")[0] == ("system", "Be kind.")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, "none of messages, instruction"),
        ({"instruction": "  "}, "the row's instruction is blank"),
        ({"question": 3}, "the row's question is not text"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "no turn of the user"),
        ({"messages": ["Hi"]}, "there are system, user and assistant"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "has no text"),
    ],
)
def test_a_row_without_a_question_says_so(row: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeFault, match=words):
        turns(row)


def test_an_answered_row_is_alpacas_and_a_chat_alike() -> None:
    row = {"instruction": "Add.", "input": "1 and 2"}
    (piece,) = found(row, " 3 \n", reasoning="One, two.")
    assert piece.record == {
        "instruction": "Add.",
        "input": "1 and 2",
        "output": "3",
        "reasoning": "One, two.",
        "messages": [
            {"role": "user", "content": "Add.\n\n1 and 2"},
            {"role": "assistant", "content": "3"},
        ],
    }
    (chat,) = found({"messages": CHAT}, "Water.")
    assert chat.record is not None
    assert chat.record["instruction"] == "What is rain?"
    assert chat.record["messages"] == [*CHAT, {"role": "assistant", "content": "Water."}]
    assert Respond().messages(chat.record) == chat.record["messages"]


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [("Wat", "length", "cut_off"), ("", "stop", "no_record"), (" \n", "stop", "no_record")],
)
def test_an_answer_that_is_none_is_refused(text: str, finish: str, reason: str) -> None:
    (piece,) = found({"question": "Why?"}, text, finish_reason=finish)
    assert piece.refusal is not None
    assert piece.refusal[0] == reason


async def answered(folder: Path, lines: list[Any], **settings: Any) -> list[dict[str, Any]]:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {"recipe": "respond", "rows": rows, "out": folder / "run", "semantic": False}
    result = await generate(RunConfig.model_validate(given | settings), SilentDisplay())
    assert result.stop.error is None
    with RunStore.read(folder / "run") as run:
        return [decision.record or {} for decision, _ in run.accepted()]


@pytest.mark.anyio
async def test_n_rows_in_n_decisions_out(tmp_path: Path) -> None:
    """Three answers for each row, in the order of the rows; one row has no question."""
    lines: list[Any] = [{"question": f"Question {n}?"} for n in range(10)]
    lines[4] = {"text": "no question"}
    options = {"system": "Be brief."}
    rows = await answered(tmp_path, lines, backend="scripted", samples=3, recipe_options=options)
    wanted = [f"Question {n}?" for n in range(10) if n != 4 for _ in range(3)]
    assert [row["instruction"] for row in rows] == wanted
    assert len({row["output"] for row in rows}) == 27
    assert all(row["messages"][0] == {"role": "system", "content": "Be brief."} for row in rows)
    with RunStore.read(tmp_path / "run") as run:
        counts = run.counts()
    assert (counts.accepted, counts.decided, counts.sent) == (27, 30, 27)
    assert counts.reasons == {"not_asked": 3}


@pytest.mark.anyio
async def test_the_real_small_model_answers(tmp_path: Path) -> None:
    """Through its chat template, with a system turn and a chat of two rounds."""
    lines = [
        {"question": "What is the capital of France?", "system": "Answer in one sentence."},
        {"messages": CHAT},
    ]
    rows = await answered(tmp_path, lines, backend="transformers", max_tokens=32, temperature=0.0)
    with RunStore.read(tmp_path / "run") as run:
        assert run.counts().decided == 2
    assert "Paris" in rows[0]["output"]


def test_it_is_had_by_its_name() -> None:
    made = load_recipe("respond", None, {"system": "Be brief."})  # type: ignore[arg-type]
    assert isinstance(made, Respond)
    assert made.needs_rows
