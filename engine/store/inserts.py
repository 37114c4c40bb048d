"""Rows into the database, one transaction a group, with the counts that belong to them."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.errors import DiskError, StoppedError
from engine.failpoints import failpoint
from engine.store.database import disk_errors, put_meta
from engine.store.lock import RunLock
from engine.store.schema import Checksum, Counts, DecisionRow, encode
from engine.store.space import Reserve
from engine.store.writer import Work

__all__ = ["Inserts"]


class Inserts:
    """The writing side of one run in one session; ``commit`` is called by one thread.

    ``committed`` reads (counts, answered indexes beyond ``answered_below``) as the database has
    them.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        path: Path,
        checksum: Checksum,
        session: int,
        lock: RunLock,
        reserve: Reserve,
        committed: Callable[[], tuple[Counts, set[int]]],
    ) -> None:
        self._connection = connection
        self._path = path
        self._checksum = checksum
        self._session = session
        self._lock = lock
        self._reserve = reserve
        self._committed = committed
        self._counts, self._beyond = committed()
        self._inode = os.stat(path).st_ino
        self.shortage: StoppedError | None = None
        """Why nothing may be sent now, as of the last commit."""

    def commit(self, group: Sequence[Work]) -> None:
        """Write ``group`` durably, on a full disk with the reserve given back.

        Raises DiskError, InputError (the database proves damaged), ValueError (decisions out of
        order).
        """
        failpoint("store.group")
        self._check_in_place()
        self.shortage = self._reserve.shortage()
        with disk_errors(self._path):
            try:
                self._transaction(group)
            except sqlite3.OperationalError as exc:
                if exc.sqlite_errorcode != sqlite3.SQLITE_FULL or not self._reserve.release():
                    raise
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                self._counts, self._beyond = self._committed()
                self._transaction(group)
            self._lock.set_mark(self._counts.commits)
        failpoint("store.committed")

    def _transaction(self, group: Sequence[Work]) -> None:
        now_ms = time.time_ns() // 1_000_000
        execute, executemany = self._connection.execute, self._connection.executemany
        execute("BEGIN IMMEDIATE")
        if sent := self._sent_rows(group):
            cursor = executemany("INSERT OR IGNORE INTO sent VALUES (?, ?, ?, ?)", sent)
            self._counts.sent += cursor.rowcount
        if answers := self._answer_rows(group, now_ms):
            executemany("INSERT INTO answer VALUES (?, ?, CAST(? AS TEXT), ?)", answers)
        for work in group:
            self._counts.lost_tokens += work.lost_tokens
            for name, value in work.meta.items():
                put_meta(self._connection, self._checksum, name, value)
            if work.decided is None:
                continue
            self._count_decisions(work.decided.decisions)
            self._counts.vectors += len(work.decided.vectors)
            executemany(
                "INSERT INTO decision VALUES (?, ?, ?, CAST(? AS TEXT), ?)", work.decided.decisions
            )
            executemany("INSERT INTO vector VALUES (?, ?, ?, ?)", work.decided.vectors)
            if work.decided.embeddings:
                cursor = executemany(
                    "INSERT OR IGNORE INTO embedding VALUES (?, ?, ?)", work.decided.embeddings
                )
                self._counts.embeddings += cursor.rowcount
        self._counts.commits += 1
        body = encode(self._counts)
        execute(
            "UPDATE meta SET body = CAST(? AS TEXT), sum = ? WHERE name = 'counts'",
            (body, self._checksum("meta", b"counts", body)),
        )
        failpoint("store.commit")
        execute("COMMIT")

    def _check_in_place(self) -> None:
        """Raises DiskError where the database was deleted or replaced under the open file."""
        try:
            in_place = os.stat(self._path).st_ino == self._inode
        except FileNotFoundError:
            in_place = False
        if not in_place:
            raise DiskError(f"{self._path}: was removed or replaced while the run was going on")

    def _sent_rows(self, group: Sequence[Work]) -> list[tuple[int, int, bytes, int]]:
        session, rows = self._session, []
        for work in group:
            made = ((prompt.index, prompt.key(work.model)) for prompt in work.prompts)
            for index, key in (*made, *work.sent):
                sum_ = self._checksum("sent", b"%d %d" % (index, session), key)
                rows.append((index, session, key, sum_))
        return rows

    def _answer_rows(self, group: Sequence[Work], now_ms: int) -> list[tuple[int, int, bytes, int]]:
        counts, beyond, rows = self._counts, self._beyond, []
        for work in group:
            for answer in work.answers:
                index = answer.index
                if index < counts.answered_below or index in beyond:
                    counts.waste(answer)  # the first to be durable stays
                    continue
                beyond.add(index)
                counts.add_answer(answer)
                body = encode(answer)
                sum_ = self._checksum("answer", b"%d %d" % (index, now_ms), body)
                rows.append((index, now_ms, body, sum_))
        while counts.answered_below in beyond:
            beyond.remove(counts.answered_below)
            counts.answered_below += 1
        if rows:
            counts.last_at_s = now_ms / 1000
            if counts.first_at_s is None:
                counts.first_at_s = counts.last_at_s
        return rows

    def _count_decisions(self, decisions: Sequence[DecisionRow]) -> None:
        for index, position, reason, _, _ in decisions:
            key = (index, position)
            if self._counts.last_decided is not None and key <= self._counts.last_decided:
                raise ValueError(f"decision {key} comes after {self._counts.last_decided}")
            self._counts.add_decision(key, reason)
