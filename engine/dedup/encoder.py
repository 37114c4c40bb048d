"""Texts to vectors: a sentence-transformers model, on ONNX Runtime where that changes nothing, or
with products of bfloat16 where that is asked for.

The embedding takes ten times as long as everything else that decides on near-duplicates. For BERT
models with mean pooling (all-MiniLM-L6-v2, the default, is one) ``bert_onnx`` writes the network
down with ONNX Runtime's fused operators. The result is compared with sentence-transformers' own
each time a model is loaded, and is used only when they agree; any other model is run by
sentence-transformers itself. The price: both are loaded at the start, some seconds more.

In float32 either is near what the cores can compute. Processors with AMX multiply bfloat16 many
times as fast, and PyTorch's autocast then keeps sums, norms and what passes from layer to layer in
float32: the cosine to the float32 vector stays above 0.9999. (Eight-bit weights move a cosine by up
to 0.06.) But the kernels that PyTorch chooses, and with them the last bits of each product, depend
on the shape of the batch, so a text by itself is always embedded in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from engine import models
from engine.errors import ConfigError, UnavailableError
from engine.pretrained import open_embedding

__all__ = [
    "MULTILINGUAL",
    "Encoder",
    "Foresees",
    "Precision",
    "SelectiveEncoder",
    "SentenceEncoder",
    "default_model",
    "readable",
]

log = logging.getLogger(__name__)

Precision = Literal["float32", "bfloat16"]
BATCH = {"float32": 16, "bfloat16": 32}
"""Texts of like length at once. More are no faster on a CPU, and pad more."""
GPU_BATCH = 256
CPU = "cpu"
MOST_UNKNOWN = 0.1
"""Share of a text's tokens, or of its characters, that the model may not know. Unknown ones all
have the same embedding: beyond, texts without anything in common would look alike."""
MULTILINGUAL = "intfloat/multilingual-e5-small or BAAI/bge-m3"
"""Models that read nearly every script, as an example for the person."""
AGREEMENT = 0.9999
"""The least cosine between two runtimes' vectors of one text."""

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


_Runtime = Callable[[list[str]], NDArray[np.float32]]


class Encoder(Protocol):
    """Turns texts into vectors of unit length."""

    @property
    def dimension(self) -> int: ...

    @property
    def precision(self) -> Precision:
        """Of vectors made in a batch; that of a text by itself is float32."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of unit length, (N, D), in the order of the texts."""


@runtime_checkable
class SelectiveEncoder(Encoder, Protocol):
    """An encoder that knows which texts it cannot read."""

    def readable(self, texts: Sequence[str]) -> Sequence[bool]:
        """Whether the model knows enough of each text to compare its meaning."""


@runtime_checkable
class Foresees(Encoder, Protocol):
    """An encoder that can begin before its vectors are needed."""

    def foresee(self, texts: Sequence[str]) -> None:
        """``encode`` will probably be asked for these."""


class SentenceEncoder:
    """A sentence-transformers model.

    Args:
        model: a hub id or a folder; by default all-MiniLM-L6-v2.
        threads: CPU threads for one batch; None leaves it to the runtime, and is one in bfloat16,
            where two on a batch cost half as much CPU again.
        precision: ``bfloat16`` is faster on processors with AMX.
        gpu: use a GPU of this machine where PyTorch sees one that has room.

    Raises ConfigError where the model or sentence-transformers is not there, and where vectors of
    bfloat16 would differ from those of float32.
    """

    def __init__(
        self,
        model: str | None = None,
        threads: int | None = None,
        precision: Precision = "float32",
        *,
        gpu: bool = False,
    ) -> None:
        self.model = models.locate(model) if model else default_model()
        self.precision: Precision = "float32"
        self._batch = BATCH["float32"]
        self.runtime = "sentence-transformers"
        self._encode: _Runtime
        network, device, sample = self._opened(_gpu() if gpu else None)
        self.dimension = int(sample.shape[1])
        if device != CPU:
            self._batch = GPU_BATCH
        else:
            self._use_onnx(network, threads, sample)
        self._encode_alone = self._encode
        if precision == "bfloat16":
            self.precision = precision
            self._batch = GPU_BATCH if device != CPU else BATCH[precision]
            self._encode = _in_bfloat16(network, device, threads or 1)
            cosine = _least_cosine(self.encode(_SAMPLE), sample)
            if cosine < AGREEMENT:
                raise ConfigError(
                    f"{self.model}: bfloat16 moves its vectors too far (cosine {cosine:.5f}); "
                    "leave --semantic-precision at float32"
                )

    def _opened(self, gpu: str | None) -> tuple[Any, str, NDArray[np.float32]]:
        """The network, where it is, and what it makes of the sample; on the CPU where the GPU has
        no room.
        """
        if gpu is not None:
            try:
                return self._opened_on(gpu)
            except (ConfigError, RuntimeError) as exc:
                log.warning("%s: not on the GPU, but on the CPU (%s)", self.model, exc)
        return self._opened_on(CPU)

    def _opened_on(self, device: str) -> tuple[Any, str, NDArray[np.float32]]:
        network = _load(self.model, device)
        self._unknown_shares = _unknown_shares(network)
        self._encode = _by_sentence_transformers(network)
        self._encode_alone = self._encode
        return network, device, self.encode(_SAMPLE)

    def _use_onnx(self, network: Any, threads: int | None, sample: NDArray[np.float32]) -> None:
        """Take ONNX Runtime where it gives what ``sample`` has."""
        try:
            from engine.dedup.bert_onnx import BertRuntime

            fast = BertRuntime(network, threads)
        except (ImportError, ValueError) as exc:
            log.info("%s: no ONNX Runtime (%s)", self.model, exc)
            return
        slow, self._encode = self._encode, fast
        cosine = _least_cosine(self.encode(_SAMPLE), sample)
        if cosine < AGREEMENT:
            self._encode = slow
            log.warning("%s: ONNX Runtime is off (least cosine %.5f), not used", self.model, cosine)
        else:
            self.runtime = "onnxruntime"

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of unit length, (N, D); a text without any tokens of its own has one too."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        size = self._batch
        encode = self._encode_alone if len(texts) == 1 else self._encode
        batches = [
            encode([texts[i] for i in order[start : start + size]])
            for start in range(0, len(order), size)
        ]
        if not batches:
            return np.empty((0, self.dimension), np.float32)
        vectors = np.concatenate(batches)
        result = np.empty_like(vectors)
        result[order] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return result

    def readable(self, texts: Sequence[str]) -> list[bool]:
        """Whether at most ``MOST_UNKNOWN`` of each text is unknown to the model's tokenizer."""
        return [share <= MOST_UNKNOWN for share in self._unknown_shares(texts)]


