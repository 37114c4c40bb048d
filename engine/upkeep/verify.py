"""``woolmill verify``: is every row, checksum, count and derived file of a run as it should be?"""

from __future__ import annotations

import hashlib
import math
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import click

from engine.errors import InputError, WoolmillError
from engine.export import Format, dataset_of, is_earlier
from engine.export.formats import WITH_PROVENANCE, writer
from engine.export.layout import Layout, layout_of
from engine.export.ledger import CHANGED, exported, touched
from engine.export.rows import rows
from engine.stages import (
    Stage,
    holds_run,
    missing_stages,
    open_stages,
    stages_of_run,
    stale_lines,
)
from engine.store import Counts, RunReader
from engine.store.database import check_header, connect, disk_errors, read_run_id
from engine.store.lock import read_mark
from engine.store.raw import TABLES, Row, scan
from engine.store.schema import Checksum, decode_answer, decode_counts, decode_decision
from engine.text import as_word

__all__ = ["damages", "problems", "verify"]

TIMES = ("first_at_s", "last_at_s")
"""Not checked: a clock may be set back while a run goes on."""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def verify(folder: Path) -> None:
    """Check a run: every row, checksum, count and derived file.

    \b
    woolmill verify runs/alpaca        exit 0: all is as it should be; 65: what is not is named

    A run of several stages is checked with all of them.
    """
    if not holds_run(folder):
        raise InputError(f"{folder}: holds no run (no run.sqlite), and so nothing to salvage")
    found = 0
    stages = [Stage("", folder)]
    with suppress(InputError):  # where the run itself is damaged, that is said first
        stages = stages_of_run(folder)
    for stage in reversed(stages):
        for problem in damages(stage.folder):
            found += 1
            click.echo(_of(stage, problem))
    if not found:
        for number in missing_stages(folder):
            found += 1
            click.echo(f"{folder / 'stages'}: stage {number} is missing")
    if found:
        raise InputError(
            f"{folder}: {_count(found)}; save what is whole with: "
            f"woolmill salvage {as_word(folder)} -o {as_word(f'{folder}-salvaged')}"
        )
    for stage in stages:
        for finding in _exports(stage.folder):
            found += finding.is_problem
            click.echo(_of(stage, finding.line))
    if found:
        raise InputError(
            f"{folder}: {_count(found)} with exports; the store itself is sound, and they can be "
            "written again"
        )
    for line in _stale(stages):
        click.echo(line)
    for stage in stages:
        with RunReader(stage.folder) as run:
            counts = run.counts()
        told = (
            f"{stage.folder}: sound ({counts.answered} answers, {counts.decided} decisions, "
            f"{counts.accepted} accepted, {counts.commits} commits)"
        )
        click.echo(_of(stage, told))


def _of(stage: Stage, line: str) -> str:
    """A line with its stage, of a run that has several."""
    return f"stage {stage.name}: {line}" if stage.name else line


def _stale(stages: Sequence[Stage]) -> Iterator[str]:
    """What a person should know before the run goes on; no store is less sound for it."""
    with open_stages(stages) as runs:
        yield from stale_lines(stages, runs)


def _count(problems: int) -> str:
    return "1 problem" if problems == 1 else f"{problems} problems"


def problems(folder: Path) -> Iterator[str]:
    """One line for each thing that is not as it should be. Raises nothing for a damaged store."""
    damage = None
    for damage in damages(folder):
        yield damage
    if damage is None:
        yield from (finding.line for finding in _exports(folder) if finding.is_problem)


def damages(folder: Path) -> Iterator[str]:
    """One line for each fault of the store itself. Raises nothing for a damaged store."""
    path = folder / "run.sqlite"
    if not path.is_file():
        yield f"{path}: is missing"
        return
    try:
        with disk_errors(path), closing(connect(path, write=False)) as connection:
            connection.execute("BEGIN")
            check_header(connection, path)
            yield from (f"{path}: {line}" for line in _damaged_pages(connection))
            checksum = Checksum(read_run_id(connection, path))
            walk = _Walk(connection, checksum, path)
            yield from walk.rows()
            yield from walk.totals(folder)
        with RunReader(folder) as run:
            run.resume()  # refuses what a run would not go on from
            run.sessions()
    except WoolmillError as exc:
        yield str(exc)


def _damaged_pages(connection: sqlite3.Connection) -> Iterator[str]:
    """What SQLite itself finds wrong with its pages and indexes."""
    for (line,) in connection.execute("PRAGMA integrity_check(20)"):
        if line != b"ok":
            yield line.decode("utf-8", "replace").replace("\n", "; ")


