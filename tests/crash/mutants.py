"""Deliberate breakages of our own protections. Each must be caught, or a test is missing.

``hunt.py`` applies them, one at a time, in the processes that are tested.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine import secrets
from engine.decide.snapshot import Snapshots
from engine.errors import StoppedError
from engine.records import Answer
from engine.secrets import Secret
from engine.store import (
    Counts,
    Manifest,
    Resume,
    RunReader,
    RunStore,
    database,
    inserts,
    lock,
    reader,
    run,
)
from engine.store import schema as rows
from engine.store.space import Reserve
from engine.store.writer import Work, Writer

__all__ = ["MUTANTS", "apply"]


def no_fsync() -> None:
    """The database is told not to sync."""
    connect = database.connect

    def careless(path: Path, *, write: bool) -> sqlite3.Connection:
        connection = connect(path, write=write)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    swap(run, "connect", careless)


def acknowledge_before_commit() -> None:
    """Callers are told that their rows are durable when these are queued."""

    write = Writer.write

    def hasty(self: Writer, work: Work) -> asyncio.Future[None]:
        done = write(self, work)
        done.set_result(None)
        return done

    swap(Writer, "write", hasty)


def send_before_recording() -> None:
    """A request is sent without a record."""

    def hasty(self: RunStore, prompts: Any, model: str, **_reserved: int) -> asyncio.Future[None]:
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    swap(RunStore, "sent", hasty)


def ignore_checksum() -> None:
    """Every row passes."""
    swap(rows.Checksum, "holds", lambda *args: True)


def ignore_missing_rows() -> None:
    """A walk over the rows does not compare their number with the counts."""
    swap(RunReader, "_complete", lambda *args: None)


def drop_lock() -> None:
    """The lock file is opened and not locked."""
    swap(
        lock, "fcntl", type("unlocked", (), {"flock": lambda *a: None, "LOCK_EX": 0, "LOCK_NB": 0})
    )


def inherit_lock() -> None:
    """The lock is handed down to child processes."""
    taken = lock.RunLock.__init__

    def inherited(self: lock.RunLock, path: Path) -> None:
        taken(self, path)
        os.set_inheritable(self._fd, True)

    swap(lock.RunLock, "__init__", inherited)


def ignore_mark() -> None:
    """Commits that are gone with the log are not missed."""

    def check(self: lock.RunLock, run_id: str, commits: int) -> None:
        self._run_id = run_id.encode()

    swap(lock.RunLock, "check", check)


def ignore_format() -> None:
    """A file of any kind or format is taken for a store."""
    nothing = lambda *args: None  # noqa: E731
    swap(run, "check_header", nothing)
    swap(reader, "check_header", nothing)


def ignore_changed_settings() -> None:
    """A run goes on under other settings."""
    swap(Manifest, "differences", lambda self, other: [])


def retry_fsync() -> None:
    """A commit whose sync failed is tried again."""
    transaction = inserts.Inserts._transaction

    def stubborn(self: inserts.Inserts, group: Sequence[Work]) -> None:
        try:
            transaction(self, group)
        except sqlite3.Error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            self._counts, self._beyond = self._committed()
            transaction(self, group)

    swap(inserts.Inserts, "_transaction", stubborn)


def swallow_disk_errors() -> None:
    """A write that failed is passed over."""
    commit = inserts.Inserts.commit

    def deaf(self: inserts.Inserts, group: Sequence[Work]) -> None:
        try:
            commit(self, group)
        except Exception:  # noqa: BLE001  that is the mutant
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    swap(inserts.Inserts, "commit", deaf)


def no_reserve() -> None:
    """The disk is filled to the last block."""

    def shortage(self: Reserve) -> StoppedError | None:
        return None

    swap(Reserve, "shortage", shortage)
    swap(Reserve, "release", lambda self: False)


def drop_cancelled() -> None:
    """An answer whose caller was cancelled is not written."""
    commit = inserts.Inserts.commit

    def picky(self: inserts.Inserts, group: Sequence[Work]) -> None:
        commit(self, [work for work in group if not work.done.cancelled()])

    swap(inserts.Inserts, "commit", picky)


def overwrite_answers() -> None:
    """The last answer to a request stays instead of the first."""
    answer_rows = inserts.Inserts._answer_rows

    def latest(self: inserts.Inserts, group: Sequence[Work], now_ms: int) -> Any:
        for work in group:
            for answer in work.answers:
                if answer.index < self._counts.answered_below or answer.index in self._beyond:
                    self._connection.execute(
                        "DELETE FROM answer WHERE request = ?", (answer.index,)
                    )
                    self._beyond.discard(answer.index)
                    self._counts.answered_below = min(self._counts.answered_below, answer.index)
        return answer_rows(self, group, now_ms)

    swap(inserts.Inserts, "_answer_rows", latest)


def _resumed(change: Callable[[Resume], Resume]) -> None:
    resume = RunReader.resume
    swap(RunReader, "resume", lambda self: change(resume(self)))


def forget_in_flight() -> None:
    """What was in flight at a crash is not listed."""
    _resumed(lambda resume: replace(resume, in_flight=()))


def ask_again() -> None:
    """Answers that arrived out of order are forgotten on resume."""
    _resumed(lambda resume: replace(resume, answered_beyond=frozenset()))


def decide_again() -> None:
    """On resume, decisions start over."""
    _resumed(lambda resume: replace(resume, last_decided=None))
    counts = RunReader.counts
    swap(RunReader, "counts", lambda self: replace(counts(self), last_decided=None))


def decide_out_of_order() -> None:
    """Answers are decided in another order than the plan's."""
    answers = RunReader.answers

    def shuffled(self: RunReader, first: int, limit: int) -> list[Answer]:
        found = answers(self, first, limit)
        texts = [a.completion for a in found]
        return [replace(a, completion=text) for a, text in zip(found, texts[::-1], strict=True)]

    swap(RunReader, "answers", shuffled)


