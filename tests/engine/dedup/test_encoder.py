"""The embedding: a real model on both runtimes."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.dedup import Candidate, Cascade, SentenceEncoder, encoder
from engine.dedup.encoder import default_model
from engine.errors import ConfigError

pytestmark = pytest.mark.slow

TEXTS = [
    "Write a poem about the sea.",
    "写一首关于大海的诗",
    "",
    "Compose a poem on the ocean",
    "word " * 400,
    "Explain photosynthesis",
    "Explain what photosynthesis is",
]


@pytest.fixture(scope="module")
def network() -> Any:
    """The real all-MiniLM-L6-v2 (384 dimensions), as sentence-transformers loads it."""
    return encoder._load(default_model())


@pytest.fixture
def minilm(network: Any, monkeypatch: pytest.MonkeyPatch) -> SentenceEncoder:
    """Our encoder of it; the network is read from disk only once for all tests."""
    monkeypatch.setattr(encoder, "_load", lambda _model, _device: network)
    return SentenceEncoder(threads=1)


@pytest.mark.slow
def test_onnx_runtime_gives_the_vectors_of_sentence_transformers(
    network: Any, minilm: SentenceEncoder
) -> None:
    """Also for an empty text, other scripts, and a text longer than the model reads."""
    expected = network.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    vectors = minilm.encode(TEXTS)
    assert minilm.runtime == "onnxruntime"
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), minilm.dimension)
    assert (vectors * expected).sum(axis=1).min() >= encoder.AGREEMENT
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    assert minilm.encode([]).shape == (0, 384)


@pytest.mark.slow
def test_cascade_decides_alike_for_any_batches_and_threads(minilm: SentenceEncoder) -> None:
    """With the real network, whose last bits depend on both."""
    verbs = ("Write", "Compose", "Draft", "Create")
    things = ("a poem about the sea", "an email to a friend", "a story of two dogs", "some advice")
    meanings = (
        "Explain photosynthesis",
        "Explain what photosynthesis is",
        "Tell me a joke, please",
    )
    texts = [f"{verb} {thing}{end}" for thing in things for verb in verbs for end in (" now", "!")]
    texts += meanings
    candidates = [Candidate(text=t, source=f"row:{i}.0") for i, t in enumerate(texts)]
    outcomes = []
    for size, network in ((1, minilm), (5, SentenceEncoder(threads=2)), (32, minilm)):
        cascade = Cascade(0.7, 0.9, network)
        judged = [
            judgement
            for start in range(0, len(texts), size)
            for judgement in cascade.judge(candidates[start : start + size])
        ]
        outcomes.append([(j.reason, j.nearest, j.most_similar, j.mean_similarity) for j in judged])
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert {"duplicate_rouge", "duplicate_semantic", None} == {o[0] for o in outcomes[0]}


@pytest.mark.slow
def test_bfloat16_stays_close_and_decides_on_float32(minilm: SentenceEncoder) -> None:
    """Batches are within the promised cosine; a text by itself has the vector of float32."""
    halved = SentenceEncoder(threads=1, precision="bfloat16")
    exact, close = minilm.encode(TEXTS), halved.encode(TEXTS)
    cosines = (exact * close).sum(axis=1)
    assert encoder.AGREEMENT <= cosines.min()
    assert cosines.max() < 1 - 1e-7
    for text in TEXTS:
        assert np.array_equal(halved.encode([text]), minilm.encode([text]))
    plan = [Candidate(text=text, source="") for text in TEXTS]
    outcomes = [
        [(j.reason, j.nearest) for j in Cascade(None, 0.9, network).judge(plan)]
        for network in (minilm, halved)
    ]
    assert outcomes[0] == outcomes[1]
    assert "duplicate_semantic" in {reason for reason, _ in outcomes[0]}


@pytest.mark.slow
def test_a_model_that_bfloat16_moves_too_far_is_refused(
    minilm: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot keep the promise is a line that says what to do, not other decisions."""
    monkeypatch.setattr(encoder, "AGREEMENT", 0.999999)
    with pytest.raises(ConfigError, match="--semantic-precision"):
        SentenceEncoder(threads=1, precision="bfloat16")


@pytest.mark.slow
def test_a_runtime_that_is_off_is_not_used(
    minilm: SentenceEncoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Were a weight read wrongly, the verification at load would notice, say so, and fall back."""
    from engine.dedup import bert_onnx

    graph: Any = bert_onnx._graph

    def damaged(weights: Any, config: Any) -> Any:
        name = "encoder.layer.0.output.dense.weight"
        return graph(weights | {name: np.roll(weights[name], 1, axis=0)}, config)

    monkeypatch.setattr(bert_onnx, "_graph", damaged)
    with caplog.at_level(logging.WARNING):
        fallback = SentenceEncoder()
    assert (minilm.runtime, fallback.runtime) == ("onnxruntime", "sentence-transformers")
    assert "ONNX Runtime is off" in caplog.text
    near, far = fallback.encode(TEXTS[:1] + TEXTS[3:4]) @ fallback.encode([TEXTS[0], TEXTS[5]]).T
    assert near[0] > far[0] > far[1]


@pytest.mark.slow
def test_a_gpu_without_room_leaves_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that PyTorch names and cannot use; nobody asks for it where it must stay free."""
    monkeypatch.setattr(encoder, "_gpu", lambda: "cuda:99")
    with caplog.at_level(logging.WARNING):
        made = SentenceEncoder(gpu=True)
    assert made.runtime == "onnxruntime"
    assert "not on the GPU, but on the CPU" in caplog.text
    caplog.clear()
    SentenceEncoder()
    assert not caplog.text


def test_missing_model_is_one_line(tmp_path: Path) -> None:
    """A folder that holds no model is a ConfigError that names it."""
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ConfigError, match="no-model") as caught:
        SentenceEncoder(str(tmp_path / "no-model"))
    assert "\n" not in str(caught.value)


def test_without_sentence_transformers_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match="pip install"):
        SentenceEncoder()
