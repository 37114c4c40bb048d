"""Long texts: never refused wrongly, hardly ever kept wrongly, and fast whatever they hold."""

from __future__ import annotations

import random
import string

import numpy as np
import pytest
from rapidfuzz.distance import LCSseq

from engine.dedup import long
from engine.dedup.long import DRIFT, LONG
from engine.dedup.rouge import RougeIndex, rouge_l
from tests.linear import in_linear_time

DRAW = random.Random(11)


def sample(vocabulary: list[str], count: int, draw: random.Random = DRAW) -> list[str]:
    return draw.choices(vocabulary, k=count)


def edited(words: list[str], share: float, vocabulary: list[str]) -> list[str]:
    """Replaced, dropped and added here and there."""
    kept: list[str] = []
    for word in words:
        kind = DRAW.random() / share if share else 9
        kept += {0: [DRAW.choice(vocabulary)], 1: [], 2: [word, DRAW.choice(vocabulary)]}.get(
            int(kind * 3) if kind < 1 else 3, [word]
        )
    return kept


WIDE = [f"w{i}" for i in range(20_000)]
NARROW = [f"w{i}" for i in range(300)]
LETTERS = list(string.ascii_lowercase)


@pytest.mark.parametrize("vocabulary", [WIDE, NARROW, LETTERS, LETTERS[:4]])
@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.25])
@pytest.mark.parametrize("tokens", [LONG + 1, 9_000])
def test_a_near_duplicate_is_found_with_its_true_score(
    vocabulary: list[str], share: float, tokens: int
) -> None:
    """Among forty others, over any vocabulary, with edits all over the text."""
    index = RougeIndex()
    texts = [sample(vocabulary, tokens) for _ in range(41)]
    for words in texts:
        index.add(" ".join(words))
    near = " ".join(edited(texts[17], share, vocabulary))
    truth = rouge_l(near, " ".join(texts[17]))
    assert truth > 0.7
    hit = index.find(near)
    assert hit is not None
    assert hit.item == 17
    assert truth - 0.002 <= hit.score <= truth
    if share < 0.1:
        assert hit.score == truth
    assert index.find(" ".join(sample(vocabulary, tokens))) is None


@pytest.mark.parametrize("vocabulary", [WIDE, LETTERS, ["a", "b"]])
def test_what_is_refused_is_refused_rightly(vocabulary: list[str]) -> None:
    """Whatever blocks two texts share, in whatever order: the score is never above the true F."""
    for _ in range(12):
        blocks = [sample(vocabulary, DRAW.randint(1, 3_000)) for _ in range(4)]
        one = [word for block in DRAW.choices(blocks, k=4) for word in block]
        other = [word for block in DRAW.choices(blocks, k=4) for word in block]
        if min(len(one), len(other)) <= LONG:
            continue
        index = RougeIndex()
        index.add(" ".join(one))
        hit = index.find(" ".join(other))
        truth = rouge_l(" ".join(one), " ".join(other))
        assert hit is None or 0.7 < hit.score <= truth


def test_the_subsequence_is_exact_within_the_band() -> None:
    """Against rapidfuzz, at lengths around the strips' borders, with blocks put in and left out."""
    for m in (1, 63, 64, 65, 1023, 1024, 1025, 2500):
        for size in (2, 30, 5_000):
            a = np.array(DRAW.choices(range(size), k=m), np.uint32)
            b = np.array(edited_ids(a.tolist(), size), np.uint32)
            rows = np.zeros(size, np.uint32)
            assert long._lcs(a, b, rows) == LCSseq.similarity(a.tolist(), b.tolist())
            assert not rows.any()
    # A block of more than DRIFT that is put in, or one that is left out, is followed.
    a = np.array(DRAW.choices(range(5_000), k=6_000), np.uint32)
    more = np.concatenate([a[:2_000], a[4_000:5_500], a[2_000:]])
    rows = np.zeros(5_000, np.uint32)
    assert long._lcs(a, more, rows) == len(a) == long._lcs(more, a, rows)
    # Both, and no subsequence of the true length can be seen; it is never too long.
    both = np.concatenate([a[DRIFT * 2 :], a[: DRIFT * 2]])
    assert 0 < long._lcs(a, both, rows) < LCSseq.similarity(a.tolist(), both.tolist())


