"""``woolmill salvage``: whatever is whole in a damaged run, as a run of its own that can go on.

Answers are kept wherever their checksum holds: they were paid for. Decisions follow from the
answers, so they are kept all or, where anything that they rest on is missing, not at all: then they
are taken again, for nothing but time, when the run goes on or by ``woolmill redecide``. A lost
answer is asked for again, and only that costs anything. Times and sessions start anew.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import anyio
import click
import numpy as np

from engine.errors import InputError, OutputError
from engine.kept import copy_recipe
from engine.recipes.seeds import keep, kept_seeds
from engine.stages import Stage, folders_below
from engine.store import Counts, Manifest, RunStore, Vector
from engine.store.database import connect, mend_header, meta, read_manifest, read_run_id
from engine.store.lock import RunLock, read_mark
from engine.store.raw import Row, scan
from engine.store.schema import Checksum, decode_answer, decode_counts, decode_decision
from engine.text import as_word, counted

__all__ = ["Salvaged", "new_run", "salvage", "salvage_run"]

BATCH = 500
SMALLEST_ROW_BYTES = 40
"""Of ``sent``, which has a row for every request of the plan so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvaged:
    """What was found whole."""

    answers: int
    lost_answers: int
    """Asked for again when the run goes on."""
    lost_more: bool = False
    """There may be more lost answers than that, of which nothing is known."""
    decisions: int
    dropped_decisions: int
    """Of the decisions taken, those to be taken again."""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True,
              help="Folder for the new run.")  # fmt: skip
def salvage(folder: Path, output: Path) -> None:
    """Copy what is whole in a damaged run into a new one.

    All its stages come along.

    \b
    woolmill salvage runs/alpaca -o runs/alpaca-salvaged
    """
    new_run(output)
    places = [(stage, output / "stages" / stage.name) for _, stage in folders_below(folder)]
    failed = None
    for stage, place in [*places, (Stage("", folder), output)]:
        try:
            for line in _told(_salvaged(stage.folder, place), place):
                click.echo(f"stage {stage.name}: {line}" if stage.name else line)
        except InputError as error:  # what is whole in the others is saved all the same
            if not places:
                raise
            click.echo(f"stage {stage.name or 'the last'}: {error}", err=True)
            failed = failed or error
    if failed is not None:
        raise failed


def _told(found: Salvaged, output: Path) -> Iterator[str]:
    kept = f"{counted(found.answers, 'answer')} and {counted(found.decisions, 'decision')}"
    yield f"{kept} kept  {output}"
    if found.lost_answers or found.lost_more:
        least = "at least " if found.lost_more else ""
        lost = counted(found.lost_answers, "answer")
        yield f"lost: {least}{lost}, to be asked for again on resume"
    if found.dropped_decisions:
        yield (
            f"to be taken again: {counted(found.dropped_decisions, 'decision')}, on resume or now "
            f"with: woolmill redecide {as_word(output)}"
        )


def new_run(output: Path) -> None:
    """Raises OutputError where the folder of a new run, or a link in its place, exists."""
    if os.path.lexists(output):
        raise OutputError(f"{output}: exists; choose a folder that does not")


def salvage_run(folder: Path, output: Path) -> Salvaged:
    """Copy what is whole in ``folder`` into a new run in ``output``.

    Raises InputError where not even the settings can be read, OutputError where ``output`` exists,
    StoppedError while the run goes on.
    """
    new_run(output)
    return _salvaged(folder, output)


def _salvaged(folder: Path, output: Path) -> Salvaged:
    if not (folder / "run.sqlite").is_file():
        raise InputError(f"{folder}: holds no run (no run.sqlite)")
    with ExitStack() as stack:
        with suppress(OutputError):  # on a read-only disk nobody writes
            stack.callback(RunLock(folder / "run.lock").release)
        try:
            copy = Path(stack.enter_context(_folder_beside(output))) / "run.sqlite"
            for suffix in ("", "-wal"):
                with suppress(FileNotFoundError):
                    shutil.copyfile(f"{folder / 'run.sqlite'}{suffix}", f"{copy}{suffix}")
            mend_header(copy)
        except OSError as exc:
            raise OutputError(f"{output}: cannot be written: {exc.strerror}") from exc
        try:
            with closing(connect(copy, write=True, wreck=True)) as connection:
                return anyio.run(_copy, _Wreck(connection, copy, folder), output)
        except (sqlite3.Error, UnicodeDecodeError) as exc:
            raise InputError(f"{folder}: nothing can be read ({exc})") from exc


