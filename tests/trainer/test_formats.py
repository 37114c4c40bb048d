"""Rows to records: every column is used, known to describe the row, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trainer.errors import DataError
from trainer.examples import Conversation, Example, Instruction, Message, Text, alpaca_prompt
from trainer.formats import Rules, examples_of

USER, BOT = Message("user", "hi"), Message("assistant", "ho")
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def read(row: Any, **rules: Any) -> list[Example]:
    return list(examples_of("d#0", row, Rules(**rules)))


def chat(*turns: Message, **more: Any) -> list[Example]:
    return [Conversation("d#0", turns, **more)]


def turn(role: str, content: Any = "x", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def deep(levels: int) -> dict[str, Any]:
    return {"a": deep(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "a", "answer": "b"},
        {"query": "a", "response": "b"},
        {"instruction": "a", "context": "", "response": "b", "category": "open_qa"},  # Dolly
        {"instruction": "a", "input": None, "output": "b", "id": 7, "score": 0.5},
        {"instruction": "a", "output": "b", "system": "", "history": [], "tools": None},
        {"instruction": "a", "output": "b", "text": alpaca_prompt("a") + "b"},
        {"instruction": "a", "output": "b", "text": f"{alpaca_prompt('a')}\nb"},  # tatsu-lab's
        {"instruction": "a", "output": "b", "prompt": alpaca_prompt("a")},
    ],
)
def test_many_names_for_an_instruction(row: Any) -> None:
    """Question and answer, Dolly, Alpaca with its text column; what is empty, repeats the row or
    describes it is no loss.
    """
    assert read(row) == [Instruction("d#0", "a", "", "b")]


def test_what_an_export_of_a_run_says_of_a_row_is_no_loss() -> None:
    """Under its own names, and under those it takes where the row has one of the same."""
    said = {"woolmill_id": "3.0", "woolmill_model": "m", "row": 3, "sample": 0, "parents": ["1.0"]}
    assert read({"messages": TURNS, "id": "q-3", **said}) == chat(USER, BOT)
    with pytest.raises(DataError, match="would lose rows"):
        read({"messages": TURNS, "rows": 3})


def test_dolly_has_its_context_as_input() -> None:
    row = {"instruction": "a", "context": "c", "response": "b"}
    assert read(row) == [Instruction("d#0", "a", "c", "b")]


def test_alpaca_rows_with_system_history_or_tools_are_chats() -> None:
    """LLaMA-Factory's columns, for which Alpaca's layout has no place, in the order of the talk."""
    row = {
        "instruction": "a",
        "input": "i",
        "output": "b",
        "system": "s",
        "history": [["q", "r"]],
        "tools": json.dumps([TOOL["function"]]),
    }
    turns = [("system", "s"), ("user", "q"), ("assistant", "r"), ("user", "a\n\ni")]
    messages = [*(Message(role, text) for role, text in turns), Message("assistant", "b")]  # type: ignore[arg-type]
    assert read(row) == chat(*messages, tools=(TOOL,))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        TURNS,
        {"conversations": TURNS},
        {"conversation": TURNS},
        {"messages": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"messages": json.dumps(TURNS)},  # a cell of a table
        {"messages": TURNS, "prompt": "hi", "prompt_id": "x"},  # ultrachat_200k
        {"messages": [TURNS[0], TURNS[1] | {"weight": 1, "name": None, "id": "m"}]},
        {"messages": [turn("user", [{"type": "text", "text": "h"}, "i"]), TURNS[1]]},
        {"messages": None, "conversations": TURNS},
    ],
)
def test_many_shapes_of_a_chat(row: Any) -> None:
    """OpenAI's and ShareGPT's keys, lists alone, JSON in a cell, content in parts."""
    assert read(row) == chat(USER, BOT)


def test_a_system_column_is_the_first_turn() -> None:
    """Said once, also where the turns have it too; another one beside it is refused."""
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    expected = chat(Message("system", "s"), USER, BOT)
    assert read({"system": "s", "conversations": turns}) == expected
    twice = [{"from": "system", "value": "s"}, *turns]
    assert read({"system": "s", "conversations": twice}) == expected
    with pytest.raises(DataError, match="has a system column and another system turn"):
        read({"system": "other", "conversations": twice})


def test_tools_and_calls_in_every_spelling_are_openais() -> None:
    """Arguments as an object or as JSON, calls as a turn of their own, bare schemas, and the keys
    that a column store fills with nulls.
    """
    call = Message("assistant", "", tool_calls=(CALL,))
    answer = Message("tool", "sunny", tool_call_id="1", name="weather")
    expected = chat(USER, call, answer, BOT, tools=(TOOL,))
    observed = turn("observation", "sunny", tool_call_id="1", name="weather")
    as_json = {"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    spellings: list[dict[str, Any]] = [
        turn("assistant", None, tool_calls=[CALL]),
        turn("assistant", "", tool_calls=[as_json]),
        turn("assistant", "", tool_calls=[{"name": "weather", "arguments": {"city": "Paris"}}]),
        turn("assistant", None, function_call={"name": "weather", "arguments": '{"city":"Paris"}'}),
        turn("function_call", '{"name": "weather", "arguments": {"city": "Paris"}}'),
        turn("assistant", "", tool_calls=json.dumps([CALL])),
        turn("assistant", "", tool_calls=[{"id": None, **CALL}]),
    ]
    for spelling in spellings:
        messages = [TURNS[0], spelling, observed, TURNS[1]]
        for tools in ([TOOL], [TOOL["function"]], json.dumps([TOOL])):
            assert read({"messages": messages, "tools": tools}) == expected, spelling
    identified = [TURNS[0], turn("assistant", "", tool_calls=[CALL | {"id": "c1"}])]
    (example,) = read({"messages": identified})
    assert isinstance(example, Conversation)
    assert example.messages[1].tool_calls[0]["id"] == "c1"


def test_reasoning_in_every_spelling() -> None:
    """A key of three names, or a part of the content."""
    expected = chat(USER, Message("assistant", "ho", reasoning_content="why"))
    for key in ("reasoning_content", "reasoning", "thinking"):
        assert read({"messages": [TURNS[0], TURNS[1] | {key: "why"}]}) == expected
    both = {"reasoning_content": "why", "thinking": "why"}
    assert read({"messages": [TURNS[0], TURNS[1] | both]}) == expected
    parts = [{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "ho"}]
    assert read({"messages": [TURNS[0], turn("assistant", parts)]}) == expected
    assert read({"messages": [TURNS[0], TURNS[1] | {"thinking": ""}]}) == chat(USER, BOT)


@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}])
def test_a_turn_of_weight_0_is_read_and_not_learned(off: dict[str, Any]) -> None:
    bad = turn("assistant", "bad", **off)
    good = turn("assistant", "good", weight=1)
    (example,) = read({"messages": [TURNS[0], bad, turn("user", weight=0), good]})
    assert isinstance(example, Conversation)
    learned = [m.content for m in example.messages if m.role == "assistant" and m.learned]
    assert learned == ["good"]
    assert example.messages[1].content == "bad"


def test_prompt_and_completion_learn_the_completion() -> None:
    """As text, as turns, or one of each; the assistant's turns in a prompt are not learned."""
    assert read({"prompt": "a", "completion": "b"}) == [Text("d#0", "a", "b")]
    told = Message("assistant", "ho", learned=False)
    row = {"prompt": [*TURNS, turn("user", "more")], "completion": [turn("assistant", "yes")]}
    expected = chat(USER, told, Message("user", "more"), Message("assistant", "yes"))
    assert read(row) == expected
    assert read(row | {"completion": "yes"}) == expected
    assert read({"prompt": "hi", "completion": [TURNS[1]]}) == chat(USER, BOT)