def edited_ids(ids: list[int], size: int) -> list[int]:
    place, count = DRAW.randrange(len(ids)), DRAW.randrange(200)
    cut = ids[:place] + ids[place + count // 3 :]
    place = DRAW.randrange(len(cut) + 1)
    return cut[:place] + DRAW.choices(range(size), k=count) + cut[place:] or [0]


def test_texts_on_both_sides_of_the_border_resemble_each_other() -> None:
    """Long beside not so long, whichever came first; also where the short one came much earlier."""
    words = sample(NARROW, LONG + 300)
    for threshold in (0.7, 0.4):
        for earlier, later in (
            (words[:1_600], words),
            (words, words[:1_600]),
            (words[:LONG], words[: LONG + 1]),
            (words[: LONG + 1], words[:LONG]),
        ):
            index = RougeIndex(threshold)
            index.add("something else")
            assert index.admit([" ".join(earlier), "and something more", " ".join(later)])[2] == (
                index.find(" ".join(later))
            )
            hit = index.find(" ".join(later))
            assert hit is not None
            assert (hit.item, hit.score) == (1, rouge_l(" ".join(earlier), " ".join(later)))
            assert len(index) == 3


def test_admit_decides_as_find_and_add_do() -> None:
    """In whatever order short, middling and long texts come, and at any limit."""
    draw = random.Random(5)
    texts = []
    for _ in range(300):
        count = draw.choice([5, 12, 1_300, LONG, LONG + 1, 4_000])
        texts.append(" ".join(sample(WIDE, count, draw)))
        if draw.random() < 0.5:
            words = draw.choice(texts).split()
            words[draw.randrange(len(words))] = "changed"
            texts.append(" ".join(words))
    one, other = RougeIndex(), RougeIndex()
    expected = []
    for text in texts:
        expected.append(one.find(text))
        if expected[-1] is None:
            one.add(text)
    found: list[object] = []
    while len(found) < len(texts):
        found += other.admit(texts[len(found) : len(found) + 37], limit=20)
    assert found == expected
    assert len(other) == len(one)
    assert sum(hit is not None for hit in expected) > 60


KINDS = {
    "words": lambda draw, i: " ".join(sample(NARROW, 17_000, draw)),
    "all_different": lambda draw, i: " ".join(f"{i}x{j}" for j in range(13_000)),
    "letters": lambda draw, i: " ".join(sample(LETTERS, 45_000, draw)),
    "two_letters": lambda draw, i: " ".join(sample(["a", "b"], 45_000, draw)),
    "one_letter": lambda draw, i: "a " * 45_000 + str(i),
    "one_word": lambda draw, i: "a" * 90_000 + str(i),
    "digits": lambda draw, i: " ".join(str(draw.randrange(10**9)) for _ in range(9_000)),
    "one_preamble": lambda draw, i: "the same for all " * 4_000 + f"{i} " * 8_000,
    "spaces": lambda draw, i: " " * 90_000 + str(i),
    "no_latin": lambda draw, i: "".join(chr(0x4E00 + draw.randrange(5000)) for _ in range(30_000)),
    "punctuation": lambda draw, i: "!?" * 45_000 + str(i),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
@pytest.mark.slow
def test_rows_of_ninety_kilobytes_take_milliseconds_whatever_they_hold(make: object) -> None:
    """Each of them different, and each with one word changed."""
    assert callable(make)
    draw = random.Random(2)
    texts = []
    for i in range(50):
        text = make(draw, i)
        texts += [text, text.replace(" ", " changed ", 1) + " end"]
    RougeIndex().admit(texts[:4])  # compiled by now
    index = RougeIndex()
    with in_linear_time():
        hits = index.admit(texts)
    assert len(hits) == 100