def _folder_beside(output: Path) -> tempfile.TemporaryDirectory[str]:
    """For a copy of the database: reading a log folds it in, and a damaged header is mended."""
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=parent, prefix=".salvage-")


async def _copy(wreck: _Wreck, output: Path) -> Salvaged:
    answered = {row.key[0] for row in wreck.rows("answer")}
    decided = [row.key for row in wreck.rows("decision")]
    complete = (
        wreck.counts is not None
        and len(decided) == wreck.counts.decided
        and (not decided or answered.issuperset(range(decided[-1][0] + 1)))
    )
    store = RunStore.open(output, wreck.manifest)
    keep(kept_seeds(wreck.folder, wreck.manifest.fixed.get("seeds")), output)
    copy_recipe(wreck.folder, wreck.manifest, output)
    if wreck.counts is not None:
        store.lost(wreck.counts.lost_tokens)
    try:
        for rows in _batches(wreck.rows("sent")):
            await store.sent_earlier([(row.key[0], row.body) for row in rows])
        for rows in _batches(wreck.rows("answer")):
            await store.answered([decode_answer(row.body) for row in rows])
        for rows in _batches(wreck.rows("embedding")):
            embeddings = [(row.key[0], row.body) for row in rows]
            await store.decided_rows(store.rows_of((), (), embeddings))
        if complete:
            vectors = wreck.rows("vector")
            waiting = next(vectors, None)
            for rows in _batches(wreck.rows("decision")):
                beside: list[Vector | None] = []
                for row in rows:
                    while waiting is not None and waiting.key < row.key:
                        waiting = next(vectors, None)
                    mine = waiting if waiting is not None and waiting.key == row.key else None
                    beside.append(None if mine is None else np.frombuffer(mine.body, "<f4"))
                await store.decided([decode_decision(row.body) for row in rows], beside)
    finally:
        await store.aclose()
    taken = len(decided) if wreck.counts is None else wreck.counts.decided
    were = max(answered, default=-1) + 1 if wreck.counts is None else wreck.counts.answered
    return Salvaged(
        answers=len(answered),
        lost_answers=max(were - len(answered), 0),
        lost_more=not wreck.counts_are_last,
        decisions=len(decided) if complete else 0,
        dropped_decisions=0 if complete else taken,
    )


class _Wreck:
    """A damaged database, of which as much as possible is read."""

    def __init__(self, connection: sqlite3.Connection, copy: Path, folder: Path) -> None:
        self._connection = connection
        self.folder = folder
        self._end = 1000 + copy.stat().st_size // SMALLEST_ROW_BYTES
        path = folder / "run.sqlite"
        mark = read_mark(folder / "run.lock")
        try:
            run_id = read_run_id(connection, path)
        except (sqlite3.Error, UnicodeDecodeError, InputError):
            if mark is None:
                raise
            run_id = mark[0]
        self._checksum = Checksum(run_id)
        self.manifest: Manifest = read_manifest(connection, self._checksum, path)
        self.counts: Counts | None = None
        with suppress(sqlite3.Error, UnicodeDecodeError, InputError):
            self.counts = decode_counts(meta(connection, self._checksum, "counts", path))
        commits = -1 if self.counts is None else self.counts.commits
        self.counts_are_last = commits >= (mark[1] if mark is not None else 0)
        """No commit came after them that the file has lost."""

    def rows(self, table: str) -> Iterator[Row]:
        """The rows of ``table`` whose checksum holds, in order, around what cannot be read."""
        for first in range(0, self._end, BATCH):
            yield from self._between(table, first, first + BATCH)

    def _between(self, table: str, first: int, end: int) -> Iterator[Row]:
        try:
            rows = list(scan(self._connection, self._checksum, table, first, end))
        except (sqlite3.DatabaseError, UnicodeDecodeError):
            if end - first > 1:
                middle = (first + end) // 2
                yield from self._between(table, first, middle)
                yield from self._between(table, middle, end)
            return
        yield from (row for row in rows if row.intact)


def _batches(rows: Iterator[Row]) -> Iterator[Sequence[Row]]:
    while batch := list(islice(rows, BATCH)):
        yield batch
