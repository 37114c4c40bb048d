"""The cascade: each stage's part, and decisions that depend on the plan alone."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.dedup import Candidate, Cascade, Judgement
from engine.dedup.encoder import Precision

pytestmark = pytest.mark.slow

D = 64


class BagEncoder:
    """Direction by the bag of words: texts of the same words mean the same, in any order.

    Like a real network it is not quite the same in every batch. A text with ``nan``, ``zero`` or
    ``short`` in it gets such a vector.
    """

    dimension = D
    precision: Precision = "float32"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.batches.append(len(texts))
        return np.stack([self._vector(text, len(texts)) for text in texts])

    def _vector(self, text: str, batch: int) -> NDArray[np.float32]:
        if "nan" in text:
            return np.full(D, np.nan, np.float32)
        if "zero" in text:
            return np.zeros(D, np.float32)
        vector = np.zeros(D)
        for word in text.lower().split() or ["-"]:
            vector += np.random.default_rng(zlib.crc32(word.encode())).normal(size=D)
        vector += 3e-6 * np.random.default_rng([zlib.crc32(text.encode()), batch]).normal(size=D)
        return np.asarray(vector / np.linalg.norm(vector), np.float32)


def cascade(**settings: object) -> Cascade:
    defaults = {"rouge_threshold": 0.7, "semantic_threshold": 0.9, "encoder": BagEncoder()}
    return Cascade(**(defaults | settings))  # type: ignore[arg-type]


def plan(texts: Sequence[str]) -> list[Candidate]:
    return [Candidate(text=text, source=f"row:{i}.0") for i, text in enumerate(texts)]


def judge_in(sizes: Sequence[int], texts: Sequence[str], **settings: object) -> list[Judgement]:
    """Judge the plan in batches of these sizes, over and over."""
    judged = cascade(**settings)
    candidates = plan(texts)
    judgements: list[Judgement] = []
    turn = 0
    while len(judgements) < len(candidates):
        size = sizes[turn % len(sizes)]
        judgements += judged.judge(candidates[len(judgements) :][:size])
        turn += 1
    return judgements


def without_vectors(judgements: Sequence[Judgement]) -> list[Judgement]:
    """What must agree between batches: everything but the last bits of the embedding."""
    return [replace(judgement, vector=None) for judgement in judgements]


def test_each_stage_refuses_what_is_its_own() -> None:
    """The reason, the nearest text with its score and source, and what accepted rows are told."""
    judged = cascade()
    judged.add_reference(["alpha beta gamma delta"], ["seed:1"])
    exact, rouge, meaning, accepted, chinese, again = judged.judge(
        plan(
            [
                "Alpha  beta gamma delta",
                "alpha beta gamma epsilon delta",
                "delta gamma beta alpha",
                "alpha zeta",
                "写一首诗",
                " 写一首诗 ",
            ]
        )
    )
    assert [exact.reason, rouge.reason, meaning.reason] == [
        "duplicate_exact",
        "duplicate_rouge",
        "duplicate_semantic",
    ]
    for judgement in (exact, rouge, meaning):
        assert judgement.nearest is not None
        assert judgement.nearest.text == "alpha beta gamma delta"
        assert judgement.nearest.source == "seed:1"
    assert rouge.nearest is not None
    assert rouge.nearest.score == 2 * (4 / 5) / (4 / 5 + 1)
    assert accepted.accepted
    assert accepted.most_similar == {"alpha beta gamma delta": pytest.approx(1 / 3)}
    assert accepted.mean_similarity == pytest.approx(1 / 3)
    assert accepted.vector is not None
    assert accepted.vector.shape == (D,)
    assert chinese.accepted
    assert chinese.nearest is None
    assert again.reason == "duplicate_exact"
    assert again.nearest is not None
    assert again.nearest.source == "row:4.0"


def test_one_refused_by_its_meaning_is_not_compared_with() -> None:
    """Were it counted as accepted within its batch, the last one would fall to it by ROUGE-L."""
    texts = ["a b c d e f", "f e d c b a", "f e d c b g h"]
    for sizes in ([3], [1], [2, 1]):
        reasons = [judgement.reason for judgement in judge_in(sizes, texts)]
        assert reasons == [None, "duplicate_semantic", None]


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=9).map(" ".join), max_size=30
    ),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_decisions_do_not_depend_on_batches(texts: list[str], sizes: list[int]) -> None:
    """Reason, nearest, score, the ten nearest and the mean are those of judging one by one."""
    assert without_vectors(judge_in(sizes, texts)) == without_vectors(judge_in([1], texts))
    words = {"semantic_threshold": None, "encoder": None}
    assert judge_in(sizes, texts, **words) == judge_in([1], texts, **words)


def test_cosine_on_the_threshold_does_not_depend_on_batches() -> None:
    """A pair whose cosine is the threshold to the last bit is decided by the texts alone."""
    pair = ["a b c d e", "e d c b x a"]
    one, other = (BagEncoder().encode([text])[0].astype(np.float64) for text in pair)
    cosine = float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    fill = [f"w{i} v{i} u{i}" for i in range(12)]
    decisions = {
        tuple(j.reason for j in judge_in([size], [*fill, *pair], semantic_threshold=cosine + shift))
        for size in range(1, 15)
        for shift in (1e-12,)
    }
    assert len(decisions) == 1


@pytest.mark.parametrize("semantic_threshold", [0.9, None])
def test_limit_is_met_exactly(semantic_threshold: float | None) -> None:
    """No candidate is judged after the last acceptance that is wanted, nor left in the index."""
    judged = cascade(semantic_threshold=semantic_threshold)
    texts = ["a b c", "A b c", "d e f", "g h i", "j k l"]
    judgements = judged.judge(plan(texts), limit=2)
    assert [judgement.reason for judgement in judgements] == [None, "duplicate_exact", None]
    assert judged.judge(plan(texts[3:]), limit=0) == []
    assert len(judged) == 2
    assert [j.reason for j in judged.judge(plan(texts[3:]), limit=9)] == [None, None]


def test_only_survivors_are_embedded() -> None:
    """The embedding is the slowest stage by far: exact and ROUGE-L duplicates never reach it."""
    encoder = BagEncoder()
    judged = cascade(encoder=encoder)
    judged.judge(plan(["a b c d", "A b c d", "a b c d e", "x y z"]))
    assert sum(encoder.batches) == 2


def test_restored_cascade_goes_on_as_if_nothing_had_happened() -> None:
    """The resume test: judge, cut, restore, go on; the decisions are those of the uncut run."""
    rng = np.random.default_rng(4)
    texts = [" ".join(rng.choice(list("abcdefgh"), 5)) for _ in range(60)]
    uncut = judge_in([7], texts)
    before = judge_in([7], texts[:30])
    accepted = [i for i, judgement in enumerate(before) if judgement.accepted]
    vectors = [before[i].vector for i in accepted]
    vectors[1] = None
    vectors[2] = np.full(D, np.nan, np.float16)
    restored = cascade()
    candidates = plan(texts)
    assert restored.restore([candidates[i] for i in accepted], vectors) == 2
    after = restored.judge(candidates[30:])
    assert without_vectors(after) == without_vectors(uncut[30:])


@pytest.mark.parametrize("word", ["nan", "zero"])
def test_fault_064_invalid_embedding_is_a_decision(word: str) -> None:
    """It is refused with its reason, and is in none of the indexes afterwards."""
    judged = cascade()
    first, second, third = judged.judge(plan([f"a {word}", f"a {word}", "b c d"]))
    assert first.reason == second.reason == "embed_invalid"
    assert first.detail
    assert third.accepted
    assert len(judged) == 1


def test_reference_with_an_invalid_embedding_is_still_compared_by_text() -> None:
    """Seeds are a person's: the stages that can see them go on."""
    judged = cascade()
    judged.add_reference(["nan a b c", "d e f g"], ["seed:1", "seed:2"])
    assert [j.reason for j in judged.judge(plan(["nan a b c d", "g f e d"]))] == [
        "duplicate_rouge",
        "duplicate_semantic",
    ]


def test_stages_can_be_left_out() -> None:
    """Without ROUGE-L only meaning and the exact text decide, and the other way round."""
    texts = ["a b c d", "a b c e d", "d c b a", "A b c d"]
    assert [j.reason for j in judge_in([4], texts, rouge_threshold=None)] == [
        None,
        None,
        "duplicate_semantic",
        "duplicate_exact",
    ]
    by_rouge = judge_in([4], texts, semantic_threshold=None, encoder=None)
    assert [j.reason for j in by_rouge] == [None, "duplicate_rouge", None, "duplicate_exact"]
    with pytest.raises(ValueError, match="encoder"):
        Cascade(semantic_threshold=0.9)


def test_margin_tells_what_was_nearly_refused() -> None:
    """The borderline band: an accepted row names the nearest meaning below the threshold."""
    texts = ["a b c d e", "e d c b x a"]
    assert judge_in([2], texts, semantic_threshold=0.99)[1].nearest_meaning is None
    near = judge_in([2], texts, semantic_threshold=0.99, margin=0.5)[1].nearest_meaning
    assert near is not None
    assert near.text == "a b c d e"
    assert near.score < 0.99
