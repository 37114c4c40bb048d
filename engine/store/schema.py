"""The rows of the run store: their tables, their JSON, their checksums.

Every row is a JSON body and a checksum over table, key and body: the head of a SHA-256 that begins
with the run's id, so that a flipped bit, a row under another key and a row of another run all fail
alike. Keys and the reason stand in columns besides, for SQL. The price: about two microseconds and
eight bytes a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from engine.errors import InputError
from engine.json_values import has_large_float
from engine.money import Spent
from engine.records import Answer, Completion, Decision, Neighbour, Usage

__all__ = [
    "APPLICATION_ID",
    "EMBEDDINGS",
    "FORMAT",
    "PAGE_SIZE",
    "SCHEMA",
    "Checksum",
    "Counts",
    "DecisionRows",
    "Vector",
    "decode",
    "decode_answer",
    "decode_decision",
    "encode",
]

Vector = NDArray[np.float32]

APPLICATION_ID = 0x574F4F4C
"""``WOOL``, in the database's header."""
FORMAT = 5
"""``user_version`` in the header. A store of a higher format is refused; a lower one is read, and
gets this number when a run goes on with it. 2: answers with thoughts, cached tokens and costs.
3: answers with their input rows, records of any fields. 4: embeddings of other machines.
5: what attempts without an answer may have cost, and how many requests each session dropped.
"""

PAGE_SIZE = 8192
"""Bytes. Rows have 1 to 2 KiB: a fifth less CPU a row than with SQLite's 4096."""

EMBEDDINGS = """
CREATE TABLE IF NOT EXISTS embedding (key BLOB PRIMARY KEY, body BLOB NOT NULL,
                       sum INTEGER NOT NULL)
"""
"""What stores of a format below 4 lack."""
SCHEMA = f"""
CREATE TABLE meta     (name TEXT PRIMARY KEY, body TEXT NOT NULL, sum INTEGER NOT NULL)
                      WITHOUT ROWID;
CREATE TABLE session  (number INTEGER PRIMARY KEY, body TEXT NOT NULL, sum INTEGER NOT NULL);
CREATE TABLE sent     (request INTEGER, session INTEGER, key BLOB NOT NULL, sum INTEGER NOT NULL,
                       PRIMARY KEY (request, session, key)) WITHOUT ROWID;
CREATE TABLE answer   (request INTEGER PRIMARY KEY, at INTEGER NOT NULL, body TEXT NOT NULL,
                       sum INTEGER NOT NULL);
CREATE TABLE decision (request INTEGER, position INTEGER, reason TEXT, body TEXT NOT NULL,
                       sum INTEGER NOT NULL, PRIMARY KEY (request, position));
CREATE TABLE vector   (request INTEGER, position INTEGER, body BLOB NOT NULL, sum INTEGER NOT NULL,
                       PRIMARY KEY (request, position));
{EMBEDDINGS};
"""
"""The tables of a run. ``sum`` is the checksum of each row; what stands in ``body`` is JSON. A
change here is another FORMAT."""


_KEY = {"meta": b"%b", "session": b"%d", "embedding": b"%b"} | dict.fromkeys(
    ("sent", "answer", "decision", "vector"), b"%d %d"
)
"""How a row's key is written into its checksum."""


class Checksum:
    """Checksums of one run's rows."""

    def __init__(self, run_id: str) -> None:
        key = run_id.encode()
        self._of = {table: hashlib.sha256(key + b"\0" + table.encode() + b"\0") for table in _KEY}

    def __call__(self, table: str, key: bytes, body: bytes) -> int:
        """Signed 64 bits, as SQLite keeps an integer."""
        sum_ = self._of[table].copy()
        sum_.update(key)
        sum_.update(body)
        return int.from_bytes(sum_.digest()[:8], "little", signed=True)

    def holds(self, table: str, key: tuple[Any, ...], body: Any, sum_: Any) -> bool:
        """Whether a row is as it was written, its columns' types included."""
        try:
            return bool(self(table, _KEY[table] % key, body) == sum_)
        except TypeError:  # damage can make NULL of a blob, and a blob of an integer
            return False


