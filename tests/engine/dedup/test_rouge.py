"""The ROUGE-L index against ``rouge_score`` itself: decisions, F, the nearest and the mean, bit by
bit."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from rouge_score import tokenize as rouge_tokenize

from engine.dedup import Hit, RougeIndex, memory, rouge, rouge_l, threads, tokenize, vocabulary

THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 1.0)


def oracle_f(a: Sequence[str], b: Sequence[str]) -> float:
    """F of two token lists by ``rouge_score``'s own table and arithmetic."""
    score: Any = rouge_scorer._score_lcs(a, b)
    return float(score.fmeasure)


def oracle_tokens(text: str) -> list[str]:
    return list(rouge_tokenize.tokenize(text, None))


def corpus(count: int, lengths: tuple[int, int], seed: int) -> list[str]:
    """Texts of a skewed vocabulary; half of them are edits of earlier ones, so that scores vary."""
    rng = random.Random(seed)
    texts: list[list[str]] = []
    for _ in range(count):
        if texts and rng.random() < 0.5:
            words = list(rng.choice(texts))
            for _ in range(rng.randint(0, max(1, len(words) // 3))):
                place = rng.randrange(len(words) + 1)
                edit = rng.random()
                if edit < 0.4:
                    words.insert(place, f"w{rng.randrange(50)}")
                elif words and edit < 0.8:
                    words.pop(place % len(words))
                else:
                    rng.shuffle(words)
        else:
            size = rng.randint(*lengths)
            words = [f"w{int(rng.paretovariate(0.8))}" for _ in range(size)]
        texts.append(words)
    return [" ".join(words) for words in texts]


class Oracle:
    """All pairs of some texts, scored by ``rouge_score``."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        tokens = [oracle_tokens(text) for text in texts]
        self.f = [[oracle_f(a, tokens[j]) for j in range(i)] for i, a in enumerate(tokens)]

    @property
    def pairs(self) -> int:
        return sum(map(len, self.f))


@pytest.fixture(scope="module")
def short() -> Oracle:
    """More than 100,000 pairs: short texts, and some that have no tokens for ROUGE-L."""
    odd = [
        "",
        "写一首关于大海的诗",
        "¿?",
        "Été à l'école",
        "İstanbul K",
        "a",
        "A",
        "a a a a",
        "a b",
    ]
    return Oracle(odd + corpus(450, (0, 16), seed=1))


@pytest.fixture(scope="module")
def long() -> Oracle:
    """Texts around and far beyond one machine word of tokens, up to 500."""
    groups = [(8, (28, 36)), (8, (60, 68)), (6, (120, 132)), (4, (250, 262)), (4, (480, 500))]
    return Oracle([text for count, size in groups for text in corpus(count, size, seed=count)])


def assert_replay_agrees(oracle: Oracle, threshold: float) -> int:
    """Take the oracle's texts as a stream of candidates; returns how many were refused."""
    index = RougeIndex(threshold)
    accepted: list[int] = []
    for i, text in enumerate(oracle.texts):
        scores = [oracle.f[i][j] for j in accepted]
        ranked = sorted(range(len(scores)), key=lambda item: (-scores[item], item))
        nearest = index.nearest(text, 10)
        assert [(hit.item, hit.score) for hit in nearest.hits] == [
            (item, scores[item]) for item in ranked[:10]
        ]
        assert nearest.mean == (math.fsum(scores) / len(scores) if scores else 0.0)
        refused = bool(scores) and scores[ranked[0]] > threshold
        assert index.find(text) == (Hit(ranked[0], scores[ranked[0]]) if refused else None)
        if not refused:
            assert index.add(text) == len(accepted)
            accepted.append(i)
    return len(oracle.texts) - len(accepted)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.slow
def test_stream_is_decided_as_rouge_score_decides_it(
    short: Oracle, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 100,000 pairs: the same refusals, the same F, the same ten nearest, the same mean."""
    assert short.pairs > 100_000
    monkeypatch.setattr(rouge, "EPOCH_STARTS", (16, 120))
    refused = assert_replay_agrees(short, threshold)
    assert (refused > 20) == (threshold < 1)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.slow
def test_long_texts_are_decided_alike(long: Oracle, threshold: float) -> None:
    """Texts of up to 500 tokens take several machine words, and no other way out."""
    refused = assert_replay_agrees(long, threshold)
    assert (refused > 0) == (threshold < 1)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("limit", [None, 3])
def test_a_batch_is_admitted_as_its_texts_one_by_one(
    short: Oracle, limit: int | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across epochs and growing arrays, by one thread or several; behind the limit nothing is
    judged.
    """
    monkeypatch.setattr(rouge, "EPOCH_STARTS", (16, 120))
    monkeypatch.setattr(rouge, "SPREAD_FROM", 10)
    single = RougeIndex(0.5)
    for module in (rouge, vocabulary, threads):
        monkeypatch.setattr(module, "reserve", partial(memory.reserve, nbytes=256))
    batched = RougeIndex(0.5, threads=workers)
    expected: list[Hit | None] = []
    for text in ["", *short.texts]:
        expected.append(single.find(text))
        if expected[-1] is None:
            single.add(text)
    rng = random.Random(6)
    texts = ["", *short.texts]
    judged: list[Hit | None] = []
    while len(judged) < len(texts):
        before = len(batched)
        batch = texts[len(judged) :][: rng.randint(1, 60)]
        found = batched.admit(batch, limit)
        assert len(found) == len(batch) or len(batched) == before + (limit or 0)
        judged += found
    assert judged == expected
    assert len(batched) == len(single)
    every = range(len(single))
    assert batched.neighbours(every) == single.neighbours(every)
    assert (batched.nbytes > single.nbytes) == (workers > 1)
    assert batched.admit(texts, 0) == []


def test_scores_on_the_threshold_fall_as_the_floats_fall() -> None:
    """Where 2L/(m+n) is 0.7, F is 0.7 or the float above it, and the decision follows it both
    ways."""
    above = 0
    pairs = 0
    for m in range(1, 61):
        for n in range(m % 2 or 2, 61, 2):
            shared, rest = divmod(7 * (m + n), 20)
            if rest or shared > min(m, n):
                continue
            common = [f"c{i}" for i in range(shared)]
            a = common + [f"a{i}" for i in range(m - shared)]
            b = [f"b{i}" for i in range(n - shared)] + common
            f = oracle_f(a, b)
            for first, second in ((a, b), (b, a)):
                index = RougeIndex(0.7)
                index.add(" ".join(first))
                hit = index.find(" ".join(second))
                assert hit == (Hit(0, f) if f > 0.7 else None), (m, n, shared)
            pairs += 1
            above += f > 0.7
    assert 0 < above < pairs


words = st.lists(st.sampled_from("abcdefg"), max_size=12).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(words, min_size=1, max_size=12),
    query=words,
    threshold=st.floats(0, 1, exclude_min=True),
)
def test_any_texts_and_any_threshold(texts: list[str], query: str, threshold: float) -> None:
    """Few words in any order: long common subsequences, repeats, empty texts."""
    index = RougeIndex(threshold)
    for text in texts:
        index.add(text)
    scores = [oracle_f(query.split(), text.split()) for text in texts]
    best = max(scores)
    hit = index.find(query)
    assert hit == (Hit(scores.index(best), best) if best > threshold else None)
    nearest = index.nearest(query, 3)
    assert [h.score for h in nearest.hits] == sorted(scores, reverse=True)[:3]
    assert nearest.mean == math.fsum(scores) / len(scores)


@given(st.text())
def test_tokens_are_those_of_rouge_score(text: str) -> None:
    """Whatever ``lower`` does to a character, the runs of letters and digits are the same."""
    assert tokenize(text) == oracle_tokens(text)


@given(words, words)
def test_rouge_l_of_two_texts(a: str, b: str) -> None:
    """The function for one pair gives the same bits."""
    assert rouge_l(a, b) == oracle_f(a.split(), b.split())


def test_neighbours_are_those_before_an_item() -> None:
    """A batch of items gives what a text gave that was asked about before it was added."""
    texts = corpus(60, (1, 50), seed=5)
    index = RougeIndex()
    alone = []
    for text in texts:
        alone.append(index.nearest(text, 7))
        index.add(text)
    assert index.neighbours(range(len(texts)), 7) == alone


def test_many_items_of_one_token() -> None:
    """A token's postings run over several chunks and epochs, and none of them is lost."""
    index = RougeIndex(0.6)
    for i in range(9_000):
        index.add(f"common u{i}")
    for i in (0, 1, 63, 64, 4_095, 4_096, 8_999):
        assert index.find(f"common u{i} other") == Hit(i, oracle_f(["a", "b"], ["a", "b", "c"]))


def test_text_without_tokens_is_never_refused() -> None:
    """ROUGE-L is blind to it: the exact text and the embedding must catch it."""
    index = RougeIndex(0.1)
    index.add("写一首诗")
    assert index.find("写一首诗") is None
    assert index.nearest("写一首诗").hits == (Hit(0, 0.0),)
    assert index.nearest("写一首诗").mean == 0.0


def test_an_empty_index_has_no_nearest() -> None:
    index = RougeIndex()
    assert len(index) == 0
    assert index.nearest("a b").hits == ()
    assert index.nearest("a b").mean == 0.0
    assert index.find("a b") is None


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.1, math.nan])
def test_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        RougeIndex(threshold)


def test_asking_keeps_nothing() -> None:
    """A refused candidate leaves no trace, however many new words it has."""
    index = RougeIndex()
    index.add("one two three")
    before = index.nbytes
    for i in range(100):
        index.find(f"one x{i} y{i}")
        index.nearest(f"one z{i}")
    assert index.nbytes == before


def test_threads_take_turns() -> None:
    """Adding from several threads loses no item; the compiled loops let other threads run."""
    index = RougeIndex(0.9)
    texts = corpus(400, (3, 12), seed=9)

    def work(part: list[str]) -> None:
        for text in part:
            index.find(text)
            index.add(text)

    callers = [threading.Thread(target=work, args=(texts[i::4],)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(index) == 400
    assert all(index.nearest(text, 1).hits[0].score == 1.0 for text in texts if text)
    from engine.dedup import admit, kernels, scan

    loops: list[Any] = [kernels.find, kernels.insert, admit.admit, admit.look, scan.scan]
    assert all(loop.targetoptions["nogil"] for loop in loops)


def test_decisions_are_the_same_when_arrays_must_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    texts = [" ".join(f"w{rng.randint(0, 900)}" for _ in range(9)) for _ in range(600)]
    roomy = RougeIndex(0.5)
    with monkeypatch.context() as patched:
        for module in (rouge, vocabulary):
            patched.setattr(module, "reserve", partial(memory.reserve, nbytes=256))
        tight = RougeIndex(0.5)
    for text in texts:
        assert tight.find(text) == roomy.find(text)
        assert tight.add(text) == roomy.add(text)
    assert tight.neighbours(range(600)) == roomy.neighbours(range(600))
    assert tight.nbytes == roomy.nbytes
