"""The stages of a run, for everything that reads runs: their folders, and what a row was made of.

Each stage is a run of its own (see ``engine.run.chain``): the last one in the run's folder, those
before it in ``stages/NUMBER-NAME`` below that. Request n of a stage is about the accepted row of
rank ``n // samples`` of the stage before it, so that a row's lineage is a matter of counting.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError, InputError, UsageError
from engine.money import Prices, Spent
from engine.records import SAMPLE, Answer, Decision, Record
from engine.store import RunReader
from engine.text import as_word

__all__ = [
    "BELOW",
    "Lineage",
    "Stage",
    "Stale",
    "carried_anew",
    "folders_below",
    "holds_run",
    "missing_stages",
    "open_stages",
    "parent_of",
    "place_in_chain",
    "remedy",
    "root_of",
    "samples_of",
    "stage_named",
    "stages_of_run",
    "stale_answers",
    "stale_lines",
]

BELOW = "stages"
"""The folder within a run's that has those of its earlier stages."""
NUMBERED = re.compile(r"([1-9][0-9]{0,3})-(.+)", re.S)
"""The name of a stage's folder, number and name: ``1-questions``."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a run."""

    name: str
    """``NUMBER-NAME``; empty where the run has one stage."""
    folder: Path


def stages_of_run(folder: Path) -> list[Stage]:
    """The stages of the run in ``folder``, in their order; the last one is the run itself.

    A run of one stage has that one. So has the folder of a single stage: read as a run, it is one.
    Raises InputError where there is no run.
    """
    with RunReader(folder) as run:
        fixed = run.manifest.fixed
    own = "" if fixed.get("merged") else str(fixed.get("stage") or "")
    before = folders_below(folder) if own else []
    if not before:
        return [Stage("", folder)]
    number = 1 + max(number for number, _ in before)
    name = own.rpartition("/")[2]
    return [*(stage for _, stage in before), Stage(f"{number}-{name}", folder)]


def holds_run(folder: Path) -> bool:
    """Whether anything of a run is in ``folder``, be it an earlier stage alone."""
    places = [folder, *(stage.folder for _, stage in folders_below(folder))]
    return any(os.path.isfile(place / "run.sqlite") for place in places)


def folders_below(folder: Path) -> list[tuple[int, Stage]]:
    """The stages before the last one that are there, each with its number."""
    found = []
    if os.path.isdir(folder / BELOW):  # no for a name that is too long, which pathlib raises for
        for path in (folder / BELOW).iterdir():
            matched = NUMBERED.fullmatch(path.name)
            if matched is not None and (path / "run.sqlite").is_file():
                found.append((int(matched[1]), Stage(path.name, path)))
    return sorted(found, key=lambda each: each[0])


def root_of(folder: Path) -> Path:
    """The folder of the run that ``folder`` is a stage of, or is itself."""
    return folder.parent.parent if folder.parent.name == BELOW else folder


def missing_stages(folder: Path) -> list[int]:
    """Numbers of stages that a run was made of and that its folder does not hold (any more)."""
    with RunReader(folder) as run:
        fixed, free = run.manifest.fixed, run.manifest.free
    if not fixed.get("stage") or fixed.get("merged"):
        return []
    there = [number for number, _ in folders_below(folder)]
    follows = isinstance(free.get("rows_identity"), list) and not free.get("rows")
    last = max(there, default=1 if follows and folder.parent.name != BELOW else 0)
    return [number for number in range(1, last + 1) if number not in there]


def place_in_chain(folder: Path) -> tuple[list[Stage], int]:
    """The stages of the run that ``folder`` belongs to, and which of them it is."""
    if folder.absolute().parent.name == BELOW:
        root = folder.absolute().parent.parent
        if (root / "run.sqlite").is_file():
            stages = stages_of_run(root)
            for place, stage in enumerate(stages):
                if stage.folder.absolute() == folder.absolute():
                    return stages, place
    stages = stages_of_run(folder)
    return stages, len(stages) - 1


