"""Refused pieces of answers, each with the reason and all that it came from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from engine.errors import InputError
from engine.export.layout import own_name
from engine.records import SAMPLE
from engine.stages import samples_of
from engine.store import RunReader
from engine.thoughts import thoughts_apart

__all__ = ["refused_lines"]


def refused_lines(run: RunReader, id_: str = "id") -> Iterator[dict[str, Any]]:
    """A line for each in plan order: ``reason`` (as reports count it), ``detail``, ``record``
    (None: nothing could be read), ``nearest`` (the text that it resembles, for near-duplicates),
    ``answer`` (the model's text; None: the request failed), and in runs with input rows ``row``
    (counted from 0), ``sample`` and ``input``, the input row itself. Before them the piece's own id
    under the name ``id_``, and the fields that rows carry over from their input.

    Samples that a row was made of are not refused.
    """
    carried: Sequence[str] = run.manifest.decision.get("carry") or ()
    samples = samples_of(run)
    answers = (answer for answer, _ in run.all_answers())
    answer = None
    for decision in run.decisions():
        if decision.accepted or decision.reason == SAMPLE:
            continue
        while answer is None or answer.index < decision.index:
            answer = next(answers, None)
            if answer is None:
                raise InputError(f"{run.path}: answer {decision.index} is missing")
        said, nearest = answer.completion, decision.nearest
        told: dict[str, Any] = {
            "reason": decision.reason,
            "detail": decision.detail,
            "record": decision.record,
            "nearest": nearest
            and {"text": nearest.text, "score": nearest.score, "source": nearest.source},
            "answer": None if said is None else thoughts_apart(said).text,
        }
        if samples is not None:
            told["row"], told["sample"] = divmod(decision.index, samples)
            told["input"] = answer.row
        yield {
            id_: f"{decision.index}.{decision.position}",
            **{name: (answer.row or {}).get(name) for name in carried},
            **{own_name(name, carried): value for name, value in told.items()},
        }
