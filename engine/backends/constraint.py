"""Whether whoever answers really constrains answers to a schema, told from the first answers.

Many servers take ``response_format`` and ignore it: under some chat templates, with thoughts
switched off, or behind a gateway. That costs paid answers that do not fit, and nothing says so. One
answer that does not fit proves it; so the first answers are checked, and the person is told once.
Every answer is checked again by the recipe, whatever is found here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from engine.records import Completion
from engine.thoughts import thoughts_apart

__all__ = ["CONSTRAINT", "Witness", "schema_of"]

CONSTRAINT = "response_format"
"""The field of a request that asks for a form of answers, in OpenAI's words."""
WATCHED = 8
"""Answers that are checked."""


def schema_of(extra: Mapping[str, Any]) -> dict[str, Any] | None:
    """The JSON schema that a request's ``response_format`` holds; None: it asks for none."""
    wanted = extra.get(CONSTRAINT)
    if not isinstance(wanted, Mapping) or wanted.get("type") != "json_schema":
        return None
    inner = wanted.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    return schema if isinstance(schema, dict) else None


class Witness:
    """Checks the first answers of one host that were asked for by a schema.

    Args:
        tell: called once with a line for the person, when an answer does not keep to it.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._seen = 0
        self.constrains: bool | None = None
        """None while it is not known."""

    def saw(self, extra: Mapping[str, Any], answer: Completion | BaseException) -> None:
        """An answer to a request with these further fields."""
        if self.constrains is not None or not isinstance(answer, Completion):
            return
        schema = schema_of(extra)
        answer = thoughts_apart(answer)
        if schema is None or answer.finish_reason != "stop":
            return
        self._seen += 1
        if not _keeps_to(schema, answer.text):
            self.constrains = False
            self._tell(
                "it does not constrain answers to the schema that is sent; they are checked here, "
                "and those that do not fit are refused"
            )
        elif self._seen == WATCHED:
            self.constrains = True


def _keeps_to(schema: dict[str, Any], text: str) -> bool:
    """Whether the whole text is JSON of the schema, as a grammar would have it."""
    import jsonschema_rs

    try:
        return bool(jsonschema_rs.validator_for(schema).is_valid(orjson.loads(text)))
    except ValueError:  # not JSON, or no schema that can be checked by
        return False
