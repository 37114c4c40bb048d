"""A run's vectors of other machines, for the process that decides.

It only reads the store. What has come since is handed over with the decisions that may rest on it
and committed in the same transaction; until it is seen there, it is held in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from engine.embeddings.kept import Half
from engine.store import RunReader

__all__ = ["StoredVectors"]


class StoredVectors:
    """An ``engine.embeddings.kept.Kept``."""

    def __init__(self, store: RunReader) -> None:
        self._store = store
        self._held: dict[bytes, Half] = {}
        """All that may not be in the store yet."""
        self._fresh: list[bytes] = []
        """Of these, what is not handed over yet."""
        self._under_way: deque[list[bytes]] = deque()
        """And the rest, as it was handed over."""

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Half]:
        found = {key: self._held[key] for key in keys if key in self._held}
        if rest := [key for key in keys if key not in found]:
            stored = self._store.embeddings(rest)
            found |= {key: np.frombuffer(body, "<f2") for key, body in stored.items()}
        return found

    def put(self, vectors: Mapping[bytes, Half]) -> None:
        there = self.get(list(vectors))
        new = {key: vector for key, vector in vectors.items() if key not in there}
        self._held |= new
        self._fresh += new

    def handed_over(self, most: int) -> list[tuple[bytes, bytes]]:
        """Up to ``most`` that the store does not have, as it keeps them; empty: it will have them
        all.
        """
        # What is handed over together is committed together, and in order.
        while self._under_way and self._store.embeddings(self._under_way[0][-1:]):
            for key in self._under_way.popleft():
                del self._held[key]
        some, self._fresh = self._fresh[:most], self._fresh[most:]
        if some:
            self._under_way.append(some)
        return [(key, self._held[key].astype("<f2").tobytes()) for key in some]
