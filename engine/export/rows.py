"""Accepted rows, each with where it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.errors import InputError
from engine.export.choice import Choice
from engine.records import SAMPLE, Answer, Decision, Record
from engine.store import RunReader
from engine.thoughts import thoughts_apart

__all__ = ["Row", "rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One accepted record."""

    id: str
    """``REQUEST.POSITION``: which answer, and which piece of it."""
    number: int
    """Among all accepted rows of the run in plan order, from 0."""
    record: Record
    decision: Decision
    model: str
    """As the server named it in its reply; empty without provenance."""
    demonstrations: tuple[str, ...]
    """Sources of what the model was shown, as ids of seed tasks; empty without provenance."""
    reasoning: str
    """The thoughts of its answer; empty without provenance."""


def rows(
    run: RunReader,
    *,
    provenance: bool = False,
    choice: Choice | None = None,
    all_samples: bool = False,
) -> Iterator[Row]:
    """The rows of ``choice`` in its order; without one, all accepted rows in plan order.

    Args:
        provenance: reads the answers as well: twice the work.
        all_samples: without a choice, also the samples that an accepted row was made of.
    """
    if choice is not None and choice.sorted is not None:
        for place in choice.sorted:
            decision = run.decision(place.request, place.position)
            found = run.answers(place.request, 1) if provenance else []
            if decision is None or (provenance and not found):
                raise InputError(f"{run.path}: row {place.request}.{place.position} is missing")
            yield _row(run, place.number, decision, found[0] if found else None)
        return
    answers = (answer for answer, _ in run.all_answers()) if provenance else iter(())
    answer = None
    decisions = run.decisions(accepted=None if all_samples else True)
    number = -1
    for decision in decisions:
        if decision.reason not in (None, SAMPLE):
            continue
        number += 1
        if choice is not None and number == choice.count:
            return
        while provenance and (answer is None or answer.index < decision.index):
            answer = next(answers, None)
            if answer is None:
                raise InputError(f"{run.path}: answer {decision.index} is missing")
        yield _row(run, number, decision, answer)


def _row(run: RunReader, number: int, decision: Decision, answer: Answer | None) -> Row:
    if decision.record is None:
        raise InputError(f"{run.path}: row {decision.index}.{decision.position} has no record")
    completion = answer.completion if answer is not None else None
    return Row(
        id=f"{decision.index}.{decision.position}",
        number=number,
        record=decision.record,
        decision=decision,
        model=completion.model if completion is not None else "",
        demonstrations=answer.demonstrations if answer is not None else (),
        reasoning=thoughts_apart(completion).reasoning if completion is not None else "",
    )
