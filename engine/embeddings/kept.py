"""Where vectors are kept, so that each text has one and the same however often it is asked for.

A server may give a text another vector the next time, by the shape of its batches or as another
machine took its place. What decides is therefore the first that came.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["KEY_BYTES", "Half", "Kept", "TemporaryVectors", "chunks", "key_of"]

Item = TypeVar("Item")
Half = NDArray[np.float16]
"""A vector (D,) as it is kept. Rounding moves a cosine by some 1e-5, and what is rounded is what
decides from the first time on."""
KEY_BYTES = 16
AT_ONCE = 500
"""Keys in one statement; SQLite takes 32,766 and old ones 999."""


def key_of(model: str, text: str) -> bytes:
    """What a vector is kept under: a hash of the model's name and the text."""
    hashed = blake2b(model.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES)
    hashed.update(b"\0")
    hashed.update(text.encode("utf-8", "surrogatepass"))
    return hashed.digest()


class Kept(Protocol):
    """Vectors by ``key_of``; used by one thread."""

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Half]:
        """Those that are there."""

    def put(self, vectors: Mapping[bytes, Half]) -> None:
        """Keep these; one that is there already stays."""


class TemporaryVectors:
    """Kept in a file without a name, for as long as this object lives."""

    def __init__(self) -> None:
        self._connection = sqlite3.connect("", isolation_level=None)
        self._connection.execute("CREATE TABLE embedding (key BLOB PRIMARY KEY, body BLOB)")

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Half]:
        found: dict[bytes, Half] = {}
        for some in chunks(keys, AT_ONCE):
            marks = ",".join("?" * len(some))
            found |= {
                key: np.frombuffer(body, np.float16)
                for key, body in self._connection.execute(
                    f"SELECT key, body FROM embedding WHERE key IN ({marks})", some
                )
            }
        return found

    def put(self, vectors: Mapping[bytes, Half]) -> None:
        self._connection.execute("BEGIN")
        self._connection.executemany(
            "INSERT OR IGNORE INTO embedding VALUES (?, ?)",
            ((key, vector.tobytes()) for key, vector in vectors.items()),
        )
        self._connection.execute("COMMIT")


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """``items`` in order, ``size`` at a time."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some
