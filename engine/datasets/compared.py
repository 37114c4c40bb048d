"""What of a row is compared: the fields named, or else the ones that its first row suggests.

Of a chat, the first turn of the user is: it is to a conversation what the instruction is to a
record. A row of which nothing is left to compare is like no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.datasets.forms import Row
from engine.errors import InputError

__all__ = ["USUAL", "Compared", "choose"]

USUAL = (
    "instruction", "messages", "conversations", "prompt", "question", "query", "problem",
    "text", "input",
)  # fmt: skip
"""Fields that are compared where none is named: the first that a dataset's first row has, and an
instruction's input with it, since the same instruction may be given about other things."""
USERS = ("user", "human")
"""What chats call the one who asks: OpenAI's and ShareGPT's word."""


@dataclass(frozen=True, slots=True)
class Compared:
    """The fields that are compared, on a line each."""

    fields: tuple[str, ...]
    chosen: bool
    """By this program, and not by the person."""
    is_chat: bool = False
    """Whether the first field held a chat in the first row."""

    def text(self, row: Row) -> str:
        """The text to compare, empty where there is none.

        Raises InputError where a field is missing, or is neither text nor a chat.
        """
        first, *others = self.fields
        texts = [_text(row, first)]
        if not self.chosen:
            texts += [_text(row, field) for field in others]
        elif texts[0] and not texts[0].isspace():  # what goes with it may be text, NaN or missing
            values = map(row.values.get, others)
            texts += [value for value in values if isinstance(value, str)]
        return "\n".join(text for text in texts if text and not text.isspace())

    def __str__(self) -> str:
        first, *others = self.fields
        if self.chosen and others:
            return f"{first}, with its {' and '.join(others)} where there is one"
        first += " (of a chat the user's first turn)" * self.is_chat
        return " and ".join([first, *others])


def choose(row: Row, fields: tuple[str, ...] = ()) -> Compared:
    """What is compared of a dataset with this first row. Raises InputError where nothing suggests
    itself.
    """
    if fields:
        return Compared(fields, False, isinstance(row.values.get(fields[0]), list))
    usual = next((name for name in USUAL if name in row.values), None)
    if usual is None:
        raise InputError(
            f"{row.path}:{row.line}: none of the fields is one that is usually compared (there is "
            f"no field 'instruction' or the like; {_fields(row)}); name one with --field"
        )
    # By the name alone: the first row may have no input where others have.
    fields = ("instruction", "input") if usual == "instruction" else (usual,)
    return Compared(fields, True, isinstance(row.values[usual], list))


def _fields(row: Row) -> str:
    """For the person: what may be compared instead."""
    return f"there are: {', '.join(map(repr, list(row.values)[:8])) or 'none'}"


def _text(row: Row, field: str) -> str:
    where = f"{row.path}:{row.line}"
    if field not in row.values:
        raise InputError(f"{where}: there is no field {field!r}; {_fields(row)}; see --field")
    value = row.values[field]
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return _first_of_user(value, f"{where}: field {field!r}")
    raise InputError(
        f"{where}: field {field!r} is not text but {_kind(value)}; name another with --field"
    )


def _first_of_user(turns: list[dict[str, Any]], where: str) -> str:
    """The first turn of the user, in OpenAI's terms (role, content) or ShareGPT's (from, value)."""
    for number, turn in enumerate(turns):
        role = turn.get("role", turn.get("from"))
        if role is None:
            raise InputError(
                f"{where}: turn {number} says neither role nor from; name another with --field"
            )
        if role in USERS:
            return _content(turn.get("content", turn.get("value")), f"{where}: turn {number}")
    return ""


def _content(content: Any, where: str) -> str:
    """Text, or the text among parts of several kinds."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "\n".join(part for part in parts if isinstance(part, str))
    if content is None or isinstance(content, str):
        return content or ""
    raise InputError(f"{where} is not text but {_kind(content)}; name another with --field")


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", bool: "true or false", int: "a number",
             float: "a number"}  # fmt: skip
    return names.get(type(value), f"of type {type(value).__name__}")
