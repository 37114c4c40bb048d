"""The scripted backend answers whatever a recipe asks, and always the same."""

from __future__ import annotations

import re
from typing import Any

import jsonschema_rs
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.backends.scripted import ScriptedBackend, fitting_text
from engine.records import Completion, Message, Prompt, Sampling

ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string", "maxLength": 20}, "number": {"type": "integer"}},
    "required": ["street", "number"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "nested": {
        "type": "object",
        "properties": {
            "question": {"type": "string", "minLength": 120},
            "level": {"enum": ["easy", "hard"]},
            "score": {"type": "integer", "minimum": 1, "maximum": 5},
            "share": {"type": "number", "minimum": 0.25, "maximum": 0.75},
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 4},
            "address": ADDRESS,
            "done": {"type": "boolean"},
            "kind": {"const": "question"},
        },
        "required": ["question", "level", "score", "tags", "address", "done", "kind"],
    },
    "array": {"type": "array", "items": ADDRESS, "minItems": 1},
    "references": {
        "$defs": {"node": {"type": "object", "properties": {"next": {"anyOf": [
            {"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["next"]}},
        "$ref": "#/$defs/node",
    },
    "either": {"oneOf": [{"type": "integer", "multipleOf": 5}, ADDRESS]},
    "every": {"allOf": [{"type": "object"}, ADDRESS]},
    "types": {"type": ["string", "null"]},
    "above": {"type": "integer", "exclusiveMinimum": 3, "maximum": 4},
    "below": {"type": "integer", "maximum": -7},
    "unnamed": {"type": "object", "required": ["extra"]},
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
@given(seed=st.integers(0, 2**31))
def test_a_schema_gets_json_that_it_allows(name: str, seed: int) -> None:
    schema = SCHEMAS[name]
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = orjson.loads(fitting_text("Ask.", seed=seed, form=form))
    jsonschema_rs.validate(schema, answer)


def test_answers_are_told_apart_by_their_prompts_alone() -> None:
    """The same prompt has the same answer in every process; others have others."""
    texts = [fitting_text(f"Question {n}?") for n in range(200)]
    assert texts == [fitting_text(f"Question {n}?") for n in range(200)]
    assert len(set(texts)) == 200
    assert all(text.count(".") >= 2 for text in texts)


def test_the_form_that_a_prompt_names_is_kept_to() -> None:
    tagged = fitting_text("Write <question>…</question> and <answer>…</answer> for it.")
    assert re.fullmatch(r"<question>[^<]+</question>\n<answer>[^<]+</answer>\n", tagged)
    labelled = fitting_text('Begin your answer with "Title:" and the title.')
    assert labelled.startswith("Title: ")
    assert "1. Instruction: " not in fitting_text("Instruction:")
    assert "5. Input:" in fitting_text("…\n###\n5. Instruction:")
    any_object = orjson.loads(fitting_text("JSON, please.", form={"type": "json_object"}))
    assert list(any_object) == ["text"]
    listed = fitting_text("Three rivers, as a numbered list.").splitlines()
    assert [line[:3] for line in listed] == ["1. ", "2. ", "3. "]
    assert len(set(listed)) == 3


@pytest.mark.anyio
async def test_a_chat_is_answered_by_all_its_turns() -> None:
    """Also its form, and its tokens are counted."""
    form = {"type": "json_schema", "json_schema": {"schema": ADDRESS}}
    prompts = [
        Prompt(
            index=0,
            api="chat",
            messages=(
                Message(role="system", content=system),
                Message(role="user", content="One two three."),
            ),
            sampling=Sampling(max_tokens=99, seed=1, extra={"response_format": form}),
        )
        for system in ("Be brief.", "Be kind.")
    ]
    one, other = await ScriptedBackend().complete(prompts)
    assert isinstance(one, Completion)
    assert isinstance(other, Completion)
    assert one.text != other.text
    assert jsonschema_rs.is_valid(ADDRESS, orjson.loads(one.text))
    assert one.usage.prompt_tokens == 5