def accept_on_eof() -> None:
    """An answer that breaks off counts as whole."""
    from engine.backends.openai.reply import Reply

    completion = Reply._completion

    def trusting(self: Reply, i: int, *args: Any) -> Any:
        self.finish[i] = self.finish[i] or "stop"
        return completion(self, i, *args)

    swap(Reply, "_completion", trusting)


def trust_snapshots() -> None:
    """A snapshot of the index is used whatever run, settings and decisions it is of."""

    def place(self: Snapshots, about: dict[str, Any], counts: Counts) -> Any:
        return (*about["last"],), about["accepted"]

    swap(Snapshots, "_place", place)


def log_keys() -> None:
    """With --debug, a key is logged as it is read."""
    from engine.run import generate

    read_key = secrets.read_key

    def talkative(**where: Any) -> Secret | None:
        key = read_key(**where)
        if key is not None:
            logging.getLogger("engine").debug("the key is %s", key.reveal())
        return key

    swap(generate, "read_key", talkative)


MUTANTS: dict[str, Callable[[], None]] = {
    mutant.__name__: mutant
    for mutant in (
        no_fsync,
        acknowledge_before_commit,
        send_before_recording,
        ignore_checksum,
        ignore_missing_rows,
        drop_lock,
        inherit_lock,
        ignore_mark,
        ignore_format,
        ignore_changed_settings,
        retry_fsync,
        swallow_disk_errors,
        no_reserve,
        drop_cancelled,
        overwrite_answers,
        forget_in_flight,
        ask_again,
        decide_again,
        decide_out_of_order,
        accept_on_eof,
        trust_snapshots,
        log_keys,
    )
}


def swap(owner: object, name: str, broken: object) -> None:
    setattr(owner, name, broken)


def apply(name: str) -> None:
    """Break one protection in this process, for good."""
    MUTANTS[name]()