def test_text_is_learned_as_a_whole() -> None:
    assert read({"text": "once", "url": "x"}) == [Text("d#0", "", "once")]


def test_variables_of_the_chat_template() -> None:
    row = {"messages": TURNS, "chat_template_kwargs": {"enable_thinking": False, "other": None}}
    assert read(row) == chat(USER, BOT, template_kwargs={"enable_thinking": False})


def test_developer_turns_stay_what_they_are() -> None:
    row = {"messages": [turn("developer", "d"), *TURNS]}
    assert read(row) == chat(Message("developer", "d"), USER, BOT)


def test_columns_get_their_meaning_from_the_person() -> None:
    """Renamed, or left out in rows and turns; a new name that is taken is refused."""
    row = {"problem": "a", "solution": "b", "level": 5}
    columns = {"problem": "instruction", "solution": "output"}
    expected = [Instruction("d#0", "a", "", "b")]
    assert read(row, columns=columns, ignore=("level",)) == expected
    turns = [TURNS[0], TURNS[1] | {"mood": "fine"}]
    assert read({"messages": turns}, ignore=("mood",)) == chat(USER, BOT)
    spoken = [{"speaker": "user", "said": "hi"}, {"speaker": "bot", "said": "ho"}]
    renamed = {"talk": "messages", "speaker": "role", "said": "content"}
    assert read({"talk": spoken}, columns=renamed) == chat(USER, BOT)
    with pytest.raises(DataError, match="gives two columns the name 'output'"):
        read({"a": "x", "output": "y", "instruction": "z"}, columns={"a": "output"})
    with pytest.raises(DataError, match="d#0: turn 0: --column_mapping gives two columns the name"):
        read([turn("user", speaker="bot"), TURNS[1]], columns={"speaker": "role"})
    swapped = {"output": "instruction", "instruction": "output"}
    assert read({"instruction": "b", "output": "a"}, columns=swapped) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": TURNS, "instruction": "a", "output": "b"},
            "holds messages, and would lose instruction, output; leave out what is not to be"
            " learned, as with --ignore_columns instruction,output",
        ),
        ({"instruction": "a", "output": "b", "rejected": "c"}, "would lose rejected"),
        ({"instruction": "a", "output": "b", "reasoning": "c"}, "would lose reasoning"),
        ({"instruction": "a", "output": "b", "response": "c"}, "would lose response"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "would lose system"),
        ({"text": "a", "title": "b"}, "holds text, and would lose title"),
        ({"text": "a", "label": False}, "would lose label"),
        ({"messages": TURNS, "images": ["x.png"]}, "would lose images"),
        ({"messages": TURNS, "documents": [{"a": "b"}]}, "would lose documents"),
        ({"instruction": "a", "instances": [{"output": "b", "hint": "c"}]}, "would lose hint"),
        ({"messages": [TURNS[0], TURNS[1] | {"audio": {"id": 1}}]}, "turn 1 would lose audio"),
        ({"instruction": "a", "instances": []}, "is a seed task without instances to learn from"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "is a preference pair"),
        ({"prompt": "a", "output": "b"}, "its columns are prompt, output. Known are messages"),
        ({}, "its columns are none"),
        ({"messages": [TURNS[0], turn("assistant", "x", weight=0)]}, "all of the assistant's have"),
        (
            {"messages": [TURNS[0], turn("assistant", "x", weight=0.5)]},
            "weight is 0.5; known",
        ),
        ({"messages": [turn("user", "x", weight=1), TURNS[1]]}, "only the assistant's are learned"),
        ({"messages": [turn("user", "x", tool_calls=[CALL]), TURNS[1]]}, "the user's and has tool"),
        ({"messages": [turn("user", "x", thinking="y"), TURNS[1]]}, "the user's and has reasoning"),
        (
            {"messages": [turn("user", [{"type": "image_url", "image_url": "x"}]), TURNS[1]]},
            "part 0 of its content is of the type 'image_url'; this trainer learns text alone",
        ),
        ({"messages": [turn("function_call", "soon"), *TURNS]}, "tool_calls is a str, not a list"),
        ({"messages": [turn("function_call", "[]"), *TURNS]}, "its content is no JSON of one"),
        ({"messages": [turn("assistant", "", tool_calls=[{}])]}, "tool call 0 names no function"),
        (
            {"messages": [turn("assistant", "", tool_calls=[{"name": "f", "arguments": "x"}])]},
            "its arguments are no JSON object",
        ),
        ({"messages": TURNS, "tools": [deep(70)]}, "tool 0 is nested more than 64 deep"),
        ({"messages": TURNS, "tools": [{"a": ["\ud800"]}]}, "tool 0 holds half a surrogate pair"),
        ({"messages": TURNS, "tools": "[{"}, "tools is a str, not a list"),
        ({"messages": TURNS, "tools": [3]}, "tool 0 is a int, not an object"),
        ({"messages": TURNS, "chat_template_kwargs": {"tools": []}}, "no object of template"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "history 0 is no pair"),
    ],
)
def test_what_would_be_lost_or_cannot_be_learned_is_refused_by_name(row: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(row)
    assert str(caught.value).startswith("d#0: ")
    assert message in str(caught.value)
