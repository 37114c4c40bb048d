"""Read a run store: in the run itself, or beside it for export, report and view.

Every row is checked as it is read, and every full walk is checked against the counts, so that a
damaged store raises InputError and never gives wrong or silently fewer rows.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from engine.errors import InputError
from engine.records import Answer, Decision
from engine.store.batches import BatchRow
from engine.store.database import (
    check_header,
    connect,
    disk_errors,
    meta,
    read_manifest,
    read_run_id,
)
from engine.store.manifest import Manifest
from engine.store.schema import (
    Checksum,
    Counts,
    DecisionRows,
    Vector,
    damaged,
    decode,
    decode_answer,
    decode_counts,
    decode_decision,
)

__all__ = ["InFlight", "Resume", "RunReader", "Session"]

_CHUNK = 1000
_KEYS = 500
"""Of one statement."""
_SENT_LATER = (
    "EXISTS (SELECT 1 FROM sent AS later WHERE later.request = sent.request"
    " AND (later.session, later.key) > (sent.session, sent.key))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """A request that was recorded as sent and has no answer: it may have been billed, where it was
    on the wire when its session ended (``Session.perhaps_billed``).
    """

    index: int
    key: str
    """``Prompt.key`` in hex digits."""
    session: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One process that wrote to the run."""

    number: int
    pid: int
    engine_version: str
    started_s: float
    """Unix time."""
    ended_s: float | None
    """None: it runs, or it was killed."""
    dropped: int | None = None
    """Requests that were on the wire at its end, where it ended in order; None: nobody counted."""

    def perhaps_billed(self, unanswered: int) -> int:
        """Of so many requests that it sent and got no answer to: those that may have been billed
        for being on the wire at its end. The others waited to be asked again, as after a refusal.
        """
        if self.ended_s is None or self.dropped is None:
            return unanswered
        return min(unanswered, self.dropped)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """What a restart needs to go on."""

    answered_below: int
    """Every request below this index has its answer."""
    answered_beyond: frozenset[int]
    """The answered ones above it."""
    in_flight: tuple[InFlight, ...]
    """In order of index; these are sent again."""
    last_decided: tuple[int, int] | None
    """(index, position) of the last decision in plan order."""
    counts: Counts

    def is_answered(self, index: int) -> bool:
        return index < self.answered_below or index in self.answered_beyond


