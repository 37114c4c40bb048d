"""RunStore: one run's database, the only source of truth about what was asked, answered and
decided.

A result is *acknowledged* when its transaction has been committed and synced; nothing is shown,
counted or exported before. Requests are recorded before they are sent, so that after a crash those
that may have been billed without an answer are known by key.
"""

from __future__ import annotations

import os
import sqlite3
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from engine.errors import ConfigError, InputError, OutputError
from engine.failpoints import failpoint
from engine.records import Answer, Decision, Prompt
from engine.store.database import (
    check_header,
    connect,
    disk_errors,
    meta,
    read_manifest,
    read_run_id,
    sync_folder,
)
from engine.store.lock import RunLock
from engine.store.manifest import Manifest
from engine.store.reader import RunReader
from engine.store.rows import (
    APPLICATION_ID,
    FORMAT,
    SCHEMA,
    Checksum,
    Counts,
    Vector,
    decode_counts,
    encode,
)
from engine.store.writer import Work, Writer

__all__ = ["RunStore"]


class RunStore(RunReader):
    """A run store opened for writing (``open``) by the only process that may."""

    _lock: RunLock
    _writing: sqlite3.Connection
    _writer: Writer | None
    session: int
    """Counts the processes that wrote to this run, from 1."""

    @classmethod
    def open(cls, folder: Path, manifest: Manifest) -> Self:
        """Create the run in ``folder``, or go on with it.

        Raises StoppedError (in use), ConfigError (a setting that may not change differs, or the
        store is of a later format), InputError (foreign or damaged), OutputError (the folder cannot
        be written), DiskError.
        """
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_folder(folder.parent)
        except OSError as exc:
            raise OutputError(f"{folder}: cannot be created: {exc.strerror}") from exc
        lock = RunLock(folder / "run.lock")
        try:
            path = folder / "run.sqlite"
            with disk_errors(path):
                connection = _create_or_open(path, manifest, lock)
                try:
                    store = cls(folder, snapshot=False)
                    store._lock, store._writing = lock, connection
                    store._begin_session(manifest)
                except BaseException:
                    connection.close()
                    raise
        except BaseException:
            lock.release()
            raise
        return store

    @classmethod
    def read(cls, folder: Path) -> RunReader:
        """The run as it is now, read-only, also while another process writes to it."""
        return RunReader(folder)

    def _begin_session(self, manifest: Manifest) -> None:
        """Check the settings, record this process, put the free settings of now in the place of the
        old.
        """
        differences = self.manifest.differences(manifest)
        if differences:
            raise ConfigError(
                f"{self.folder}: the run was started with other settings ("
                + "; ".join(differences)
                + "); resume with those, or start a new run"
            )
        sessions = self.sessions()
        self.session = sessions[-1].number + 1 if sessions else 1
        self._started_s = time.time()
        self._engine_version = manifest.engine_version
        self._writing.execute("BEGIN IMMEDIATE")
        self._put_session(ended_s=None)
        _put_meta(self._writing, self._checksum, "free", dict(manifest.free))
        self._writing.execute("COMMIT")
        self.manifest = Manifest(
            fixed=self.manifest.fixed,
            decision=self.manifest.decision,
            free=manifest.free,
            engine_version=manifest.engine_version,
        )
        self._writer = None

    def _put_session(self, *, ended_s: float | None) -> None:
        body = encode(
            {
                "pid": os.getpid(),
                "engine_version": self._engine_version,
                "started_s": self._started_s,
                "ended_s": ended_s,
            }
        )
        self._writing.execute(
            "INSERT OR REPLACE INTO session VALUES (?, CAST(? AS TEXT), ?)",
            (self.session, body, self._checksum("session", b"%d" % self.session, body)),
        )

    def _write(self) -> Writer:
        """The writer, started with the first write, because it needs the running loop."""
        if self._writer is None:
            resume = self.resume()
            self._writer = Writer(
                self._writing,
                path=self.path,
                checksum=self._checksum,
                run_id=self.run_id,
                session=self.session,
                counts=resume.counts,
                beyond=set(resume.answered_beyond),
                lock=self._lock,
            )
        return self._writer

    async def sent(self, prompts: Sequence[Prompt], keys: Sequence[str]) -> None:
        """Record that ``prompts`` are about to be sent; ``keys`` are theirs. Durable on return."""
        pairs = [(prompt.index, key) for prompt, key in zip(prompts, keys, strict=True)]
        await self._write().write(Work(size=100 * len(pairs), sent=pairs))

    async def answered(self, answers: Sequence[Answer]) -> None:
        """Keep ``answers``. Durable on return. A second answer to a request is counted as waste
        only.
        """
        size = sum(500 + (len(a.completion.text) if a.completion else 0) for a in answers)
        await self._write().write(Work(size=size, answers=answers))

    async def decided(
        self, decisions: Sequence[Decision], vectors: Sequence[Vector | None] = ()
    ) -> None:
        """Keep ``decisions``, which go on in plan order, with ``vectors`` beside them (empty: none
        has one).

        Durable on return.
        """
        if vectors and len(vectors) != len(decisions):
            raise ValueError(f"{len(vectors)} vectors for {len(decisions)} decisions")
        size = sum(1000 + (len(d.record.output) if d.record else 0) for d in decisions)
        size += sum(v.nbytes for v in vectors if v is not None)
        await self._write().write(Work(size=size, decisions=decisions, vectors=vectors))

    async def aclose(self) -> None:
        """Commit what waits, fold the log into the database, let go of the run. Never raises for
        the disk: what could not be written was reported to those who wrote it.
        """
        if self._writer is not None:
            await self._writer.aclose()
        failpoint("store.close")
        self.close()

    def close(self) -> None:
        """As ``aclose``, where nothing was written."""
        super().close()
        try:
            self._writing.execute("BEGIN IMMEDIATE")
            self._put_session(ended_s=time.time())
            self._writing.execute("COMMIT")
        except sqlite3.Error:
            pass  # the session reads as killed; a failed write has been reported by then
        self._writing.close()
        self._lock.release()


