"""A row as the turns of a chat, as its recipe makes them."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

from engine.errors import ConfigError
from engine.export.rows import Row
from engine.recipes.base import Recipe, chat_of
from engine.recipes.guard import RecipeFault, time_limit
from engine.records import Record

__all__ = ["REASONING", "asked", "turns_of"]

REASONING = "reasoning_content"
"""The field of an assistant's turn that chat templates and servers take thoughts by."""


def turns_of(recipe: Recipe | None, row: Row, *, reasoning: bool) -> list[dict[str, Any]]:
    """The turns of ``row``; without its recipe, as the names of its fields say.

    Args:
        reasoning: the last turn of the assistant gets the answer's thoughts, where there are any;
            otherwise no turn has thoughts.

    Raises ConfigError with the remedy where the row makes no chat.
    """
    turns = _turns(recipe, row)
    if turns is None:
        fields = ", ".join(row.record)
        raise ConfigError(
            f"row {row.id} makes no chat of its fields ({fields}); give the recipe a method "
            "messages(row), or choose --format jsonl, parquet, csv or datasets"
        )
    if not isinstance(turns, list) or not turns or not all(map(_is_turn, turns)):
        raise ConfigError(
            f"row {row.id}: what makes its chat gave no list of turns with role and content; mend "
            "the recipe's method messages(row), or choose --format jsonl"
        )
    if not reasoning:
        return [{k: v for k, v in turn.items() if k != REASONING} for turn in turns]
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    if last < 0 or not row.reasoning or turns[last].get(REASONING):
        return turns
    return [*turns[:last], {**turns[last], REASONING: row.reasoning}, *turns[last + 1 :]]


def asked(recipe: Recipe | None, record: Record) -> str:
    """What the user's turns of a row say; where it makes no chat, all of its text."""
    turns: Any = None
    with suppress(Exception):  # whatever a recipe's own code raises: then there is no chat
        with nullcontext() if recipe is None or recipe.builtin else time_limit():
            turns = chat_of(record) if recipe is None else recipe.messages(record)
    if isinstance(turns, list) and all(map(_is_turn, turns)):
        said = [turn["content"] for turn in turns if turn["role"] == "user"]
        if texts := [text for text in said if isinstance(text, str)]:
            return "\n".join(texts)
    return "\n".join(value for value in record.values() if isinstance(value, str))


def _turns(recipe: Recipe | None, row: Row) -> Any:
    if recipe is None:
        return chat_of(row.record)
    try:
        with nullcontext() if recipe.builtin else time_limit():
            return recipe.messages(row.record)
    except RecipeFault as error:
        problem = str(error)
    except Exception as error:  # noqa: BLE001 - whatever a recipe's own code raises
        problem = f"{type(error).__name__}: {error}"
    raise ConfigError(
        f"row {row.id}: the recipe's messages(row) failed ({problem}); mend it, or choose "
        "--format jsonl"
    )


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn
