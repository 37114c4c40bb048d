"""Sign codes in lists: which vectors may be close to another, without looking at the vectors.

A vector is reduced to the signs of its components. The share of signs in which two vectors differ
tells their angle (Charikar 2002), so vectors of a high cosine differ in few bits, and a bit count
decides on each without its 1.5 kB being read. FAISS keeps the codes in lists by the nearest of the
first vectors' codes, and reads only the lists nearest to a query. Taking data for centres needs no
training, so the index grows without a pause.

What this passes is a candidate, never a decision; and it misses a few in a thousand.
"""

from __future__ import annotations

import math

import faiss
import numpy as np
from numpy.typing import NDArray

__all__ = ["SignLists"]

PROBES = 128
"""Lists that are read for a query, of 4,096: half as many miss three times as much."""
DEVIATIONS = 3.6
"""Standard deviations beyond the expected number of different signs: 9,998 of 10,000 lie within."""


class SignLists:
    """Codes of vectors, searched for those that may have a cosine above a floor.

    Args:
        vectors: the first items (N, D), which also become the centres of N lists.
    """

    def __init__(self, vectors: NDArray[np.float32]) -> None:
        self._dimension = vectors.shape[1]
        codes = _codes(vectors)
        bits = 8 * codes.shape[1]
        self._centres = faiss.IndexBinaryFlat(bits)
        self._centres.add(codes)
        self._lists = faiss.IndexBinaryIVF(self._centres, bits, len(vectors))
        self._lists.is_trained = True
        self._lists.nprobe = PROBES
        self._lists.add(codes)

    @property
    def nbytes(self) -> int:
        """Bytes in use: a code and a number for each item, and the centres' codes."""
        items, centres = int(self._lists.ntotal), int(self._centres.ntotal)
        return (items + centres) * self._lists.code_size + 8 * items

    def add(self, vectors: NDArray[np.float32]) -> None:
        """Put the codes of vectors (N, D) into the lists of their nearest centres, as the next
        items.
        """
        self._lists.add(_codes(vectors))

    def candidates(self, vector: NDArray[np.float32], floor: float) -> NDArray[np.int64]:
        """Items that may have a cosine above ``floor`` to the vector (D,), the likeliest first."""
        radius = _radius(self._dimension, math.acos(max(-1.0, min(1.0, floor))) / math.pi)
        # FAISS takes what is below a radius.
        _, distances, items = self._lists.range_search(_codes(vector[None]), radius + 1)
        return np.asarray(items[np.lexsort((items, distances))], np.int64)


def _radius(bits: int, share: float) -> int:
    """How many of so many bits may differ, when each does with the probability ``share``.

    Binomial, as if the components were independent.
    """
    return math.ceil(bits * share + DEVIATIONS * math.sqrt(bits * share * (1 - share)))


def _codes(vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Signs of the components, (N, D), eight to a byte: (N, ceil(D / 8))."""
    return np.packbits(vectors > 0, axis=1, bitorder="little")
