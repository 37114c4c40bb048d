"""What became of each input row: a line for every one, through all stages of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import orjson

from engine.datasets import Dataset, Row
from engine.errors import InputError, UsageError
from engine.export.layout import own_name
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

    Raises UsageError where the run has no input rows, or is merged of others.
    """

    def __init__(self, stages: Sequence[Stage], runs: Sequence[RunReader]) -> None:
        if samples_of(runs[0]) is None:
            raise UsageError("--outcomes needs a run with input rows (woolmill generate --rows)")
        if runs[0].manifest.fixed.get("merged"):
            raise UsageError(
                "--outcomes: this run is merged of others, each with input rows of its own; give "
                "the folder of one of those"
            )
        self._walks = [_Walk(stage.name, run) for stage, run in zip(stages, runs, strict=True)]
        self._carried: Sequence[str] = runs[-1].manifest.decision.get("carry") or ()
        self._inputs = _Inputs(runs[0], self._walks[0].samples)
        self.counts: Counter[str] = Counter()
        """How many rows came to each outcome, among the lines given so far."""

    @property
    def unlisted(self) -> str:
        """Why rows that nobody was asked about have no line; empty where they have."""
        return self._inputs.missing

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """``row`` (counted from 0), the fields that rows carry over, ``outcome``, ``accepted`` (ids
        of the dataset's rows that were made of it), ``refused`` (``stage``, ``id``, ``reason`` and
        ``detail`` of each piece that was refused on the way), ``open`` (requests about it without a
        decision yet) and ``input``, the row itself. Where a field that rows carry over has such a
        name, ours is called ``woolmill_row`` and so on.

        The outcome is ``accepted`` where one row came of it; else ``open`` where one may still
        come; else ``failed`` where nothing but permanent failures came, and ``refused``.
        """
        for number in count():
            row = self._inputs.of(number)
            if row is None and not self._walks[0].is_more and not self._inputs.is_more:
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
            outcome = _outcome(accepted, refused, open_)
            self.counts[outcome] += 1
            ids = [f"{each.index}.{each.position}" for each in accepted]
            told: dict[str, Any] = {
                "outcome": outcome,
                "accepted": ids,
                "refused": refused,
                "open": open_,
            }
            told["input"] = row
            carried = self._carried
            yield {
                own_name("row", carried): number,
                **{name: (row or {}).get(name) for name in carried},
                **{own_name(name, carried): value for name, value in told.items()},
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
    """The input rows of a run by number, from 0 on: as it asked about them, and where it has not
    asked (yet), as they stand in its input.
    """

    def __init__(self, run: RunReader, samples: int) -> None:
        self._samples = samples
        self._answers = (answer for answer, _ in run.all_answers())
        self._next = next(self._answers, None)
        path = str(run.manifest.free.get("rows") or "")
        self.missing = "" if path else "the run keeps no name of its input"
        """Why the input cannot be read; empty as long as it can."""
        rows = Dataset(Path(path), skip=lambda _: None) if path else ()
        self._file: Iterator[tuple[int, Row]] = enumerate(rows)

    @property
    def is_more(self) -> bool:
        """The run has asked about rows behind the last one."""
        return self._next is not None

    def of(self, number: int) -> Record | None:
        """That of ``number``, which must be larger than at the call before; None: there is none, or
        nobody knows it.
        """
        row = None
        while self._next is not None and self._next.index // self._samples <= number:
            if self._next.index // self._samples == number:
                row = self._next.row
            self._next = next(self._answers, None)
        return self._in_the_file(number) if row is None else row

    def _in_the_file(self, number: int) -> Record | None:
        try:
            for place, found in self._file:
                if place == number:
                    return orjson.loads(orjson.dumps(found.values, default=str))  # type: ignore[no-any-return]
        except (InputError, TypeError) as error:
            self.missing = str(error)
            self._file = enumerate(())
        return None
