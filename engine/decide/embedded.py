"""A run's vectors of other machines, for the process that decides.

It only reads the store. What has come since is handed over with the decisions that may rest on it
and committed in the same transaction; until it is seen there, it is held in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np

from engine.embeddings.kept import Half
from engine.store import RunReader

__all__ = ["StoredVectors"]


class StoredVectors:
    """An ``engine.embeddings.kept.Kept``."""

    def __init__(self, store: RunReader) -> None:
        self._store = store
        self._fresh: dict[bytes, Half] = {}
        """Not handed over yet, in the order in which they came."""
        self._under_way: dict[bytes, Half] = {}
        """Handed over, and perhaps not committed yet."""

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Half]:
        found, rest = {}, []
        for key in keys:
            vector = self._fresh.get(key)
            vector = self._under_way.get(key) if vector is None else vector
            if vector is None:
                rest.append(key)
            else:
                found[key] = vector
        if rest:
            stored = self._store.embeddings(rest)
            found |= {key: np.frombuffer(body, "<f2") for key, body in stored.items()}
        return found

    def put(self, vectors: Mapping[bytes, Half]) -> None:
        there = self.get(list(vectors))
        self._fresh |= {key: vector for key, vector in vectors.items() if key not in there}

    def handed_over(self, most: int) -> list[tuple[bytes, bytes]]:
        """Up to ``most`` that the store does not have, as it keeps them; empty: it has them all."""
        for key in self._store.embeddings(list(self._under_way)):
            del self._under_way[key]
        some = dict(islice(self._fresh.items(), most))
        for key in some:
            del self._fresh[key]
        self._under_way |= some
        return [(key, vector.astype("<f2").tobytes()) for key, vector in some.items()]
