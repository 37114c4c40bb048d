"""What a restart rebuilds from the store: the index of near-duplicates, which is stored nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.decide.decider import restore_cascade
from engine.dedup.cascade import Candidate, Cascade
from engine.dedup.encoder import Precision
from engine.recipes.alpaca import Alpaca, Seeded
from engine.store import RunStore
from tests.engine.store_rows import MANIFEST, answer, decision

pytestmark = pytest.mark.anyio


class Letters:
    """An encoder that counts letters, and how many texts it was given."""

    dimension = 26
    precision: Precision = "float32"

    def __init__(self) -> None:
        self.asked = 0

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.asked += len(texts)
        counts = [[text.count(chr(97 + i)) + 1 for i in range(26)] for text in texts]
        rows = np.array(counts, np.float32)
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


async def test_missing_vectors_are_embedded_again_and_counted_fault_099_fault_100(
    tmp_path: Path,
) -> None:
    """Of ten accepted rows, four have no vector: these alone are embedded, all are compared."""
    encoder = Letters()
    store = RunStore.open(tmp_path / "run", MANIFEST)
    decisions = [decision(i, 0) for i in range(10)]
    texts = [d.record["instruction"] for d in decisions if d.record]
    vectors = encoder.encode(texts)
    await store.answered([answer(i) for i in range(10)])
    await store.decided(decisions, [vectors[i] if i < 6 else None for i in range(10)])
    encoder.asked = 0
    cascade = Cascade(None, 0.999, encoder)
    assert restore_cascade(cascade, store, Alpaca(Seeded(tasks=[]))) == (10, 4)
    assert encoder.asked == 4
    assert len(cascade) == 10
    for text in texts:
        (judgement,) = cascade.judge([Candidate(text=text, source="row:99.0")])
        assert judgement.reason == "duplicate_exact"
    await store.aclose()