def _create_or_open(path: Path, manifest: Manifest, lock: RunLock) -> sqlite3.Connection:
    if path.is_symlink():
        raise InputError(f"{path}: is a symbolic link; a run store is a plain file")
    connection = connect(path, write=True)
    try:
        os.chmod(path, 0o600)
        empty = (
            connection.execute("PRAGMA page_count").fetchone()[0] <= 1
            and not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        )
        mark = lock.mark()
        if empty and mark is None:
            _create(connection, path, manifest)
        check_header(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        run_id = read_run_id(connection, path)
        checksum = Checksum(run_id)
        read_manifest(connection, checksum, path)
        _check_mark(connection, checksum, run_id, mark, path)
        # Whatever an earlier process left in the log is written into the database and synced here:
        # a sync that failed back then may have left pages that are in memory and not on the disk.
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        failpoint("store.recovered")
    except BaseException:
        connection.close()
        raise
    return connection


def _create(connection: sqlite3.Connection, path: Path, manifest: Manifest) -> None:
    failpoint("store.create")
    run_id = uuid.uuid4().hex
    checksum = Checksum(run_id)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {FORMAT}")
    for statement in SCHEMA.split(";"):
        connection.execute(statement)
    run = {"run_id": run_id, "created_s": time.time(), "engine_version": manifest.engine_version}
    _put_meta(connection, checksum, "run", run)
    _put_meta(connection, checksum, "fixed", dict(manifest.fixed))
    _put_meta(connection, checksum, "decision", dict(manifest.decision))
    _put_meta(connection, checksum, "free", dict(manifest.free))
    _put_meta(connection, checksum, "counts", Counts())
    connection.execute("COMMIT")
    sync_folder(path.parent)
    failpoint("store.created")


def _put_meta(connection: sqlite3.Connection, checksum: Checksum, name: str, value: object) -> None:
    body = encode(value)
    connection.execute(
        "INSERT OR REPLACE INTO meta VALUES (?, CAST(? AS TEXT), ?)",
        (name, body, checksum("meta", name.encode(), body)),
    )


def _check_mark(
    connection: sqlite3.Connection,
    checksum: Checksum,
    run_id: str,
    mark: tuple[str, int] | None,
    path: Path,
) -> None:
    """Raises InputError where commits that were acknowledged are gone."""
    commits = decode_counts(meta(connection, checksum, "counts", path)).commits
    if mark is not None and mark[0] == run_id and mark[1] > commits:
        raise InputError(
            f"{path}: holds {commits} of {mark[1]} commits: its log (run.sqlite-wal) was removed, "
            "or an older copy put in its place; bring those files back, or save the rest with: "
            "woolmill salvage"
        )
