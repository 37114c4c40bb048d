"""Embeddings of an OpenAI-shaped server (``/v1/embeddings``), as vLLM and most hosts have them.

A call carries a batch of texts and comes to their vectors. To the limiter and to whatever tries
again it is one prompt with one completion like any other, so limits, pauses, breakers and retries
are those of answers. Strict about what counts as an answer: a vector for each text, in an order
that is known, all of one dimension, all numbers, none of them zero throughout.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Failure, Verdict
from engine.backends.openai.backend import HttpBackend
from engine.backends.openai.error_body import as_json, clean
from engine.backends.openai.verdicts import classify
from engine.errors import ConfigError
from engine.records import Completion, Prompt, Sampling, Usage

__all__ = ["EmbeddingBackend", "Texts", "Vectors", "texts_of"]

MOST_DIMENSIONS = 65_536
"""Numbers of one vector; models have 256 to 8,192."""
TOO_MANY = re.compile(
    r"batch.?size|number of (?:inputs?|texts)|too many inputs?|inputs? (?:array|list)"
    r"|input\.contents|maximum allowed batch",
    re.I,
)
"""How hosts say that they take fewer texts at once: DashScope takes 10."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts(Prompt):
    """Texts to embed in one call."""

    texts: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        return sum(len(text.encode(errors="replace")) for text in self.texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors(Completion):
    """The embeddings of ``Texts``, in their order."""

    rows: NDArray[np.float32] = field(hash=False, compare=False)
    """(N, D), of unit length."""


_NOTHING_WRITTEN = Sampling(max_tokens=1)


def texts_of(index: int, texts: Sequence[str]) -> Texts:
    """Call ``index`` for ``texts``."""
    return Texts(index=index, api="completions", sampling=_NOTHING_WRITTEN, texts=tuple(texts))


class EmbeddingBackend(HttpBackend):
    """One endpoint for embeddings; arguments are those of ``HttpBackend``.

    Attributes:
        dimension: of all vectors; None until the first have come.
        most_texts: what the host has shown to take at once.
    """

    MODEL_FLAG = "--semantic-model"
    dimension: int | None = None
    most_texts = 1_000_000
    _has_embedded = False

    async def _generate(self, prompts: Sequence[Prompt]) -> list[Completion | BaseException]:
        (asked,) = prompts
        assert isinstance(asked, Texts)
        body: dict[str, Any] = {
            "model": self.model,
            "input": [_plain(text) for text in asked.texts],
            "encoding_format": "float",
        }
        if self.is_vllm:
            body["truncate_prompt_tokens"] = -1  # as sentence-transformers does; others refuse it
        try:
            data = await self._json(
                "POST", self._address.at("/embeddings"), body, "generate", self._timeouts.total_s
            )
        except Failure as failure:
            raise Failure(self._heeded(failure.verdict, asked)) from failure.__cause__
        return [self._vectors(data, asked)]

    def _heeded(self, verdict: Verdict, asked: Texts) -> Verdict:
        """A refusal of what was asked. Once the host has embedded anything it is about these texts:
        as good as dead, and not worth another try as it is.
        """
        if len(asked.texts) > 1 and TOO_MANY.search(verdict.message):
            self.most_texts = min(self.most_texts, max(1, len(asked.texts) // 2))
        if self._has_embedded and verdict.reason in ("http_400", "http_422"):
            return replace(verdict, kind="dead", error=None)
        return verdict

    def _vectors(self, data: Any, asked: Texts) -> Vectors:
        """What an answer of status 200 holds. Raises Failure."""
        found = data.get("data") if isinstance(data, dict) else data
        if not isinstance(found, list):
            if isinstance(data, dict) and (data.get("error") or data.get("errors")):
                raise Failure(classify(status=200, body=as_json(data), where=self.name))
            raise _no_vectors(f"{self.name}: an answer without vectors; does it serve embeddings?")
        count = len(asked.texts)
        if len(found) != count:
            raise _no_vectors(f"{self.name}: {len(found)} vectors for {count} texts")
        items = [item if isinstance(item, dict) else {} for item in found]
        places: list[Any] = [item.get("index") for item in items]
        if all(place is None for place in places):
            places = list(range(count))  # the host leaves it out, and keeps the order
        if sorted(places, key=str) != sorted(range(count), key=str):
            raise _no_vectors(f"{self.name}: vectors that do not say which texts they are of")
        in_order = sorted(zip(places, items, strict=True), key=lambda pair: int(pair[0]))
        rows = [self._vector(item.get("embedding")) for _, item in in_order]
        self._check_dimension(rows)
        usage = data.get("usage") if isinstance(data, dict) else None
        used = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        tokens = used if isinstance(used, int) and 0 <= used < 2**40 else asked.size_bytes // 4
        return Vectors(
            text="",
            finish_reason="stop",
            usage=Usage(prompt_tokens=tokens, completion_tokens=0, estimated=used is None),
            rows=np.asarray(rows, np.float32),
        )

    def _vector(self, given: Any) -> NDArray[np.float64]:
        """One vector, of unit length: a list of numbers, or base64 of float32 although that was not
        asked for.
        """
        try:
            if isinstance(given, str):
                raw = base64.b64decode(given, validate=True)
                vector = np.frombuffer(raw, "<f4").astype(np.float64)
            else:
                vector = np.asarray(given if isinstance(given, list) else (), np.float64)
        except (ValueError, TypeError) as exc:
            raise _no_vectors(f"{self.name}: a vector that is none ({clean(str(exc))})") from exc
        if vector.ndim != 1 or not 0 < len(vector) <= MOST_DIMENSIONS:
            raise _no_vectors(f"{self.name}: a vector of shape {vector.shape}")
        if not np.isfinite(vector).all():
            raise _no_vectors(f"{self.name}: a vector with NaN or infinity in it")
        largest = np.abs(vector).max()
        if not largest:
            raise _no_vectors(f"{self.name}: a vector of zeros")
        vector = vector / largest  # or squares of very large or small numbers are infinity or 0
        return np.asarray(vector / np.linalg.norm(vector), np.float64)

    def _check_dimension(self, rows: Sequence[NDArray[np.float64]]) -> None:
        known = self.dimension or len(rows[0])
        other = next((len(row) for row in rows if len(row) != known), None)
        if other is not None:
            error = ConfigError(
                f"{self.name}: gives vectors of {other} numbers, and gave {known} before; serve "
                f"the model again that the run began with, or decide anew in another run"
            )
            raise Failure(
                Verdict(kind="fatal", reason="dimension", message=str(error), error=error)
            )
        self.dimension, self._has_embedded = known, True


def _plain(text: str) -> str:
    """``text`` as UTF-8 can say it: half of a surrogate pair it cannot."""
    return text.encode("utf-8", "replace").decode()


def _no_vectors(message: str) -> Failure:
    """The same would come again of the same texts: they are asked for one by one instead."""
    return Failure(Verdict(kind="dead", reason="no_vectors", message=message))