class RunReader:
    """A run store opened for reading.

    ``snapshot`` freezes it as it is now, so that counts and rows belong together while the run goes
    on. Methods may be called from any thread, one at a time each.
    """

    def __init__(self, folder: Path, *, snapshot: bool = True) -> None:
        self.folder = folder
        self.path = folder / "run.sqlite"
        if not self.path.is_file():
            raise InputError(f"{folder}: holds no run (no run.sqlite)")
        self.named_recipe = ""
        """The run's recipe, where the person who reads it has named it: code is run only then."""
        self._reading = threading.Lock()
        self._sent_seen = False
        with disk_errors(self.path):
            self._connection = connect(self.path, write=False)
            try:
                if snapshot:
                    self._connection.execute("BEGIN")
                check_header(self._connection, self.path)
                self.run_id = read_run_id(self._connection, self.path)
                self._checksum = Checksum(self.run_id)
                self.manifest: Manifest = read_manifest(self._connection, self._checksum, self.path)
            except BaseException:  # raised again, with nothing left open
                self._connection.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def counts(self) -> Counts:
        """All sums, as of the last commit."""
        with self._reading, disk_errors(self.path):
            return decode_counts(meta(self._connection, self._checksum, "counts", self.path))

    def resume(self) -> Resume:
        counts = self.counts()
        self._sent_whole()
        beyond = self._query(
            "SELECT request FROM answer WHERE request >= ?", (counts.answered_below,)
        )
        waiting = self._query(
            "SELECT request, max(session), key, sum FROM sent WHERE request >= ? AND NOT EXISTS"
            " (SELECT 1 FROM answer WHERE answer.request = sent.request) GROUP BY request",
            (counts.answered_below,),
        )
        in_flight = []
        for request, session, key, sum_ in waiting:
            if not self._checksum.holds("sent", (request, session), key, sum_):
                raise damaged("sent", request, self.path)
            in_flight.append(InFlight(index=request, key=key.hex(), session=session))
        return Resume(
            answered_below=counts.answered_below,
            answered_beyond=frozenset(row[0] for row in beyond),
            in_flight=tuple(in_flight),
            last_decided=counts.last_decided,
            counts=counts,
        )

    def answers(self, first: int, limit: int) -> list[Answer]:
        """Up to ``limit`` answers to the requests from index ``first`` on, up to the first that is
        missing.
        """
        rows = self._query(
            "SELECT request, at, body, sum FROM answer WHERE request >= ? ORDER BY request LIMIT ?",
            (first, limit),
        )
        answers: list[Answer] = []
        for expected, (request, at, body, sum_) in enumerate(rows, first):
            if request != expected:
                break
            if not self._checksum.holds("answer", (request, at), body, sum_):
                raise damaged("answer", request, self.path)
            answers.append(decode_answer(body))
        if len(answers) < limit and first + len(answers) < self.counts().answered_below:
            raise damaged("answer", first + len(answers), self.path)
        return answers

    def all_answers(self) -> Iterator[tuple[Answer, float]]:
        """Every answer in plan order with the Unix time of its commit; requests in flight are left
        out.
        """
        expected = self.counts().answered
        after, count = -1, 0
        while rows := self._query(
            "SELECT request, at, body, sum FROM answer WHERE request > ? ORDER BY request LIMIT ?",
            (after, _CHUNK),
        ):
            for request, at, body, sum_ in rows:
                whole = self._checksum.holds("answer", (request, at), body, sum_)
                if not whole or request <= after:
                    raise damaged("answer", request, self.path)
                yield decode_answer(body), at / 1000
                after = request
            count += len(rows)
        self._complete("answer", count, expected)

    def decisions(
        self, *, accepted: bool | None = None, after: tuple[int, int] = (-1, -1)
    ) -> Iterator[Decision]:
        """Decisions in plan order: all, the accepted or the refused ones.

        Only a walk from the start is checked for missing rows, not one ``after`` a place.
        """
        if accepted is not False:
            wanted = self.counts().accepted if accepted else self.counts().decided
        else:
            wanted = self.counts().decided - self.counts().accepted
        which = {None: "", True: "AND reason IS NULL", False: "AND reason IS NOT NULL"}[accepted]
        whole, count = after == (-1, -1), 0
        while rows := self._query(
            "SELECT request, position, reason, body, sum FROM decision"
            f" WHERE (request, position) > (?, ?) {which}"
            f" ORDER BY request, position LIMIT {_CHUNK}",
            after,
        ):
            for row in rows:
                decision = self._decision(*row)
                if (decision.index, decision.position) <= after:  # a damaged page gives it twice
                    raise damaged("decision", f"{row[0]}.{row[1]}", self.path)
                yield decision
                after = (decision.index, decision.position)
            count += len(rows)
        if whole:
            self._complete("decision", count, wanted)

    def decision(self, index: int, position: int) -> Decision | None:
        """The decision on one piece; None where there is none (yet)."""
        rows = self._query(
            "SELECT request, position, reason, body, sum FROM decision"
            " WHERE request = ? AND position = ?",
            (index, position),
        )
        return self._decision(*rows[0]) if rows else None

    def decision_sum(self, index: int, position: int) -> int | None:
        """The checksum of the decision on one piece, which two histories of a run do not share;
        None where there is none (yet).
        """
        rows = self._query(
            "SELECT sum FROM decision WHERE request = ? AND position = ?", (index, position)
        )
        return int(rows[0][0]) if rows else None

    def accepted_place(self, rank: int) -> tuple[int, int] | None:
        """(request, position) of the accepted row that ``rank`` others come before in plan order;
        None where there are not so many.
        """
        rows = self._query(
            "SELECT request, position FROM decision WHERE reason IS NULL"
            " ORDER BY request, position LIMIT 1 OFFSET ?",
            (rank,),
        )
        return (rows[0][0], rows[0][1]) if rows else None

    def accepted_places(self) -> Iterator[tuple[int, int]]:
        """(request, position) of every accepted row in plan order, without what is in it."""
        expected, after, count = self.counts().accepted, (-1, -1), 0
        while rows := self._query(
            "SELECT request, position FROM decision"
            " WHERE (request, position) > (?, ?) AND reason IS NULL"
            f" ORDER BY request, position LIMIT {_CHUNK}",
            after,
        ):
            yield from rows
            after = rows[-1]
            count += len(rows)
        self._complete("decision", count, expected)

    def accepted_at(self, rank: int) -> Decision | None:
        """The accepted row of this rank in plan order, from 0; None: there are not so many."""
        rows = self._query(
            "SELECT request, position, reason, body, sum FROM decision WHERE reason IS NULL"
            " ORDER BY request, position LIMIT 1 OFFSET ?",
            (rank,),
        )
        return self._decision(*rows[0]) if rows else None

    def accepted(
        self, *, vectors: bool = False, after: tuple[int, int] = (-1, -1)
    ) -> Iterator[tuple[Decision, Vector | None]]:
        """Accepted decisions in plan order, each with its vector where asked for and there.

        As with ``decisions``, only a walk from the start is checked for missing rows.
        """
        decisions = self.decisions(accepted=True, after=after)
        if not vectors:
            for decision in decisions:
                yield decision, None
            return
        stored = self.vectors(after=after)
        at, vector = next(stored, (None, None))
        for decision in decisions:
            if at == (decision.index, decision.position):
                yield decision, vector
                at, vector = next(stored, (None, None))
            else:
                yield decision, None

    def rows_of(
        self,
        decisions: Sequence[Decision],
        vectors: Sequence[Vector | None] = (),
        embeddings: Iterable[tuple[bytes, bytes]] = (),
    ) -> DecisionRows:
        """What ``RunStore.decided_rows`` takes: rows with this run's checksums."""
        return DecisionRows.of(self._checksum, decisions, vectors, embeddings)

    def embeddings(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Of these keys, those that have an embedding, with its bytes."""
        found = {}
        for start in range(0, len(keys), _KEYS):
            some = tuple(keys[start : start + _KEYS])
            marks = ",".join("?" * len(some))
            for key, body, sum_ in self._query(
                f"SELECT key, body, sum FROM embedding WHERE key IN ({marks})", some
            ):
                found[key] = self._embedding(key, body, sum_)
        return found

    def all_embeddings(self) -> Iterator[tuple[bytes, bytes]]:
        """Every embedding that came from a server, by its key."""
        expected, after, count = self.counts().embeddings, 0, 0
        while expected and (
            rows := self._query(
                f"SELECT rowid, key, body, sum FROM embedding WHERE rowid > ? LIMIT {_CHUNK}",
                (after,),
            )
        ):
            for _, key, body, sum_ in rows:
                yield key, self._embedding(key, body, sum_)
            after = rows[-1][0]
            count += len(rows)
        self._complete("embedding", count, expected)

    def sessions(self) -> list[Session]:
        """The processes that wrote to the run, in order."""
        self._pages_whole("session")
        sessions = []
        for number, body, sum_ in self._query(
            "SELECT number, body, sum FROM session ORDER BY number"
        ):
            if not self._checksum.holds("session", (number,), body, sum_):
                raise damaged("session", number, self.path)
            sessions.append(Session(number=number, **decode(body)))
        return sessions

    def batches(self) -> list[BatchRow]:
        """All batches of the run, in the order in which they were made."""
        found = []
        for name, body, sum_ in self._query(
            "SELECT name, body, sum FROM meta WHERE name >= 'batch.' AND name < 'batch/'"
        ):
            if not self._checksum.holds("meta", (name,), body, sum_):
                raise damaged("meta", name.decode(errors="replace"), self.path)
            found.append(BatchRow.of(decode(body)))
        return sorted(found, key=lambda row: (row.made_s, row.tag))

    def limits(self) -> list[dict[str, Any]]:
        """The latest changes of the endpoints' limits, in the order of time, as plain values."""
        return list(self._noted("limits") or ())

    def size(self) -> int | None:
        """How many requests the whole input is; None where nobody has counted it."""
        noted = self._noted("requests")
        return noted if noted is None else int(noted)

    def _noted(self, name: str) -> Any:
        """What stands in ``meta`` by a name that not every run has."""
        for body, sum_ in self._query("SELECT body, sum FROM meta WHERE name = ?", (name,)):
            if not self._checksum.holds("meta", (name.encode(),), body, sum_):
                raise damaged("meta", name, self.path)
            return decode(body)
        return None

    def in_batches(self) -> int:
        """Requests without an answer that stand in batches whose answers may come."""
        count = 0
        for row in self.batches():
            for first, end in row.requests if row.awaited else ():
                ((answered,),) = self._query(
                    "SELECT count(*) FROM answer WHERE request >= ? AND request < ?", (first, end)
                )
                count += end - first - answered
        return count

    def sent_again(self) -> list[InFlight]:
        """Requests sent in more than one session, by key: in flight at a crash, so perhaps paid
        twice.
        """
        self._sent_whole()
        again: dict[int, InFlight] = {}
        before, after = (-1, -1), (-1, -1, b"")
        while rows := self._query(
            "SELECT request, session, key, sum FROM sent WHERE (request, session, key) > (?, ?, ?)"
            f" ORDER BY request, session, key LIMIT {_CHUNK}",
            after,
        ):
            # Every row, not only those found: a damaged number hides a row among the others.
            for request, session, key, sum_ in rows:
                if not self._checksum.holds("sent", (request, session), key, sum_):
                    raise damaged("sent", request, self.path)
                if request == before[0] and session != before[1]:
                    again[request] = InFlight(index=request, key=key.hex(), session=session)
                before = request, session
            after = rows[-1][:3]
        return list(again.values())

    def is_sent_after(self, session: int, request: int) -> bool:
        """Whether a request up to ``request`` was sent in a later session than ``session``."""
        rows = self._query(
            "SELECT EXISTS (SELECT 1 FROM sent WHERE request <= ? AND session > ?)",
            (request, session),
        )
        return bool(rows[0][0])

    def unanswered(self) -> dict[int, int]:
        """Requests that were sent and not answered, by session. One that a later session sent again
        is unanswered in the earlier one.
        """
        counts = self.counts()
        open_: dict[int, int] = dict(
            self._query(
                f"SELECT session, count(*) FROM sent WHERE request >= ? AND NOT {_SENT_LATER}"
                " AND NOT EXISTS (SELECT 1 FROM answer WHERE answer.request = sent.request)"
                " GROUP BY session",
                (counts.answered_below,),
            )
        )
        never_sent = counts.backends.get("", 0)  # no server had them: there was nothing to send
        # Else none was sent again.
        if sum(open_.values()) < counts.sent - (counts.answered - never_sent):
            again = self._query(
                f"SELECT session, count(*) FROM sent WHERE {_SENT_LATER} GROUP BY session"
            )
            for session, count in again:
                open_[session] = open_.get(session, 0) + count
        if sum(open_.values()) < counts.sent - counts.answered:
            raise damaged("sent", "(all)", self.path)
        return open_

    def _query(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with self._reading, disk_errors(self.path):
            try:
                return self._connection.execute(sql, parameters).fetchall()
            except sqlite3.ProgrammingError as exc:
                raise InputError(f"{self.path}: the store is closed") from exc

    def _decision(
        self, request: int, position: int, reason: bytes | None, body: bytes, sum_: int
    ) -> Decision:
        if not self._checksum.holds("decision", (request, position), body, sum_):
            raise damaged("decision", f"{request}.{position}", self.path)
        decision = decode_decision(body)
        if (reason is None) != decision.accepted:
            raise damaged("decision", f"{request}.{position}", self.path)
        return decision

    def _embedding(self, key: bytes, body: bytes, sum_: int) -> bytes:
        if not self._checksum.holds("embedding", (key,), body, sum_):
            raise damaged("embedding", key.hex(), self.path)
        return body

    def vectors(
        self, *, after: tuple[int, int] = (-1, -1)
    ) -> Iterator[tuple[tuple[int, int], Vector]]:
        """Vectors in plan order, each with its row's (request, position); ``after`` as with
        ``decisions``.
        """
        whole, count, expected = after == (-1, -1), 0, self.counts().vectors
        while rows := self._query(
            "SELECT request, position, body, sum FROM vector"
            f" WHERE (request, position) > (?, ?) ORDER BY request, position LIMIT {_CHUNK}",
            after,
        ):
            for request, position, body, sum_ in rows:
                whole = self._checksum.holds("vector", (request, position), body, sum_)
                if not whole or (request, position) <= after:
                    raise damaged("vector", f"{request}.{position}", self.path)
                yield (request, position), np.frombuffer(body, dtype="<f4")
                after = (request, position)
            count += len(rows)
        if whole:
            self._complete("vector", count, expected)

    def _sent_whole(self) -> None:
        """Raises InputError where rows are missing, of which some may have been in flight, or where
        a damaged page gives some twice. Looks once. One statement, so that both numbers are of one
        commit.
        """
        if self._sent_seen:
            return
        self._pages_whole("sent")
        ((count, body),) = self._query(
            "SELECT count(*), (SELECT body FROM meta WHERE name = 'counts') FROM sent"
        )
        if count != decode_counts(body).sent:
            raise damaged("sent", "(all)", self.path)
        self._sent_seen = True

    def _pages_whole(self, table: str) -> None:
        """Raises InputError where SQLite sees that pages hide rows or give them twice, which no
        row's own checksum can.
        """
        if self._query(f"PRAGMA integrity_check({table})") != [(b"ok",)]:
            raise damaged(table, "(all)", self.path)

    def _complete(self, table: str, count: int, expected: int) -> None:
        # More is no fault: rows committed since the counts were read.
        if count < expected:
            raise InputError(
                f"{self.path}: table {table} has {count} rows of {expected}; "
                f"see: woolmill verify, woolmill salvage"
            )