def stage_named(folder: Path, name: str | None) -> tuple[list[Stage], int]:
    """A run's stages, and the place of the one called ``name`` (``NUMBER-NAME``, NUMBER or NAME);
    of the one in ``folder`` itself where it is None. Raises UsageError where there is none.
    """
    if name is None:
        return place_in_chain(folder)
    stages = stages_of_run(folder)
    found = [
        place
        for place, stage in enumerate(stages)
        if stage.name and name in (stage.name, *stage.name.split("-", 1))
    ]
    if len(found) == 1:
        return stages, found[0]
    if len(stages) == 1:
        raise UsageError(f"--stage {name}: the run in {folder} has one stage; leave --stage out")
    there = ", ".join(stage.name for stage in stages)
    raise UsageError(f"--stage {name}: name one of {there}")


@contextmanager
def open_stages(stages: Sequence[Stage]) -> Iterator[list[RunReader]]:
    """The stages' runs, opened so that each row's parent is there while the run goes on: the last
    stage's snapshot is the earliest.
    """
    with ExitStack() as stack:
        runs = [stack.enter_context(RunReader(stage.folder)) for stage in reversed(stages)]
        yield runs[::-1]


def samples_of(run: RunReader) -> int | None:
    """Requests for each input row, of a file or of the stage before; None where the run has none.

    Raises nothing: what a manifest says is what the run was started with.
    """
    free = run.manifest.free
    if free.get("rows") or free.get("rows_identity"):
        return int(run.manifest.fixed.get("samples") or 1)
    return None


