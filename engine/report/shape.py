"""What a report calls the parts of a row: the text that it is told by, and the answer in it.

A row is told by the text that near-duplicates are judged by; where the recipe compares none, by
what it asks, or its first text. The answer is the field with a usual name for one, else the last
text besides.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import orjson

from engine.kept import recipe_of
from engine.recipes.base import ANSWERS, Recipe, telling_text
from engine.recipes.guard import RecipeFault, compared_text
from engine.recipes.load import ALPACA
from engine.records import Decision, Record
from engine.store import RunReader

__all__ = ["Shape", "beginning", "shape_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How the rows of one run are told about."""

    recipe: Recipe | None = None
    alpaca: bool = True

    @property
    def noun(self) -> str:
        """What the text that a row is told by is called."""
        return "instruction" if self.alpaca else "text"

    def told_by(self, record: Record | None) -> str:
        """The text that a row is told by; empty for no row."""
        if record is None:
            return ""
        if self.alpaca:
            return str(record["instruction"])
        text = None
        if self.recipe is not None:
            try:
                text = compared_text(self.recipe, record)
            except RecipeFault:  # a decision already says so, where it was its fault
                text = None
        return text or telling_text(record) or shown(record)

    def answer(self, record: Record) -> str | None:
        """The name of the field that answers; None where a row has no more than one text."""
        if self.alpaca:
            return "output"
        texts = texts_of(record)
        usual = next((name for name in ANSWERS if name in texts), None)
        return usual or (list(texts)[-1] if len(texts) > 1 else None)

    def asked(self, record: Record) -> str:
        """All texts but the answer, one after the other."""
        answer = self.answer(record)
        return " ".join(text for name, text in texts_of(record).items() if name != answer)


def shape_of(run: RunReader) -> Shape:
    """That of a run's rows."""
    alpaca = run.manifest.fixed.get("recipe", ALPACA) == ALPACA
    return Shape(recipe=None if alpaca else recipe_of(run), alpaca=alpaca)


def texts_of(record: Record) -> dict[str, str]:
    """The fields that hold text."""
    return {name: value for name, value in record.items() if isinstance(value, str)}


def shown(value: object) -> str:
    """Any value as text: itself, or JSON."""
    if isinstance(value, str):
        return value
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # half of a surrogate pair, or an integer of any size
        return json.dumps(value)


def beginning(run: RunReader, decision: Decision, *, alpaca: bool, most: int) -> str:
    """What stands in the answer where no row could be read of it, as of one that was cut off."""
    answers = run.answers(decision.index, 1)
    completion = answers[0].completion if answers else None
    if completion is None:
        return ""
    text = completion.text.strip()
    if alpaca:
        pieces = completion.text.split("###")
        text = pieces[decision.position].strip() if decision.position < len(pieces) else text
    elif decision.position and len(text) > most:
        return f"…{text[1 - most :]}"  # it came behind others, so the end is nearer
    return text[:most]
