"""Accepted rows, each with where it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.errors import InputError
from engine.records import Decision, Record
from engine.store import RunReader

__all__ = ["Row", "rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One accepted record."""

    id: str
    """``REQUEST.POSITION``: which answer, and which piece of it."""
    record: Record
    decision: Decision
    model: str
    """As the server named it in its reply; empty without provenance."""
    demonstrations: tuple[str, ...]
    """Ids of the seed tasks that the model saw; empty without provenance."""


def rows(run: RunReader, *, provenance: bool = False) -> Iterator[Row]:
    """Accepted rows in plan order. ``provenance`` reads the answers as well: twice the work."""
    answers = (answer for answer, _ in run.all_answers()) if provenance else iter(())
    answer = None
    for decision in run.decisions(accepted=True):
        if decision.record is None:
            raise InputError(f"{run.path}: row {decision.index}.{decision.position} has no record")
        while provenance and (answer is None or answer.index < decision.index):
            answer = next(answers, None)
            if answer is None:
                raise InputError(f"{run.path}: answer {decision.index} is missing")
        completion = answer.completion if answer is not None else None
        yield Row(
            id=f"{decision.index}.{decision.position}",
            record=decision.record,
            decision=decision,
            model=completion.model if completion is not None else "",
            demonstrations=answer.demonstrations if answer is not None else (),
        )