@dataclass(slots=True, kw_only=True)
class Counts(Spent):
    """Sums over all rows, kept in the same transaction as the rows they count. What was spent is
    that of all completions.
    """

    commits: int = 0
    sent: int = 0
    """Requests recorded before they were sent; one sent again in a later session counts again."""
    answered: int = 0
    failed: int = 0
    """Of ``answered``: those that failed permanently."""
    not_asked: int = 0
    """Of ``answered``: those about which there was nothing to ask."""
    wasted: int = 0
    """Answers paid and not used: their requests had one already, or were asked anew."""
    reseeds: int = 0
    """How often answers were dropped for what they said, to be asked anew with other seeds."""
    attempts: int = 0
    truncated: int = 0
    estimated: int = 0
    """Completions whose tokens the server did not state."""
    decided: int = 0
    accepted: int = 0
    vectors: int = 0
    embeddings: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Refused pieces by reason."""
    finish_reasons: dict[str, int] = field(default_factory=dict)
    models: dict[str, int] = field(default_factory=dict)
    """Completions by the model's name in the reply."""
    backends: dict[str, int] = field(default_factory=dict)
    answered_below: int = 0
    """Every request below this index has its answer."""
    last_decided: tuple[int, int] | None = None
    """(index, position) of the last decision in plan order."""
    first_at_s: float | None = None
    """Unix time of the first answer's commit."""
    last_at_s: float | None = None

    def add_answer(self, answer: Answer) -> None:
        """Count one answer (all but ``answered_below`` and the times)."""
        self.answered += 1
        self.attempts += answer.attempts
        self.truncated += answer.truncated
        self.backends[answer.backend] = self.backends.get(answer.backend, 0) + 1
        completion = answer.completion
        if completion is None:
            self.failed += answer.failed
            self.not_asked += not answer.failed
            return
        usage, finish = completion.usage, completion.finish_reason
        self.add(usage)
        self.estimated += usage.estimated
        self.finish_reasons[finish] = self.finish_reasons.get(finish, 0) + 1
        self.models[completion.model] = self.models.get(completion.model, 0) + 1

    def waste(self, answer: Answer) -> None:
        """Count an answer that is not kept: of what it cost the sums above say nothing."""
        self.wasted += 1
        if answer.completion is not None:
            usage = answer.completion.usage
            self.lost_tokens += usage.prompt_tokens + usage.completion_tokens

    def add_decision(self, key: tuple[int, int], reason: str | None) -> None:
        """Count the decision on piece ``key`` (index, position)."""
        self.decided += 1
        self.last_decided = key
        if reason is None:
            self.accepted += 1
        else:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1


DecisionRow = tuple[int, int, str | None, bytes, int]
VectorRow = tuple[int, int, bytes, int]
EmbeddingRow = tuple[bytes, bytes, int]


