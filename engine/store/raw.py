"""Every row of a run store with the verdict of its checksum: what ``verify`` and ``salvage`` walk
over.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.store.schema import Checksum

__all__ = ["TABLES", "Row", "scan"]


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in the file."""

    key: tuple[Any, ...]
    """meta: (name); session: (number); sent: (request, session); embedding: (key); others:
    (request, position or time).
    """
    body: bytes
    """JSON; of sent the request's key, of vector float32, of embedding float16."""
    reason: bytes | None
    """Decisions: the column beside the body."""
    intact: bool


# Table: its columns for key and body, and the one that rows are walked by.
TABLES = {
    "meta": ("name, NULL, body, NULL", "1"),
    "session": ("number, NULL, body, NULL", "number"),
    "sent": ("request, session, key, NULL", "request"),
    "answer": ("request, at, body, NULL", "request"),
    "decision": ("request, position, body, reason", "request"),
    "vector": ("request, position, body, NULL", "request"),
    "embedding": ("key, NULL, body, NULL", "rowid"),
}


def scan(
    connection: sqlite3.Connection,
    checksum: Checksum,
    table: str,
    first: int = 0,
    end: int = 2**62,
) -> Iterator[Row]:
    """Rows of ``table`` from request (or number) ``first`` to before ``end``, in order.

    Raises sqlite3.DatabaseError where the file is damaged.
    """
    columns, walked = TABLES[table]
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone():
        return  # a store of a lower format
    for one, other, body, reason, sum_ in connection.execute(
        f"SELECT {columns}, sum FROM {table} WHERE {walked} >= ? AND {walked} < ? ORDER BY 1, 2",
        (first, end),
    ):
        key = (one,) if other is None else (one, other)
        yield Row(key, body, reason, checksum.holds(table, key, body, sum_))