def readable(encoder: Encoder, texts: Sequence[str]) -> Sequence[bool]:
    """Whether ``encoder`` can read each of the texts; one that does not say reads them all."""
    if isinstance(encoder, SelectiveEncoder) and texts:
        return encoder.readable(texts)
    return [True] * len(texts)


def _unknown_shares(network: Any) -> Callable[[Sequence[str]], list[float]]:
    """Says of each text what share of its tokens, or of its characters if that is more, the
    network's tokenizer does not know: a whole sentence in an unknown script may be one unknown
    token.
    """
    tokenizer: Any = getattr(network, "tokenizer", None)
    fast: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
    unknown = getattr(tokenizer, "unk_token", None) or getattr(
        getattr(fast, "model", None), "unk_token", None
    )
    if unknown is None:  # it spells out by bytes what it does not know
        return lambda texts: [0.0] * len(texts)
    if not hasattr(fast, "encode_batch"):  # one written in Python

        def share_of_tokens(text: str) -> float:
            tokens: list[str] = fast.tokenize(text)
            return tokens.count(unknown) / max(1, len(tokens))

        return lambda texts: [share_of_tokens(text) for text in texts]
    number = fast.token_to_id(unknown)

    def shares(texts: Sequence[str]) -> list[float]:
        encoded = fast.encode_batch(list(texts), add_special_tokens=False)
        return [_unknown_share(text, e, number) for text, e in zip(texts, encoded, strict=True)]

    return shares


def _unknown_share(text: str, encoding: Any, unknown: int) -> float:
    """Of one text, as the tokenizer has encoded it; padding is no token of it."""
    missing = [place for place, number in enumerate(encoding.ids) if number == unknown]
    if not missing:
        return 0.0
    characters = [_visible(text[start:end]) for start, end in encoding.offsets]
    of_characters = sum(characters[place] for place in missing) / max(1, sum(characters))
    return max(float(len(missing) / sum(encoding.attention_mask)), of_characters)


def _visible(text: str) -> int:
    return sum(not letter.isspace() for letter in text)


def default_model() -> str:
    """The folder of all-MiniLM-L6-v2, which is downloaded where it is not here yet.

    Raises as ``models.fetch`` does.
    """
    try:
        return str(models.fetch("minilm"))
    except UnavailableError as error:
        raise UnavailableError(f"{error}, or do not compare by meaning (--no-semantic)") from error


def _gpu() -> str | None:
    """PyTorch's name of a GPU here; None: there is none."""
    try:
        import torch
    except ImportError:
        return None
    return "cuda" if torch.cuda.is_available() else None


def _load(model: str, device: str = CPU) -> Any:
    try:
        import sentence_transformers  # noqa: F401 - asked for here, so that its lack has a name
        from transformers.utils import logging as transformers_logging
    except ImportError as exc:
        raise ConfigError(
            "comparing by meaning needs sentence-transformers: pip install 'woolmill[local]', "
            "or leave it out"
        ) from exc
    quiet: Any = transformers_logging
    quiet.disable_progress_bar()
    try:
        return open_embedding(model, device)
    except ConfigError:
        raise
    except Exception as exc:  # whatever a folder that is no such model brings about
        first = str(exc).strip().splitlines()
        raise ConfigError(
            f"cannot load the embedding model {model}: {first[0] if first else exc!r}"
        ) from exc


def _by_sentence_transformers(network: Any) -> _Runtime:
    def encode(texts: list[str]) -> NDArray[np.float32]:
        vectors = network.encode(texts, batch_size=len(texts), show_progress_bar=False)
        return np.asarray(vectors, np.float32)

    return encode


def _in_bfloat16(network: Any, device: str, threads: int) -> _Runtime:
    """A copy of the network, with the weights of its products in bfloat16."""
    import torch

    network = deepcopy(network)
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.bfloat16()
    encode = _by_sentence_transformers(network)

    def encode_in_bfloat16(texts: list[str]) -> NDArray[np.float32]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.autocast(device, torch.bfloat16):
                return encode(texts)
        finally:
            torch.set_num_threads(before)

    return encode_in_bfloat16


def _least_cosine(some: NDArray[np.float32], others: NDArray[np.float32]) -> float:
    return float((some * others).sum(axis=1).min())
