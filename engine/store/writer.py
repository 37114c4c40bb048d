"""The one thread that writes: group commit.

Callers await; the thread takes all that waits, writes it in one transaction, syncs, and wakes every
caller of the group with one call into the event loop. When idle, a call is committed at once; under
load, commits start at least ``GATHER_S`` apart, so that a group holds some hundred rows. The price
is up to that much latency.

After a write or a sync fails, nothing is tried again: the kernel may have dropped the pages that it
failed to write and report the next sync as good (https://wiki.postgresql.org/wiki/Fsync_Errors).
The group's callers and all later ones get DiskError, and whoever opens the store next writes the
log into the database anew.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import DiskError, WoolmillError
from engine.failpoints import failpoint
from engine.records import Answer, Decision
from engine.store.database import from_sqlite
from engine.store.lock import RunLock
from engine.store.rows import Checksum, Counts, Vector, encode

__all__ = ["GATHER_S", "Work", "Writer"]

GATHER_S = 0.005
MAX_GROUP = 2000
"""Calls to one transaction."""
MAX_PENDING_BYTES = 64 << 20
"""Bytes that may wait for their commit; further callers wait before they are let in."""


@dataclass(slots=True)
class Work:
    """What one call wants written."""

    size: int
    sent: Sequence[tuple[int, str]] = ()
    """(index, key) of each."""
    answers: Sequence[Answer] = ()
    decisions: Sequence[Decision] = ()
    vectors: Sequence[Vector | None] = ()
    done: asyncio.Future[None] = field(init=False)


class Writer:
    """Owns the writing connection. Made where the loop runs; ``aclose`` ends the thread."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        path: Path,
        checksum: Checksum,
        run_id: str,
        session: int,
        counts: Counts,
        beyond: set[int],
        lock: RunLock,
    ) -> None:
        self._connection = connection
        self._path = path
        self._checksum = checksum
        self._run_id = run_id
        self._session = session
        self._counts = counts
        self._beyond = beyond  # answered indexes above counts.answered_below
        self._lock = lock
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Work] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._error: WoolmillError | None = None
        self._pending_bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self._thread = threading.Thread(target=self._run, name="woolmill-store")
        self._thread.start()

    async def write(self, work: Work) -> None:
        """Return when ``work`` is durable. Raises DiskError once a write has failed.

        A cancelled caller's work is written all the same: what it holds was paid for.
        """
        while self._pending_bytes >= MAX_PENDING_BYTES and self._error is None:
            await self._room.wait()
        if self._error is not None:
            raise self._error
        if self._closing:
            raise DiskError(f"{self._path}: the store is closed")
        work.done = self._loop.create_future()
        self._pending_bytes += work.size
        if self._pending_bytes >= MAX_PENDING_BYTES:
            self._room.clear()
        with self._wake:
            self._waiting.append(work)
            self._wake.notify()
        await work.done

    async def aclose(self) -> None:
        """Commit what waits and end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        last = -GATHER_S
        while True:
            with self._wake:
                while not self._waiting and not self._closing:
                    self._wake.wait()
                if not self._waiting:
                    return
                gather = last + GATHER_S - time.monotonic()
                if gather > 0 and not self._closing:
                    self._wake.wait_for(
                        lambda: self._closing or len(self._waiting) >= MAX_GROUP, gather
                    )
                group = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_GROUP))]
            last = time.monotonic()
            if self._error is None:
                try:
                    self._commit(group)
                except sqlite3.Error as exc:
                    self._error = from_sqlite(exc, self._path)
                except OSError as exc:
                    self._error = DiskError(f"{self._path}: {exc.strerror}; check the disk")
                except Exception as exc:  # noqa: BLE001  a bug of ours must not hang the callers
                    self._error = WoolmillError(f"{self._path}: the store's writer failed: {exc!r}")
            try:
                self._loop.call_soon_threadsafe(self._acknowledge, group)
            except RuntimeError:
                pass  # the loop is closed: nobody waits
            failpoint("store.acknowledged")

    def _acknowledge(self, group: list[Work]) -> None:
        for work in group:
            self._pending_bytes -= work.size
            if work.done.done():
                continue  # its caller was cancelled
            if self._error is None:
                work.done.set_result(None)
            else:
                work.done.set_exception(self._error)
        if self._pending_bytes < MAX_PENDING_BYTES or self._error is not None:
            self._room.set()

    def _commit(self, group: list[Work]) -> None:
        failpoint("store.group")
        now_ms = time.time_ns() // 1_000_000
        execute, executemany = self._connection.execute, self._connection.executemany
        execute("BEGIN IMMEDIATE")
        if sent := [self._sent_row(*pair) for work in group for pair in work.sent]:
            self._counts.sent += executemany(
                "INSERT OR IGNORE INTO sent VALUES (?, ?, ?, ?)", sent
            ).rowcount
        if answers := self._answer_rows(group, now_ms):
            executemany("INSERT INTO answer VALUES (?, ?, CAST(? AS TEXT), ?)", answers)
        if decisions := [
            self._decision_row(decision) for work in group for decision in work.decisions
        ]:
            executemany("INSERT INTO decision VALUES (?, ?, ?, CAST(? AS TEXT), ?)", decisions)
        if vectors := self._vector_rows(group):
            executemany("INSERT INTO vector VALUES (?, ?, ?, ?)", vectors)
        self._counts.commits += 1
        body = encode(self._counts)
        execute(
            "UPDATE meta SET body = CAST(? AS TEXT), sum = ? WHERE name = 'counts'",
            (body, self._checksum("meta", b"counts", body)),
        )
        failpoint("store.commit")
        execute("COMMIT")
        failpoint("store.committed")
        self._lock.set_mark(self._run_id, self._counts.commits)

    def _sent_row(self, index: int, key: str) -> tuple[int, int, bytes, int]:
        raw = bytes.fromhex(key)
        return (
            index,
            self._session,
            raw,
            self._checksum("sent", b"%d %d" % (index, self._session), raw),
        )

    def _answer_rows(self, group: list[Work], now_ms: int) -> list[tuple[int, int, bytes, int]]:
        counts, beyond, rows = self._counts, self._beyond, []
        for work in group:
            for answer in work.answers:
                index = answer.index
                if index < counts.answered_below or index in beyond:
                    counts.wasted += 1  # the first to be durable stays
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

    def _decision_row(self, decision: Decision) -> tuple[int, int, str | None, bytes, int]:
        key = (decision.index, decision.position)
        if self._counts.last_decided is not None and key <= self._counts.last_decided:
            raise ValueError(f"decision {key} comes after {self._counts.last_decided}")
        self._counts.add_decision(decision)
        body = encode(decision)
        return (*key, decision.reason, body, self._checksum("decision", b"%d %d" % key, body))

    def _vector_rows(self, group: list[Work]) -> list[tuple[int, int, bytes, int]]:
        rows = []
        for work in group:
            for decision, vector in zip(work.decisions, work.vectors, strict=False):
                if vector is None:
                    continue
                key = (decision.index, decision.position)
                body = vector.astype("<f4", copy=False).tobytes()
                rows.append((*key, body, self._checksum("vector", b"%d %d" % key, body)))
        self._counts.vectors += len(rows)
        return rows
