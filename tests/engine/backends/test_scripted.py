"""The scripted backend answers whatever a recipe asks, and always the same."""

from __future__ import annotations

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


def prompt(text: str, *, seed: int = 0, schema: dict[str, Any] | None = None) -> Prompt:
    """A chat of two turns, with a schema for its answer."""
    extra = {}
    if schema is not None:
        inner = {"name": "answer", "schema": schema}
        extra["response_format"] = {"type": "json_schema", "json_schema": inner}
    return Prompt(
        index=0,
        api="chat",
        messages=(Message(role="system", content="Be brief."), Message(role="user", content=text)),
        sampling=Sampling(max_tokens=99, seed=seed, extra=extra),
    )


@pytest.mark.parametrize("name", SCHEMAS)
@given(seed=st.integers(0, 2**31))
def test_a_schema_gets_json_that_it_allows(name: str, seed: int) -> None:
    schema = SCHEMAS[name]
    answer = orjson.loads(fitting_text(prompt("Ask.", seed=seed, schema=schema)))
    jsonschema_rs.validate(schema, answer)


def test_answers_are_told_apart_by_their_prompts_alone() -> None:
    """The same prompt has the same answer in every process; others have others."""
    texts = [fitting_text(prompt(f"Question {n}?")) for n in range(200)]
    assert texts == [fitting_text(prompt(f"Question {n}?")) for n in range(200)]
    assert len(set(texts)) == 200
    assert all(text.count(".") >= 2 for text in texts)


@pytest.mark.anyio
async def test_tokens_of_all_turns_are_counted() -> None:
    (answer,) = await ScriptedBackend().complete([prompt("One two three.")])
    assert isinstance(answer, Completion)
    assert answer.usage.prompt_tokens == 5
