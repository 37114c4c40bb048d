"""What is embedded ahead of the decisions changes none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.dedup import Candidate, Cascade, Judgement
from engine.dedup.encoder import Precision
from tests.engine.embedding_host import vector_of


class Foreseeing:
    """Gives each text one vector, and counts what it is asked for late."""

    dimension = 64
    precision: Precision = "float32"

    def __init__(self) -> None:
        self.foreseen: set[str] = set()
        self.late: list[str] = []

    def foresee(self, texts: Sequence[str]) -> None:
        self.foreseen |= set(texts)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.late += [text for text in texts if text not in self.foreseen]
        return np.array([vector_of(text) for text in texts], np.float32).reshape(-1, 64)


WORDS = st.sampled_from("alpha beta gamma delta epsilon zeta eta theta".split())
TEXTS = st.lists(st.lists(WORDS, min_size=1, max_size=6).map(" ".join), min_size=1, max_size=60)


def judged(cascade: Cascade, texts: Sequence[str], size: int, *, ahead: bool) -> list[Judgement]:
    plan = [Candidate(text=text, source=f"row:{n}.0") for n, text in enumerate(texts)]
    batches = [plan[start : start + size] for start in range(0, len(plan), size)]
    judgements: list[Judgement] = []
    if ahead:
        cascade.foresee([candidate.text for candidate in batches[0]])
    for batch, coming in zip(batches, [*batches[1:], []], strict=True):
        if ahead:
            cascade.foresee([candidate.text for candidate in coming])
        judgements += cascade.judge(batch, foreseen=ahead)
    return [replace(judgement, vector=None) for judgement in judgements]


@settings(deadline=None, max_examples=50)
@given(TEXTS, st.integers(1, 20))
def test_decisions_are_the_same(texts: list[str], size: int) -> None:
    made = [Foreseeing(), Foreseeing()]
    cascades = [Cascade(0.7, 0.8, encoder) for encoder in made]
    assert all(cascade.foresees for cascade in cascades)
    one = judged(cascades[0], texts, size, ahead=False)
    other = judged(cascades[1], texts, size, ahead=True)
    assert one == other


def test_nearly_everything_is_foreseen() -> None:
    """Else each of them would be a request of its own."""
    texts = [f"word{n} thing{n} other{n % 50} some{n % 7}" for n in range(400)]
    encoder = Foreseeing()
    judged(Cascade(0.7, 0.9, encoder), texts, 40, ahead=True)
    assert len(encoder.foreseen) > 300
    assert not encoder.late