class Lineage:
    """What the rows of a stage were made of.

    Holds the place of every accepted row of the stages before: 12 bytes each, and no text.

    Args:
        stages, runs: all up to the one whose rows are asked about.
    """

    def __init__(self, stages: Sequence[Stage], runs: Sequence[RunReader]) -> None:
        self._names = [stage.name for stage in stages]
        self._has_input = samples_of(runs[0]) is not None
        self._samples = [samples_of(run) or 1 for run in runs]
        self._places = [_accepted_places(run) for run in runs[:-1]]
        reduces = [SAMPLE in run.counts().reasons for run in runs]
        several = [
            place
            for place, samples in enumerate(self._samples)
            if samples > 1 and not reduces[place]
        ]
        last = len(runs) - 1
        self.pairs_samples = not several and reduces[last]
        """The stage's own samples are those of an input row, and not the rows they became."""
        self._grouped_at = several[-1] if several else last if self.pairs_samples else None

    def parents(self, request: int) -> list[tuple[str, int, int]]:
        """(stage, request, position) of the row that ``request`` was about, and of those that this
        one was made of in turn; the nearest first. Raises InputError where one is not there.
        """
        found = []
        for place in range(len(self._places), 0, -1):
            request, position = self._parent(place, request)
            found.append((self._names[place - 1], request, position))
        return found

    def root(self, request: int, position: int) -> tuple[int, int]:
        """What a row goes back to: the number of an input row of the first stage and 0, or where
        that has none the row of its own (request, position). Rows in plan order have theirs in
        order.
        """
        for place in range(len(self._places), 0, -1):
            request, position = self._parent(place, request)
        return (request // self._samples[0], 0) if self._has_input else (request, position)

    def group(self, request: int) -> int | None:
        """The rank of the row that ``request`` and others are samples of: in the nearest stage that
        has several for each input row and does not make one row of them. None: no stage has.
        """
        if self._grouped_at is None:
            return None
        for place in range(len(self._places), self._grouped_at, -1):
            request, _ = self._parent(place, request)
        return request // self._samples[self._grouped_at]

    def _parent(self, place: int, request: int) -> tuple[int, int]:
        """(request, position) of the row that a request of the stage at ``place`` was about."""
        rank = request // self._samples[place]
        requests, positions = self._places[place - 1]
        if rank >= len(requests):
            raise InputError(
                f"stage {self._names[place - 1]} has no accepted row {rank}, which a row of stage "
                f"{self._names[place]} was made of; see: woolmill verify"
            )
        return int(requests[rank]), int(positions[rank])


def _accepted_places(run: RunReader) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    requests, positions = array("q"), array("i")
    for request, position in run.accepted_places():
        requests.append(request)
        positions.append(position)
    return np.array(requests, np.int64), np.array(positions, np.int32)


@dataclass(slots=True)
class Stale:
    """Answers of a stage that are about rows which the stage before no longer gives."""

    requests: list[int] = field(default_factory=list)
    """In order."""
    answers: int = 0
    """All that the stage has."""
    spent: Spent = field(default_factory=Spent)

    def cost(self, run: RunReader) -> float | None:
        """What they cost, at the prices of ``run``; None where nothing says."""
        return Prices.of(run.manifest.free).cost_if_known(self.spent)


def stale_answers(
    before: RunReader, run: RunReader, samples: int, *, below: int | None = None
) -> Stale:
    """Which answers of ``run`` are not about the rows that the stage ``before`` gives.

    Args:
        samples: requests for each row.
        below: of the rows of ``before``, only those on requests below this are sure.
    """
    found, carried = Stale(), carried_by(before, run)
    for answer, record in _with_parents(before, run, samples, below):
        found.answers += 1
        if not is_same_row(answer.row, record, carried):
            found.requests.append(answer.index)
            if answer.completion is not None:
                found.spent.add(answer.completion.usage)
    return found


def stale_lines(stages: Sequence[Stage], runs: Sequence[RunReader]) -> Iterator[str]:
    """A line for each stage whose answers are not about the rows that the one before gives."""
    for place in range(1, len(runs)):
        run, before = runs[place], stages[place - 1]
        stale = len(stale_answers(runs[place - 1], run, samples_of(run) or 1).requests)
        if stale:
            yield (
                f"stage {stages[place].name}: {stale:,} of its answers are about rows that stage "
                f"{before.name} no longer gives, as after deciding again; drop them with: "
                f"{remedy(before.folder)}"
            )


def carried_anew(
    before: RunReader, run: RunReader, carry: Collection[str], samples: int
) -> Iterator[Answer]:
    """The answers of ``run`` whose rows have other carried fields in the stage ``before`` now, each
    with its row as it is there. ``carry``: the fields that ``run`` is to carry.
    """
    carried = carried_by(before, run) | frozenset(carry)
    for answer, record in _with_parents(before, run, samples):
        if answer.row != record and is_same_row(answer.row, record, carried):
            yield replace(answer, row=record)


def carried_by(*runs: RunReader) -> frozenset[str]:
    """The fields of the input row that the rows of any of ``runs`` keep."""
    return frozenset(name for run in runs for name in run.manifest.decision.get("carry") or ())


def is_same_row(asked: Record | None, given: Record | None, carried: Collection[str]) -> bool:
    """Whether the row that was asked about is the one that is given now. A field that is carried
    may be missing in one of them: it may have been added since, and nobody was asked about it.
    """
    if asked is None or given is None:
        return asked is given
    return all(
        asked[name] == given[name] if name in asked and name in given else name in carried
        for name in asked.keys() | given.keys()
    )


def _with_parents(
    before: RunReader, run: RunReader, samples: int, below: int | None = None
) -> Iterator[tuple[Answer, Record | None]]:
    """Each answer of ``run`` with the row of ``before`` that has its rank, if there is one."""
    rows = before.decisions(accepted=True)
    number, record = -1, None
    for answer, _ in run.all_answers():
        while number < answer.index // samples:
            decision = next(rows, None)
            if decision is not None and below is not None and decision.index >= below:
                decision, rows = None, iter(())
            number += 1
            record = None if decision is None else decision.record
        yield answer, record


def remedy(folder: Path) -> str:
    """The command that drops the answers which the stage in ``folder`` made stale."""
    root, stage = as_word(root_of(folder)), as_word(folder.name)
    return f"woolmill redecide {root} --stage {stage} --drop-stale"


def parent_of(run: RunReader, rank: int, record: Record | None) -> Decision:
    """The accepted row of this rank, which must be ``record``. Raises ConfigError where it is
    another one (any more).
    """
    decision = run.accepted_at(rank)
    if decision is None or not is_same_row(record, decision.record, carried_by(run)):
        raise ConfigError(
            "what it was made of is no longer there: the stage before was decided again"
        )
    return decision
