"""Near-duplicates by meaning: the cosine of sentence embeddings, for a million vectors and more.

Vectors lie in full precision in a file of the index's own, so that memory holds 56 bytes for each
instead of 1,536. While there are few, FAISS compares with all of them; from then on its lists of
sign codes (``codes.py``) name the candidates. Either way a cosine is computed from the full vectors
before anything is decided: the index may miss a few duplicates in a thousand, but never invents
one.

The file is not a store. It has no name from the moment it is opened, and the index is made again
from the vectors that the run keeps.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.dedup.encoder import Encoder, SentenceEncoder
from engine.dedup.rouge import Hit
from engine.errors import DiskError

if TYPE_CHECKING:
    from engine.dedup.codes import SignLists

__all__ = ["Encoder", "SemanticIndex", "SentenceEncoder"]

LISTS = 4_096
"""Up to here FAISS compares with all vectors, in a third of a millisecond; then they are the
centres."""
AT_ONCE = 16
"""Vectors that ``find`` reads together."""
ROWS_MAPPED = 65_536
"""Vectors by which the mapped file grows at a time, 96 MiB at 384 dimensions. What is not written
yet takes no disk."""


class SemanticIndex:
    """Vectors so far, searched for one with a cosine to another above ``threshold``.

    >>> index = SemanticIndex(dimension=3, threshold=0.9)
    >>> index.add([1.0, 0.0, 0.0])
    0
    >>> index.find([2.0, 0.5, 0.0])
    Hit(item=0, score=0.9701425001453319)

    Args:
        dimension: D, of all vectors.
        threshold: in (0, 1].
        directory: where the file with the vectors is made, 4 * D bytes for each; by default the
            system's folder for temporary files.

    Raises ValueError for a vector that cannot be compared (``problem`` says why), and DiskError
    where the file cannot be written. Vectors need not have unit length.
    """

    def __init__(
        self, dimension: int, threshold: float = 0.9, directory: Path | None = None
    ) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"a semantic threshold lies in (0, 1], not at {threshold}")
        import faiss

        # One vector is one thread's work: with more, OpenMP wakes the others for each, and waits
        # for them where the machine is busy. The setting is the calling thread's, and FAISS's own.
        self._in_this_thread = partial(faiss.omp_set_num_threads, 1)
        self.dimension = dimension
        self.threshold = float(threshold)
        self._rows = _Rows(dimension, directory)
        self._flat = faiss.IndexFlatIP(dimension)
        self._lists: SignLists | None = None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use; the file comes on top."""
        flat = int(self._flat.ntotal) * 4 * self.dimension
        return flat if self._lists is None else self._lists.nbytes

    def problem(self, vector: ArrayLike) -> str | None:
        """Why a vector cannot be compared, or None: wrong dimension, NaN, infinity, length zero."""
        v = np.asarray(vector, np.float64)
        if v.shape != (self.dimension,):
            return f"the vector has shape {v.shape}, not ({self.dimension},)"
        if not np.isfinite(v).all():
            return "the vector holds NaN or infinity"
        if not v.any():
            return "the vector is zero"
        return None

    def find(self, vector: ArrayLike) -> Hit | None:
        """An item with a cosine above the threshold, or None; mostly the one with the highest.

        The likeliest are read first, and no more once one of them is above. The same vectors added
        in the same order give the same answer.
        """
        v = self._unit(vector)
        items = self._candidates(v, self.threshold)
        for start in range(0, len(items), AT_ONCE):
            hits = self._confirm(v, items[start : start + AT_ONCE], self.threshold)
            if hits:
                return hits[0]
        return None

    def above(self, vector: ArrayLike, floor: float) -> list[Hit]:
        """All items with a cosine above ``floor``, best first (ties: the earliest)."""
        v = self._unit(vector)
        return self._confirm(v, self._candidates(v, floor), floor)

    def add(self, vector: ArrayLike) -> int:
        """Add one vector; returns its id, counted from 0."""
        v = self._unit(vector)
        self._in_this_thread()
        item = len(self)
        self._rows.append(v[None])
        if self._lists is not None:
            self._lists.add(v[None])
            return item
        self._flat.add(v[None])
        if len(self) == LISTS:
            from engine.dedup.codes import SignLists

            self._lists = SignLists(self._rows[np.arange(LISTS)])
            self._flat.reset()
        return item

    def extend(self, vectors: NDArray[np.generic]) -> None:
        """``add`` each of (N, D), at half the price."""
        alone = max(0, min(len(vectors), LISTS - len(self)))
        for vector in vectors[:alone]:
            self.add(vector)
        if alone == len(vectors):
            return
        assert self._lists is not None
        rest = np.asarray(vectors[alone:], np.float64)
        sound = rest.shape[1:] == (self.dimension,) and np.isfinite(rest).all()
        if not sound or not rest.any(axis=1).all():
            raise ValueError(next(filter(None, map(self.problem, rest))))
        units = _units(rest)
        self._in_this_thread()
        self._rows.append(units)
        self._lists.add(units)

    def _candidates(self, v: NDArray[np.float32], floor: float) -> NDArray[np.int64]:
        """Items that may be above, the likeliest first."""
        self._in_this_thread()
        if self._lists is not None:
            return self._lists.candidates(v, floor)
        # FAISS sums in float32, so it is asked for a little more.
        _, cosines, items = self._flat.range_search(v[None], floor - 1e-5)
        return np.asarray(items[np.lexsort((items, -cosines))], np.int64)

    def _confirm(self, v: NDArray[np.float32], items: NDArray[np.int64], floor: float) -> list[Hit]:
        cosines = self._rows[items].astype(np.float64) @ v.astype(np.float64)
        hits = [
            Hit(item, cosine)
            for item, cosine in zip(items.tolist(), cosines.tolist(), strict=True)
            if cosine > floor
        ]
        return sorted(hits, key=lambda hit: (-hit.score, hit.item))

    def _unit(self, vector: ArrayLike) -> NDArray[np.float32]:
        problem = self.problem(vector)
        if problem is not None:
            raise ValueError(problem)
        (unit,) = _units(np.asarray(vector, np.float64)[None])
        return np.asarray(unit)