@dataclass(frozen=True, slots=True)
class DecisionRows:
    """Decisions, and the vectors beside them, as their tables take them."""

    decisions: list[DecisionRow]
    """(request, position, reason, body, sum) of each."""
    vectors: list[VectorRow]
    """(request, position, body, sum)."""
    embeddings: list[EmbeddingRow] = field(default_factory=list)
    """(key, body, sum) of each that came from a server and that these decisions may rest on."""

    @classmethod
    def of(
        cls,
        checksum: Checksum,
        decisions: Sequence[Decision],
        vectors: Sequence[Vector | None] = (),
        embeddings: Iterable[tuple[bytes, bytes]] = (),
    ) -> DecisionRows:
        """The rows of ``decisions`` with ``vectors``: one for each or None, or none at all; and of
        ``embeddings``, each by its key.
        """
        if vectors and len(vectors) != len(decisions):
            raise ValueError(f"{len(vectors)} vectors for {len(decisions)} decisions")
        rows = cls([], [])
        for decision in decisions:
            key, body = (decision.index, decision.position), encode(decision)
            sum_ = checksum("decision", b"%d %d" % key, body)
            rows.decisions.append((*key, decision.reason, body, sum_))
        for decision, vector in zip(decisions, vectors, strict=False):
            if vector is not None:
                key = (decision.index, decision.position)
                body = vector.astype("<f4", copy=False).tobytes()
                rows.vectors.append((*key, body, checksum("vector", b"%d %d" % key, body)))
        rows.embeddings.extend(
            (name, body, checksum("embedding", name, body)) for name, body in embeddings
        )
        return rows

    def pack(self) -> tuple[list[tuple[Any, ...]], list[bytes]]:
        """For another process: every row with the length of its body in the body's place, and the
        bodies. Decisions have the longest rows, embeddings the shortest.
        """
        embeddings = [(key.hex(), body, sum_) for key, body, sum_ in self.embeddings]
        rows: list[tuple[Any, ...]] = [*self.decisions, *self.vectors, *embeddings]
        return [(*row[:-2], len(row[-2]), row[-1]) for row in rows], [row[-2] for row in rows]

    @classmethod
    def unpack(cls, packed: Sequence[Sequence[Any]], bodies: bytes) -> DecisionRows:
        """What ``pack`` took apart, its bodies joined."""
        rows, start = cls([], []), 0
        for *key, size, sum_ in packed:
            body = bodies[start : start + size]
            start += size
            if len(key) == 1:
                rows.embeddings.append((bytes.fromhex(key[0]), body, sum_))
                continue
            kind: list[Any] = rows.decisions if len(key) == 3 else rows.vectors
            kind.append((*key, body, sum_))
        return rows


def encode(value: Any) -> bytes:
    """JSON of a dataclass or plain value. Lone surrogates, which UTF-8 has no form for, are
    escaped.
    """
    try:
        return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:
        plain = value if isinstance(value, dict) else asdict(value)
        return json.dumps(plain, separators=(",", ":")).encode()


def decode(body: bytes) -> Any:
    """The value that ``encode`` was given, as plain JSON values."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return json.loads(body)


def _with_row(body: bytes, name: str) -> Any:
    """The fields of something whose field ``name`` is a row, which may hold any number."""
    fields = decode(body)
    return json.loads(body) if has_large_float(fields.get(name)) else fields


def decode_answer(body: bytes) -> Answer:
    """Raises InputError for JSON of another shape, which only another program can have written."""
    try:
        fields = _with_row(body, "row")
        fields["demonstrations"] = tuple(fields["demonstrations"])
        completion = fields["completion"]
        if completion is not None:
            completion["usage"] = Usage(**completion["usage"])
            fields["completion"] = Completion(**completion)
        return Answer(**fields)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise InputError(f"a row of table answer holds no answer ({exc})") from exc


def decode_decision(body: bytes) -> Decision:
    """Raises InputError for JSON of another shape."""
    try:
        fields = _with_row(body, "record")
        if fields["nearest"] is not None:
            fields["nearest"] = Neighbour(**fields["nearest"])
        return Decision(**fields)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise InputError(f"a row of table decision holds no decision ({exc})") from exc


def decode_counts(body: bytes) -> Counts:
    """Raises InputError for JSON of another shape."""
    try:
        fields = decode(body)
        last = fields["last_decided"]
        fields["last_decided"] = None if last is None else (last[0], last[1])
        return Counts(**fields)
    except (KeyError, TypeError, ValueError) as exc:
        raise InputError(f"row counts of table meta holds no counts ({exc})") from exc


def damaged(table: str, key: object, path: object) -> InputError:
    """The error for a row that fails its checksum."""
    return InputError(
        f"{path}: row {key} of table {table} fails its checksum; "
        f"see the extent with: woolmill verify, save the rest with: woolmill salvage"
    )
