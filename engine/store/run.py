"""RunStore: one run's database, the only source of truth about what was asked, answered, decided.

A result is *acknowledged* when its transaction has been committed and synced; nothing is shown,
counted or exported before. Requests are recorded before they are sent, so that after a crash those
that may have been billed without an answer are known by key.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from engine.errors import ConfigError, InputError, OutputError, StoppedError
from engine.failpoints import failpoint
from engine.records import Answer, Decision, Prompt
from engine.store.batches import BatchRow
from engine.store.database import (
    check_header,
    connect,
    disk_errors,
    meta,
    put_meta,
    read_run_id,
    sync_folder,
)
from engine.store.inserts import Inserts
from engine.store.lock import RunLock
from engine.store.manifest import Manifest
from engine.store.reader import RunReader
from engine.store.schema import (
    APPLICATION_ID,
    EMBEDDINGS,
    FORMAT,
    PAGE_SIZE,
    SCHEMA,
    Checksum,
    Counts,
    DecisionRows,
    Vector,
    decode_counts,
    encode,
)
from engine.store.space import Reserve, unsafe_filesystem
from engine.store.writer import Work, Writer

__all__ = ["SNAPSHOT", "RunStore"]

log = logging.getLogger(__name__)

SNAPSHOT = "run.index"
"""In the run's folder: the index of near-duplicates as it was after some decision, so that it need
not be made anew from all rows. ``engine.decide.snapshot`` writes and reads it; a run is whole
without it.
"""


class RunStore(RunReader):
    """A run store opened for writing (``open``) by the only process that may."""

    session: int
    """Counts the processes that wrote to this run, from 1."""
    _lock: RunLock
    _reserve: Reserve
    _writing: sqlite3.Connection
    _inserts: Inserts
    _writer: Writer | None = None

    @classmethod
    def open(cls, folder: Path, manifest: Manifest) -> Self:
        """Create the run in ``folder``, or go on with it.

        Raises StoppedError (in use; no room on the disk), ConfigError (a setting that may not
        change differs; a store of a later format), InputError (foreign or damaged), OutputError
        (the folder cannot be written), DiskError.
        """
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_folder(folder.parent)
        except OSError as exc:
            raise OutputError(f"{folder}: cannot be created: {exc.strerror}") from exc
        if warning := unsafe_filesystem(folder):
            log.warning("%s", warning)
        path = folder / "run.sqlite"
        with ExitStack() as undo, disk_errors(path):
            lock = RunLock(folder / "run.lock")
            undo.callback(lock.release)
            reserve = Reserve(folder)
            undo.callback(reserve.release)
            connection = _create_or_open(path, manifest, lock)
            undo.callback(connection.close)
            store = cls(folder, snapshot=False)
            undo.callback(store._connection.close)
            store._lock, store._reserve, store._writing = lock, reserve, connection
            store._begin_session(manifest)
            undo.pop_all()
        return store

    @classmethod
    def read(cls, folder: Path) -> RunReader:
        """The run as it is now, read-only, also while another process writes to it."""
        return RunReader(folder)

    def _begin_session(self, manifest: Manifest) -> None:
        """Check the settings, record this process, and the free settings of now for the old."""
        if differences := self.manifest.differences(manifest):
            raise ConfigError(
                f"{self.folder}: the run was started with other settings ({'; '.join(differences)})"
                "; resume with those, or start a new run"
            )
        sessions = self.sessions()
        self.session = sessions[-1].number + 1 if sessions else 1
        self._session: dict[str, Any] = {
            "pid": os.getpid(),
            "engine_version": manifest.engine_version,
            "started_s": time.time(),
            "ended_s": None,
            "dropped": 0,
        }
        manifest = replace(manifest, learnt=self.manifest.learnt)
        self._writing.execute("BEGIN IMMEDIATE")
        self._writing.execute(f"PRAGMA user_version = {FORMAT}")
        self._writing.execute(EMBEDDINGS)
        self._put_session()
        put_meta(self._writing, self._checksum, "free", dict(manifest.free))
        self._writing.execute("COMMIT")
        self.manifest = manifest
        self._start_inserts()

    def _start_inserts(self) -> None:
        self._inserts = Inserts(
            self._writing,
            path=self.path,
            checksum=self._checksum,
            session=self.session,
            lock=self._lock,
            reserve=self._reserve,
            committed=self._committed,
        )

    def _put_session(self) -> None:
        body = encode(self._session)
        self._writing.execute(
            "INSERT OR REPLACE INTO session VALUES (?, CAST(? AS TEXT), ?)",
            (self.session, body, self._checksum("session", b"%d" % self.session, body)),
        )

    def _committed(self) -> tuple[Counts, set[int]]:
        resume = self.resume()
        return resume.counts, set(resume.answered_beyond)

    def _write(self, work: Work) -> asyncio.Future[None]:
        if self._writer is None:  # not in open, which has no event loop
            self._writer = Writer(self._inserts.commit)
        return self._writer.write(work)

    @property
    def waiting(self) -> int:
        """Calls that wait for their commit now."""
        return self._writer.callers if self._writer is not None else 0

    def sent(
        self, prompts: Sequence[Prompt], model: str, *, reserved: int = 0
    ) -> asyncio.Future[None]:
        """Record that ``prompts`` are about to be sent to ``model``. Durable when done.

        ``reserved``: the most tokens that may be billed for them; booked as lost until they are
        ``answered``, or are no longer under way (``lost``).
        StoppedError where the disk is nearly full, so that what was sent before still finds room.
        """
        work = Work(prompts=prompts, model=model, lost_tokens=reserved)
        if self._inserts.shortage is None:
            return self._write(work)
        work.done.set_exception(self._inserts.shortage)
        return work.done

    def sent_earlier(self, requests: Sequence[tuple[int, bytes]]) -> asyncio.Future[None]:
        """Record requests of another store as sent, by index and key. Durable when done."""
        return self._write(Work(sent=requests))

    def dropped(self, requests: int) -> None:
        """Note that so many requests were on the wire and are not waited for; kept by ``close``."""
        self._session["dropped"] += requests

    def answered(self, answers: Sequence[Answer], *, reserved: int = 0) -> asyncio.Future[None]:
        """Keep ``answers``. Durable when done. A second one to a request only counts as waste.

        ``reserved``: of what ``sent`` booked for them, which is over.
        """
        failpoint("answer.arrived")
        return self._write(Work(answers=answers, lost_tokens=-reserved))

    def lost(self, tokens: int) -> None:
        """Book what an attempt without an answer may have cost; below 0, what ``sent`` booked for
        requests that are no longer under way. Nobody waits for it.
        """
        if tokens:
            self._write(Work(lost_tokens=tokens)).add_done_callback(_let_go)

    def decided(
        self, decisions: Sequence[Decision], vectors: Sequence[Vector | None] = ()
    ) -> asyncio.Future[None]:
        """Keep ``decisions``, which go on in plan order, with ``vectors`` beside them if there are
        any. Durable when done.
        """
        return self.decided_rows(self.rows_of(decisions, vectors))

    def decided_rows(self, rows: DecisionRows) -> asyncio.Future[None]:
        """``decided`` for what ``rows_of`` made, here or in another process."""
        failpoint("decision.made")
        return self._write(Work(decided=rows))

    def learnt(self, learnt: Mapping[str, Any]) -> asyncio.Future[None]:
        """Keep what was learnt about the endpoints, by their names. Durable when done."""
        self.manifest = replace(self.manifest, learnt=dict(learnt))
        return self._write(Work(meta={"learnt": dict(learnt)}))

    def keep_limits(self, changes: Sequence[Mapping[str, Any]]) -> asyncio.Future[None]:
        """Keep ``changes`` of limits, in the place of those kept so far. Durable when done."""
        return self._write(Work(meta={"limits": changes}))

    def keep_size(self, requests: int) -> asyncio.Future[None]:
        """Keep how many requests the whole input is. Durable when done."""
        return self._write(Work(meta={"requests": requests}))

    def batch(self, row: BatchRow) -> asyncio.Future[None]:
        """Keep a batch as it is now. Durable when done."""
        return self._write(Work(meta={f"batch.{row.tag}": row}))

    def forget_decisions(self, decision: Mapping[str, Any], answers: Iterable[Answer] = ()) -> None:
        """Drop all decisions in one transaction; from now on they follow from ``decision``, and
        ``answers`` take the place of those that are there to the same requests.

        Before anything is written in this session.
        """
        self._forget_index()
        counts = self.counts()
        counts.decided = counts.accepted = counts.vectors = 0
        counts.reasons, counts.last_decided = {}, None
        counts.commits += 1
        with disk_errors(self.path):
            self._writing.execute("BEGIN IMMEDIATE")
            self._writing.execute("DELETE FROM decision")
            self._writing.execute("DELETE FROM vector")
            for answer in answers:
                self._replace(answer)
            put_meta(self._writing, self._checksum, "decision", dict(decision))
            put_meta(self._writing, self._checksum, "counts", counts)
            self._writing.execute("COMMIT")
            self._lock.set_mark(counts.commits)
        self.manifest = replace(self.manifest, decision=decision)
        self._start_inserts()

    def _replace(self, answer: Answer) -> None:
        """Put ``answer`` in the place of the one to its request, whose time it keeps."""
        index, body = answer.index, encode(answer)
        execute = self._writing.execute
        (at,) = execute("SELECT at FROM answer WHERE request = ?", (index,)).fetchone()
        execute(
            "UPDATE answer SET body = CAST(? AS TEXT), sum = ? WHERE request = ?",
            (body, self._checksum("answer", b"%d %d" % (index, at), body), index),
        )

    def drop_answers(
        self, requests: Sequence[int], *, group: int = 1, reseed: bool = False
    ) -> None:
        """Drop the answers to ``requests`` (in order) in one transaction, to be asked anew, with
        all decisions from the first of them on, which are taken again when they are there.

        Those that were no failures count as wasted, with what they cost. Requests are decided in
        groups of ``group``. ``reseed``: what is sent from now on has other seeds, since a server
        that obeys them says the same again to the same prompt. Before anything is written in this
        session.
        """
        if not requests:
            return
        self._forget_index()
        gone, first = frozenset(requests), requests[0] - requests[0] % group
        was, counts = self.counts(), Counts()
        counts.wasted, counts.lost_tokens = was.wasted, was.lost_tokens
        for answer, _ in self.all_answers():
            if answer.index not in gone:
                counts.add_answer(answer)
            elif answer.completion is not None:
                counts.waste(answer)
        for decision in self.decisions():
            if decision.index >= first:
                break
            counts.add_decision((decision.index, decision.position), decision.reason)
        counts.commits, counts.reseeds = was.commits + 1, was.reseeds + reseed
        counts.embeddings = was.embeddings
        counts.first_at_s, counts.last_at_s = was.first_at_s, was.last_at_s
        counts.answered_below = min(was.answered_below, requests[0])
        execute = self._writing.execute
        with disk_errors(self.path):
            execute("BEGIN IMMEDIATE")
            for table in ("answer", "sent"):
                self._writing.executemany(
                    f"DELETE FROM {table} WHERE request = ?", ((request,) for request in requests)
                )
            for table in ("decision", "vector"):
                execute(f"DELETE FROM {table} WHERE request >= ?", (first,))
            counts.sent = execute("SELECT count(*) FROM sent").fetchone()[0]
            counts.vectors = execute("SELECT count(*) FROM vector").fetchone()[0]
            put_meta(self._writing, self._checksum, "counts", counts)
            execute("COMMIT")
            self._lock.set_mark(counts.commits)
        self._start_inserts()

    def _forget_index(self) -> None:
        """Remove the snapshot of an index of decisions that are about to go."""
        with disk_errors(self.path):
            for name in SNAPSHOT, f"{SNAPSHOT}.new":
                (self.folder / name).unlink(missing_ok=True)

    async def aclose(self) -> None:
        """Commit what waits, fold the log into the database, let go of the run.

        Never raises for the disk: what could not be written was reported to those who wrote it.
        """
        if self._writer is not None:
            await self._writer.aclose()
        failpoint("store.close")
        self.close()

    def close(self) -> None:
        """As ``aclose``, where nothing was written."""
        super().close()
        self._session["ended_s"] = time.time()
        with suppress(sqlite3.Error):  # then the session reads as killed
            if self._writing.in_transaction:
                self._writing.execute("ROLLBACK")
            self._writing.execute("BEGIN IMMEDIATE")
            self._put_session()
            self._writing.execute("COMMIT")
        with suppress(sqlite3.Error):
            self._writing.close()
        self._reserve.release()
        self._lock.release()


def _let_go(written: asyncio.Future[None]) -> None:
    """A disk that fails is told to those who wait for it."""
    if not written.cancelled():
        written.exception()


def _create_or_open(path: Path, manifest: Manifest, lock: RunLock) -> sqlite3.Connection:
    if path.is_symlink():
        raise InputError(f"{path}: is a symbolic link; a run store is a plain file")
    connection = connect(path, write=True)
    try:
        if lock.mark is None and _is_empty(connection):
            _create(connection, path, manifest)
        check_header(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        run_id = read_run_id(connection, path)
        checksum = Checksum(run_id)
        counts = decode_counts(meta(connection, checksum, "counts", path))
        lock.check(run_id, counts.commits)
        _fold_log(connection, path)
        failpoint("store.recovered")
    except BaseException:  # raised again, with nothing left open
        connection.close()
        raise
    return connection


def _is_empty(connection: sqlite3.Connection) -> bool:
    """A database that was never filled: new, or left by a crash before its first commit."""
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    application_id = connection.execute("PRAGMA application_id").fetchone()[0]
    return bool(tables == 0 and application_id == 0)


def _create(connection: sqlite3.Connection, path: Path, manifest: Manifest) -> None:
    failpoint("store.create")
    os.chmod(path, 0o600)
    run_id = uuid.uuid4().hex
    checksum = Checksum(run_id)
    connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {FORMAT}")
    for statement in SCHEMA.split(";"):
        connection.execute(statement)
    run = {"run_id": run_id, "created_s": time.time(), "engine_version": manifest.engine_version}
    put_meta(connection, checksum, "run", run)
    put_meta(connection, checksum, "fixed", dict(manifest.fixed))
    put_meta(connection, checksum, "decision", dict(manifest.decision))
    put_meta(connection, checksum, "free", dict(manifest.free))
    put_meta(connection, checksum, "counts", Counts())
    connection.execute("COMMIT")
    sync_folder(path.parent)
    failpoint("store.created")


def _fold_log(connection: sqlite3.Connection, path: Path) -> None:
    """Write what an earlier process left in the log into the database, and sync it there.

    A sync that failed back then may have left pages that are in memory and not on the disk, and no
    later sync would write them. Raises StoppedError while someone reads a state of before.
    """
    busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    if busy:
        raise StoppedError(f"{path}: another process reads the run; end it, then resume")