def _units(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    """Of unit length (N, D); each the same bits, whatever others are beside it."""
    # Or the squares of very large or small components are inf or 0.
    v = vectors / np.abs(vectors).max(axis=1, keepdims=True)
    norms = np.sqrt([row @ row for row in v])
    return np.asarray(v / norms[:, None], np.float32)


class _Rows:
    """Vectors in a file without a name, read through a memory map.

    They are written with ``pwrite``: through the map, a full disk would be a signal that ends the
    process.
    """

    def __init__(self, dimension: int, directory: Path | None) -> None:
        self._row_bytes = 4 * dimension
        self._dimension = dimension
        try:
            self._file = tempfile.TemporaryFile(dir=directory)
        except OSError as exc:
            raise DiskError(f"cannot make a file for the embeddings: {exc}") from exc
        weakref.finalize(self, self._file.close)
        self._mapped = np.empty((0, dimension), np.float32)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, items: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows (N, D), copied."""
        return self._mapped[items]

    def append(self, rows: NDArray[np.float32]) -> None:
        """Rows (N, D)."""
        size = self._size + len(rows)
        try:
            if size > len(self._mapped):
                self._map(-(-size // ROWS_MAPPED) * ROWS_MAPPED)
            written = os.pwrite(self._file.fileno(), rows.tobytes(), self._size * self._row_bytes)
        except OSError as exc:
            raise DiskError(f"cannot write the embeddings: {exc}") from exc
        if written != len(rows) * self._row_bytes:
            raise DiskError("cannot write the embeddings: the disk is full")
        self._size = size

    def _map(self, rows: int) -> None:
        nbytes = rows * self._row_bytes
        os.truncate(self._file.fileno(), nbytes)
        pages = mmap.mmap(self._file.fileno(), nbytes, access=mmap.ACCESS_READ)
        self._mapped = np.frombuffer(pages, np.float32).reshape(rows, self._dimension)
