"""The vector index against comparing with everything."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.dedup import SemanticIndex, semantic
from engine.errors import DiskError

D = 96


def clustered(count: int, seed: int) -> NDArray[np.float32]:
    """Unit vectors (count, D) around a third as many centres, at cosines from 0.7 to 1."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(count // 3 + 1, D))
    noise = rng.uniform(0, 0.7, (count, 1)) * rng.normal(size=(count, D))
    vectors = centres[rng.integers(len(centres), size=count)] + noise
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


@pytest.mark.parametrize("lists", [10_000, 64], ids=["flat", "lists"])
def test_finds_what_comparing_with_everything_finds(
    lists: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No false positive, all hits while FAISS compares with everything, and nearly all from
    lists."""
    monkeypatch.setattr(semantic, "LISTS", lists)
    monkeypatch.setattr(semantic, "ROWS_MAPPED", 500)
    vectors = clustered(2_000, seed=1)
    index = SemanticIndex(D, 0.9)
    expected = found = 0
    for i, vector in enumerate(vectors):
        cosines = vectors[:i].astype(np.float64) @ vector.astype(np.float64)
        truth = {int(j): float(cosines[j]) for j in np.flatnonzero(cosines > 0.9)}
        above = index.above(vector, 0.9)
        assert {hit.item for hit in above} <= truth.keys()
        assert all(hit.score == pytest.approx(truth[hit.item], abs=1e-9) for hit in above)
        assert [hit.score for hit in above] == sorted((hit.score for hit in above), reverse=True)
        hit = index.find(vector)
        assert hit is None or hit in above
        expected += bool(truth)
        found += hit is not None
        assert index.add(vector) == i
    assert expected > 300
    assert found == expected if lists > 2_000 else found >= 0.98 * expected
    assert len(index) == 2_000


def test_memory_is_a_fraction_of_the_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the flat start, memory holds codes: what is above 16 bytes of them is the lists'
    slack."""
    monkeypatch.setattr(semantic, "LISTS", 16)
    index = SemanticIndex(D)
    for vector in clustered(4_000, seed=2):
        index.add(vector)
    assert index.nbytes / 4_000 < 0.1 * 4 * D


def test_same_vectors_in_the_same_order_give_the_same_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing in the index depends on chance or on time."""
    monkeypatch.setattr(semantic, "LISTS", 64)
    vectors = clustered(1_000, seed=3)
    answers = []
    for _ in range(2):
        index = SemanticIndex(D)
        answers.append([(index.find(vector), index.add(vector)) for vector in vectors])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("size", [1, 37, 1_000])
def test_many_at_once_are_as_one_after_the_other(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, whatever is beside them, and across the border between flat and lists."""
    monkeypatch.setattr(semantic, "LISTS", 64)
    monkeypatch.setattr(semantic, "ROWS_MAPPED", 100)
    vectors = clustered(1_000, seed=5) * np.float32(3.7)
    one, many = SemanticIndex(D), SemanticIndex(D)
    for vector in vectors:
        one.add(vector)
    for start in range(0, len(vectors), size):
        many.extend(vectors[start : start + size])
    every = np.arange(1_000)
    assert np.array_equal(one._rows[every], many._rows[every])
    for vector in clustered(200, seed=6):
        assert one.above(vector, 0.5) == many.above(vector, 0.5)
    for bad in (np.nan, 0.0):
        with pytest.raises(ValueError, match=r"NaN|zero"):
            many.extend(np.stack([vectors[0], np.full(D, bad, np.float32)]))
    assert len(many) == 1_000, "nothing of a batch that holds one"


@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        (np.full(D, np.nan), "NaN"),
        (np.r_[np.inf, np.ones(D - 1)], "infinity"),
        (np.zeros(D), "zero"),
        (np.ones(D - 1), "shape"),
        (np.ones((1, D)), "shape"),
        (np.empty(0), "shape"),
    ],
    ids=["nan", "inf", "zero", "short", "matrix", "empty"],
)
def test_fault_064_vector_that_cannot_be_compared_is_refused(
    vector: NDArray[np.float64], reason: str
) -> None:
    """It is neither searched for nor added, and what follows works as before."""
    index = SemanticIndex(D)
    index.add(np.ones(D))
    problem = index.problem(vector)
    assert problem is not None
    assert reason in problem
    for use in (index.add, index.find):
        with pytest.raises(ValueError, match=reason):
            use(vector)
    assert len(index) == 1
    assert index.find(np.full(D, 2.0)) is not None


def test_length_does_not_matter() -> None:
    """A vector is compared by its direction, however long or short."""
    index = SemanticIndex(D)
    index.add(np.full(D, 1e-300))
    hit = index.find(np.full(D, 1e300))
    assert hit is not None
    assert hit.score == pytest.approx(1.0)


@pytest.mark.parametrize("threshold", [0.0, 1.5, float("nan")])
def test_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        SemanticIndex(D, threshold)


def test_missing_folder_is_one_line(tmp_path: Path) -> None:
    """Where the vectors cannot be kept, the error says so at the start."""
    with pytest.raises(DiskError, match="embeddings"):
        SemanticIndex(D, directory=tmp_path / "missing")


def test_full_disk_is_an_error_and_not_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vector that could not be written is not in the index."""
    index = SemanticIndex(D)
    index.add(np.ones(D))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskError, match="No space left"):
        index.add(np.ones(D))
    assert len(index) == 1
