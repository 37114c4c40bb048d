"""Deciding a stage on trial: what would change, and which answers of later stages would be stale.

The stage's store is copied and decided there; the run itself is only read. An answer of a later
stage is stale where the row that it is about is no longer the one of its rank. What follows a stale
answer in its own stage is undecided until it is asked anew, so that the stage behind that one is
sure of the rows before it alone.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.errors import OutputError
from engine.stages import Stage, Stale, samples_of, stale_answers
from engine.store import RunReader, RunStore
from engine.store.database import connect, disk_errors
from engine.upkeep.changes import Accepted, Changes

__all__ = ["Behind", "Trial", "copied", "drop_stale", "stale_behind", "trial_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """A later stage, and which of its answers are stale."""

    stage: Stage
    stale: Stale
    cost: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What deciding again comes to."""

    accepted: int
    accepted_before: int
    reasons: Mapping[str, int]
    reasons_before: Mapping[str, int]
    changes: Changes
    behind: Sequence[Behind]

    @property
    def stale(self) -> int:
        """Stale answers of all later stages."""
        return sum(len(each.stale.requests) for each in self.behind)


async def trial_of(
    folder: Path, behind: Sequence[Stage], decide: Callable[[Path], Awaitable[object]]
) -> Trial:
    """Decide a copy of the run in ``folder`` with ``decide``, and compare. Raises WoolmillError."""
    with copied(folder) as copy:
        await decide(copy)
        with RunReader(folder) as was, RunReader(copy) as now:
            before, after = was.counts(), now.counts()
            return Trial(
                accepted=after.accepted,
                accepted_before=before.accepted,
                reasons=after.reasons,
                reasons_before=before.reasons,
                changes=Accepted(was).compared_with(now),
                behind=stale_behind(now, behind),
            )


@contextmanager
def copied(folder: Path) -> Iterator[Path]:
    """The run's database alone, in a folder beside it for as long as it is needed."""
    path = folder / "run.sqlite"
    try:
        made = tempfile.TemporaryDirectory(dir=folder, prefix=".trial-")
    except OSError as exc:
        raise OutputError(f"{folder}: cannot be written: {exc.strerror}") from exc
    with made as name:
        copy = Path(name) / "run.sqlite"
        with (
            disk_errors(path),
            closing(connect(path, write=False)) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
        yield Path(name)


def stale_behind(run: RunReader, behind: Sequence[Stage]) -> list[Behind]:
    """Which answers of the stages ``behind`` that of ``run`` are stale, by its decisions."""
    with ExitStack() as stack:
        runs = [stack.enter_context(RunReader(stage.folder)) for stage in behind]
        return _stale(run, behind, runs)


def _stale(before: RunReader, behind: Sequence[Stage], runs: Sequence[RunReader]) -> list[Behind]:
    found: list[Behind] = []
    below: int | None = None
    for stage, run in zip(behind, runs, strict=True):
        samples = samples_of(run) or 1
        stale = stale_answers(before, run, samples, below=below)
        found.append(Behind(stage=stage, stale=stale, cost=stale.cost(run)))
        below = stale.requests[0] - stale.requests[0] % samples if stale.requests else None
        before = run
    return found


def drop_stale(folder: Path, behind: Sequence[Stage]) -> int:
    """Drop the answers of the stages ``behind`` the one in ``folder`` that are stale, those of a
    stage in one transaction; how many they were. Raises what ``RunStore.open`` raises.

    The last stage's go first: were it cut short, the stages before would still have theirs, and
    the same command drops the rest.
    """
    with ExitStack() as stack:
        stores = []
        for place in (folder, *(stage.folder for stage in behind)):
            with RunReader(place) as run:
                manifest = run.manifest
            stores.append(RunStore.open(place, manifest))
            stack.callback(stores[-1].close)
        found = _stale(stores[0], behind, stores[1:])
        for each, store in reversed(list(zip(found, stores[1:], strict=True))):
            store.drop_answers(each.stale.requests, group=samples_of(store) or 1)
    return sum(len(each.stale.requests) for each in found)
