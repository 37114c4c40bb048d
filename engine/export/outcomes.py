"""What became of each input row: a line for every one, through all stages of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from engine.errors import UsageError
from engine.records import SAMPLE, Decision, Record
from engine.stages import Stage, samples_of
from engine.store import RunReader

__all__ = ["Outcomes"]

FAILED = "failed:"
"""How the reason of a request begins that failed permanently."""


class Outcomes:
    """The lines of ``--outcomes``, in the order of the input.

    Args:
        stages, runs: all stages of a run, in order.

    Raises UsageError where the run has no input rows.
    """

    def __init__(self, stages: Sequence[Stage], runs: Sequence[RunReader]) -> None:
        if samples_of(runs[0]) is None:
            raise UsageError("--outcomes needs a run with input rows (woolmill generate --rows)")
        self._walks = [_Walk(stage.name, run) for stage, run in zip(stages, runs, strict=True)]
        self._carried: Sequence[str] = runs[-1].manifest.decision.get("carry") or ()
        first = self._walks[0]
        requests = runs[0].size()
        self._size = None if requests is None else requests // first.samples
        self._inputs = _Inputs(runs[0], first.samples)
        self.counts: Counter[str] = Counter()
        """How many rows came to each outcome, among the lines given so far."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """``row`` (counted from 0), the fields that rows carry over, ``outcome``, ``accepted`` (ids
        of the dataset's rows that were made of it), ``refused`` (``stage``, ``id``, ``reason`` and
        ``detail`` of each piece that was refused on the way), ``open`` (requests about it without a
        decision yet) and ``input``, the row itself, null where nobody was asked about it.

        The outcome is ``accepted`` where one row came of it; else ``open`` where one may still
        come; else ``failed`` where nothing but permanent failures came, and ``refused``.
        """
        for number in count():
            seen = self._walks[0].is_more
            if not seen and (self._size is None or number >= self._size):
                return
            rows, open_ = 1, 0
            refused: list[dict[str, Any]] = []
            accepted: list[Decision] = []
            for walk in self._walks:
                decisions, undecided = walk.about(rows)
                open_ += undecided
                accepted = [each for each in decisions if each.accepted]
                refused += [walk.told(each) for each in decisions if _is_refused(each)]
                rows = len(accepted)
            row = self._inputs.of(number)
            outcome = _outcome(accepted, refused, open_)
            self.counts[outcome] += 1
            yield {
                "row": number,
                **{name: (row or {}).get(name) for name in self._carried},
                "outcome": outcome,
                "accepted": [f"{each.index}.{each.position}" for each in accepted],
                "refused": refused,
                "open": open_,
                "input": row,
            }


def _outcome(accepted: list[Decision], refused: list[dict[str, Any]], open_: int) -> str:
    if accepted:
        return "accepted"
    if open_:
        return "open"
    failed = refused and all(each["reason"].startswith(FAILED) for each in refused)
    return "failed" if failed else "refused"


def _is_refused(decision: Decision) -> bool:
    return not decision.accepted and decision.reason != SAMPLE


class _Walk:
    """The decisions of one stage in plan order. A stage asks about the accepted rows of the one
    before in their order, so each input row's requests follow those of the row before it.
    """

    def __init__(self, name: str, run: RunReader) -> None:
        self._name = name
        self.samples = samples_of(run) or 1
        self._decisions = run.decisions()
        self._next = next(self._decisions, None)
        self._request = 0
        """The first that belongs to the next row."""

    @property
    def is_more(self) -> bool:
        return self._next is not None

    def about(self, rows: int) -> tuple[list[Decision], int]:
        """The decisions about the next so many rows, and how many requests about them have none."""
        requests = rows * self.samples
        self._request += requests
        found, decided = [], set()
        while self._next is not None and self._next.index < self._request:
            found.append(self._next)
            decided.add(self._next.index)
            self._next = next(self._decisions, None)
        return found, requests - len(decided)

    def told(self, decision: Decision) -> dict[str, Any]:
        stage = {"stage": self._name} if self._name else {}
        return {
            **stage,
            "id": f"{decision.index}.{decision.position}",
            "reason": decision.reason,
            "detail": decision.detail,
        }


class _Inputs:
    """The input rows of a run, by number from 0 on."""

    def __init__(self, run: RunReader, samples: int) -> None:
        self._samples = samples
        self._answers = (answer for answer, _ in run.all_answers())
        self._next = next(self._answers, None)

    def of(self, number: int) -> Record | None:
        """That of ``number``, which must be larger than at the call before."""
        row = None
        while self._next is not None and self._next.index // self._samples <= number:
            if self._next.index // self._samples == number:
                row = self._next.row
            self._next = next(self._answers, None)
        return row