class _Walk:
    """One walk over all rows, that counts them anew."""

    def __init__(self, connection: sqlite3.Connection, checksum: Checksum, path: Path) -> None:
        self._connection = connection
        self._checksum = checksum
        self._path = path
        self._counts = Counts()
        self._stored: Counts | None = None
        self._answered: set[int] = set()
        self._accepted: set[tuple[int, int]] = set()

    def rows(self) -> Iterator[str]:
        """Problems of single rows."""
        for table in TABLES:
            try:
                for row in scan(self._connection, self._checksum, table):
                    problem = self._problem(table, row) if row.intact else "fails its checksum"
                    if problem:
                        yield f"{self._path}: table {table}, row {_shown(row.key)}: {problem}"
            except (sqlite3.DatabaseError, UnicodeDecodeError) as exc:
                yield f"{self._path}: table {table}: {exc}"

    def _problem(self, table: str, row: Row) -> str | None:
        counts = self._counts
        if table == "meta" and row.key == (b"counts",):
            self._stored = decode_counts(row.body)
        elif table == "sent":
            counts.sent += 1
        elif table == "answer":
            answer = decode_answer(row.body)
            counts.add_answer(answer)
            self._answered.add(answer.index)
            if answer.index != row.key[0]:
                return f"holds the answer to request {answer.index}"
        elif table == "decision":
            decision = decode_decision(row.body)
            counts.add_decision((decision.index, decision.position), decision.reason)
            if decision.accepted:
                self._accepted.add((decision.index, decision.position))
            if (decision.index, decision.position) != row.key:
                return f"holds the decision on {decision.index}.{decision.position}"
            if decision.reason != (None if row.reason is None else row.reason.decode()):
                return f"its reason is {decision.reason}, its column says {row.reason!r}"
            if decision.index not in self._answered:
                return "decides a request that has no answer"
        elif table == "vector":
            counts.vectors += 1
            if row.key not in self._accepted:
                return "belongs to no accepted record"
        elif table == "embedding":
            counts.embeddings += 1
        return None

    def totals(self, folder: Path) -> Iterator[str]:
        """Where the counts kept with the rows differ from the rows, or the mark from the counts."""
        stored, counted = self._stored, self._counts
        if stored is None:
            yield f"{self._path}: table meta has no counts"
            return
        while counted.answered_below in self._answered:
            counted.answered_below += 1
        # Kept nowhere else: how often was committed and reseeded, what came too late to be kept,
        # and what may have been billed without an answer.
        counted.commits, counted.reseeds = stored.commits, stored.reseeds
        counted.wasted = stored.wasted
        counted.lost_tokens = stored.lost_tokens
        for name in (field.name for field in fields(Counts) if field.name not in TIMES):
            was, now = getattr(stored, name), getattr(counted, name)
            # A sum beyond 64 bits, as of tokens that a server makes up, is kept as a float.
            if was != now and not (isinstance(was, float) and math.isclose(was, now)):
                yield f"{self._path}: the count {name} says {was}, the rows say {now}"
        mark = read_mark(folder / "run.lock")
        if mark is not None and mark[1] > stored.commits:
            yield f"{self._path}: holds {stored.commits} of {mark[1]} acknowledged commits"


class _Finding(NamedTuple):
    """Something to say about an export."""

    line: str
    is_problem: bool


def _exports(folder: Path) -> Iterator[_Finding]:
    """The dataset in the folder against the one that the store gives; other exports by hash.

    An export that is older than the store, as while the run goes on, is as it should be.
    """
    with RunReader(folder) as run:
        format, name = dataset_of(run.manifest)
    dataset = folder / name
    if dataset.is_file():
        yield from _dataset(folder, dataset, format)
    for path in exported(folder):
        if path != dataset.absolute() and touched(folder, path) == CHANGED:
            yield _Finding(f"{path}: {CHANGED}", is_problem=True)


def _dataset(folder: Path, dataset: Path, format: Format) -> Iterator[_Finding]:
    again = f"woolmill export {as_word(folder)} -o {as_word(dataset)}"
    try:
        with RunReader(folder) as run:
            count = run.counts().accepted
            layout = layout_of(run)
            options = (False, True) if format == "alpaca" else (False,)
            layouts = [replace(layout, similarity=option) for option in options]
            if _digest(dataset) in {_exported(run, format, layout) for layout in layouts}:
                return
            older = touched(folder, dataset) is None or is_earlier(run, dataset, format)
    except (WoolmillError, OSError) as exc:
        yield _Finding(str(exc), is_problem=True)
        return
    if older:
        yield _Finding(
            f"{dataset}: is older than the store, which holds {count} accepted records; renew it "
            f"with: {again}",
            is_problem=False,
        )
    else:
        yield _Finding(
            f"{dataset}: is not what the {count} accepted records give; write it again with: "
            f"{again} --overwrite",
            is_problem=True,
        )


def _exported(run: RunReader, format: Format, layout: Layout) -> bytes:
    """The digest of the dataset as it is exported now."""
    with tempfile.TemporaryFile() as file:
        with writer(format, file, layout) as write:
            for row in rows(run, provenance=format in WITH_PROVENANCE):
                write(row)
        file.seek(0)
        return hashlib.file_digest(file, "sha256").digest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _shown(key: tuple[object, ...]) -> str:
    return ".".join(_part(part) for part in key)


def _part(part: object) -> str:
    if not isinstance(part, bytes):
        return str(part)
    return part.decode() if part.isascii() and part.decode().isprintable() else part.hex()
