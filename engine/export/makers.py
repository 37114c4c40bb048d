"""Which model wrote a row, and which judged or rewrote it: those of all stages that it came
through.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from engine.export.rows import Row
from engine.stages import Lineage, Stage
from engine.store import RunReader

__all__ = ["Makers"]


class Makers:
    """The models of the stages up to the one whose rows are asked about.

    Holds two bytes for each request of an earlier stage that several models answered, else nothing.

    Args:
        stages, runs: all up to that one.
    """

    def __init__(self, stages: Sequence[Stage], runs: Sequence[RunReader]) -> None:
        self._names = [stage.name for stage in stages]
        self._before = [_answered(run) for run in runs[:-1]]
        self._lineage = (
            Lineage(stages, runs) if any(stage.requests for stage in self._before) else None
        )

    def of(self, row: Row) -> list[str]:
        """``STAGE:MODEL`` in the order of the stages, without those that asked no model."""
        request, asked = row.decision.index, [0] * len(self._before)
        if self._lineage is not None:
            asked = [request for _, request, _ in reversed(self._lineage.parents(request))]
        models = [
            *(stage.model(request) for stage, request in zip(self._before, asked, strict=True)),
            row.model,
        ]
        return [f"{name}:{model}" for name, model in zip(self._names, models, strict=True) if model]


@dataclass(frozen=True, slots=True)
class _Answered:
    """Who answered the requests of a stage."""

    models: list[str]
    requests: array[int]
    """For each request the place of its model; empty where all have the first."""

    def model(self, request: int) -> str:
        if not self.models:
            return ""
        return self.models[self.requests[request] if self.requests else 0]


def _answered(run: RunReader) -> _Answered:
    models = sorted(run.counts().models)
    requests = array("H")
    if len(models) > 1:
        places = {model: place for place, model in enumerate(models)}
        for answer, _ in run.all_answers():
            requests.extend([0] * (answer.index - len(requests)))  # not answered, so of no row
            requests.append(places[answer.completion.model] if answer.completion else 0)
    return _Answered(models, requests)
