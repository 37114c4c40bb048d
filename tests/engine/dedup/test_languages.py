"""The ROUGE-L index in languages other than English, against an oracle of its own: tokens by the
names of characters, and the longest common subsequence by a plain loop."""

from __future__ import annotations

import math
import random
import unicodedata
from functools import cache
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.dedup import Hit, RougeIndex, rouge, rouge_l, tokenize
from engine.dedup.scripts import letters_of
from engine.languages import LANGUAGES, language_of
from tests.engine.sentences import CHANGED, OTHERS, changed

UNSPACED = (
    "CJK ", "HIRAGANA ", "KATAKANA", "THAI ", "LAO ", "KHMER ", "MYANMAR ", "IDEOGRAPHIC ",
    "HANGZHOU ",
    "HENTAIGANA ", "VERTICAL IDEOGRAPHIC ", "BOPOMOFO ")  # fmt: skip
MIXED_IN = (
    "Python", "3.11", "def f(x): return x**2", "GPT-4", "2024", "24", "5km", "ＡＢＣ", "１２",
    "API", "x_1", "①", "ｶﾞ", "café", "ΑΒΓ", "😀", "5️⃣", "½",
)  # fmt: skip


@cache
def kind(letter: str) -> str:
    category = unicodedata.category(letter)
    if category in ("Mn", "Mc"):
        return "" if "VARIATION SELECTOR" in unicodedata.name(letter, "") else "mark"
    if category[0] not in "LN":
        return ""
    name = unicodedata.name(letter, "")
    return (
        "alone"
        if (category[0] == "L" or category == "Nl") and name.startswith(UNSPACED)
        else "word"
    )


def oracle_tokens(text: str) -> list[str]:
    text = "".join(c for c in text if unicodedata.category(c) != "Cf" or c == "\u200b")
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    tokens: list[str] = []
    before = ""
    for letter in text:
        what = kind(letter)
        if what == "alone" or (what == "word" and before != "word"):
            tokens.append(letter)
        elif what == "word" or (what == "mark" and before):
            tokens[-1] += letter
        if what != "mark":
            before = what
    return tokens


def oracle_f(a: list[str], b: list[str]) -> float:
    row = [0] * (len(b) + 1)
    for token in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if token == other else max(above, row[j - 1])
            diagonal = above
    if not row[-1]:
        return 0.0
    precision, recall = row[-1] / len(a), row[-1] / len(b)
    return 2 * precision * recall / (precision + recall)


def corpus(count: int, seed: int) -> list[str]:
    """Parts of sentences in every script, mixed with Latin words, code and digits; half of them are
    edits of earlier ones."""
    rng = random.Random(seed)
    sentences = [sentence for rows in CHANGED.values() for sentence, _, _ in rows]
    sentences += [sentence for rows in OTHERS.values() for sentence in rows]
    texts: list[str] = []
    while len(texts) < count:
        if texts and rng.random() < 0.5:
            letters = list(rng.choice(texts))
            for _ in range(rng.randint(1, 4)):
                place = rng.randrange(len(letters) + 1)
                if rng.random() < 0.5:
                    letters.insert(place, rng.choice(rng.choice(sentences)))
                else:
                    del letters[place : place + rng.randint(1, 3)]
            text = "".join(letters)
        else:
            sentence = rng.choice(sentences)
            start = rng.randrange(len(sentence))
            text = sentence[start : start + rng.randint(4, 24)]
            if rng.random() < 0.5:
                place = rng.randrange(len(text) + 1)
                space = " " * rng.randrange(2)
                text = f"{text[:place]}{space}{rng.choice(MIXED_IN)}{space}{text[place:]}"
        texts.append(text)
    return texts


def test_decisions_are_those_of_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """On more than 50,000 pairs of many scripts: the same refusals, F, ten nearest and mean."""
    monkeypatch.setattr(rouge, "EPOCH_STARTS", (16, 120))
    texts = corpus(330, seed=3)
    tokens = [oracle_tokens(text) for text in texts]
    assert [tokenize(text, "mul") for text in texts] == tokens
    scores = [[oracle_f(a, tokens[j]) for j in range(i)] for i, a in enumerate(tokens)]
    assert sum(map(len, scores)) > 50_000
    for threshold in (0.5, 0.75):
        index = RougeIndex(threshold, "zh")
        accepted: list[int] = []
        for i, text in enumerate(texts):
            f = [scores[i][j] for j in accepted]
            ranked = sorted(range(len(f)), key=lambda item: (-f[item], item))
            nearest = index.nearest(text, 10)
            assert [(h.item, h.score) for h in nearest.hits] == [(j, f[j]) for j in ranked[:10]]
            assert nearest.mean == (math.fsum(f) / len(f) if f else 0.0)
            refused = bool(f) and f[ranked[0]] > threshold
            assert index.find(text) == (Hit(ranked[0], f[ranked[0]]) if refused else None)
            if not refused:
                index.add(text)
                accepted.append(i)
        assert 30 < len(texts) - len(accepted) < 300
        assert RougeIndex(threshold, "zh").admit(texts) == _one_by_one(texts, threshold)


def _one_by_one(texts: list[str], threshold: float) -> list[Hit | None]:
    index = RougeIndex(threshold, "zh")
    found = []
    for text in texts:
        found.append(index.find(text))
        if found[-1] is None:
            index.add(text)
    return found


def test_scores_on_the_threshold_fall_as_the_floats_fall() -> None:
    """Of 3 to 60 characters, wherever 2L/(m+n) is 0.75 or 0.7; a hair above it all of them pass."""
    common, ours, theirs = (chr(first) for first in (0x4E00, 0x5E00, 0x6E00))
    checked = refused = 0
    for threshold in (0.75, 0.7):
        for m in range(3, 61):
            for n in range(3, 61):
                shared = round(threshold * (m + n) / 2)
                if 2 * shared != round(threshold * (m + n), 9) or shared > min(m, n):
                    continue
                a = [chr(ord(common) + i) for i in range(shared)]
                one = a + [chr(ord(ours) + i) for i in range(m - shared)]
                two = [chr(ord(theirs) + i) for i in range(n - shared)] + a
                f = oracle_f(one, two)
                index = RougeIndex(threshold, "zh")
                index.add("".join(one))
                assert index.find("".join(two)) == (Hit(0, f) if f > threshold else None)
                assert f <= threshold + 1e-5
                checked += 1
                refused += f > threshold
    assert checked > 200
    assert 0 < refused < checked


@given(st.text() | st.text("中文かカﾞกำ्कহ가ᄀ́½①ßİ㍿ 5aZ_\u200d\ufe0f\u0301😀𠀀丽\ud800"))
def test_compiled_tokens_are_those_of_the_oracle(text: str) -> None:
    """Whatever stands in the text; in bytes that the vocabulary cuts, and as a list."""
    expected = oracle_tokens(text)
    assert tokenize(text, "zh") == expected
    assert letters_of(text, "zh").decode().replace("_", " ").split() == expected or text.isascii()


@given(st.text(st.characters(codec="ascii")))
def test_ascii_has_the_same_tokens_in_every_language(text: str) -> None:
    assert tokenize(text, "zh") == tokenize(text) == oracle_tokens(text)


@pytest.mark.parametrize("language", CHANGED)
def test_distinct_sentences_pass_and_those_with_a_word_changed_do_not(language: str) -> None:
    """Ten everyday sentences, at the language's own threshold."""
    index = RougeIndex(language=language)
    assert index.threshold == language_of(language).rouge_threshold
    pairs = changed(language)
    assert index.admit([sentence for sentence, _ in pairs]) == [None] * 10
    for item, (_, other) in enumerate(pairs):
        hit = index.find(other)
        assert hit is not None
        assert hit.item == item
        assert hit.score < 1


@pytest.mark.parametrize("language", OTHERS)
def test_distinct_sentences_of_more_scripts_pass(language: str) -> None:
    index = RougeIndex(language="mul")
    assert set(index.admit(OTHERS[language])) == {None}


def test_a_digit_or_a_latin_word_in_common_is_not_enough() -> None:
    """What Alpaca's tokens of them have in common is all that those tokens see."""
    rows = [
        "计算半径为5的圆的面积。",
        "列出5种健康的早餐。",
        "用Python写一个排序函数",
        "Python和蛇有何区别",
    ]
    assert RougeIndex(language="zh").admit(rows) == [None] * 4
    assert RougeIndex().admit(rows) != [None] * 4


def test_a_text_without_any_token_is_like_no_other() -> None:
    index = RougeIndex(0.1, "zh")
    assert index.admit(["😀🎉", "😀🎉", "？！", "", "…"]) == [None] * 5
    assert index.nearest("😀🎉").mean == 0.0


def test_one_character_of_four_tells_two_tasks_apart() -> None:
    """So the threshold by characters is not that of words."""
    assert rouge_l("写一首诗", "写一首歌", "zh") == 0.75 == RougeIndex(language="zh").threshold
    assert RougeIndex(language="zh").admit(["写一首诗", "写一首歌"]) == [None, None]
    assert RougeIndex().threshold == RougeIndex(language="ru").threshold == 0.7


def test_long_texts_are_compared_too() -> None:
    """Beyond the tokens that are compared exactly."""
    rng = random.Random(1)
    text = "".join(chr(0x4E00 + rng.randrange(3_000)) for _ in range(2_500))
    index = RougeIndex(language="zh")
    index.add(text)
    hit = index.find(text[:1_200] + "另一句" + text[1_200:])
    assert hit is not None
    assert hit.score > 0.99
    assert index.find("".join(sorted(text))) is None


def test_an_unknown_language_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="'xx' is no language known here; take auto or one of en"):
        RougeIndex(language="xx")
    assert all(code == language.code for code, language in LANGUAGES.items())
    assert all(oracle_f(list("ab"), list(other)) in (0.5, 0.0) for other in ("ac", "cd"))


@pytest.mark.parametrize("language", CHANGED)
def test_no_two_of_the_sentences_come_close(language: str) -> None:
    """So that the threshold has room below it, as for words."""
    sentences = [sentence for sentence, _, _ in CHANGED[language]]
    for one, other in combinations(sentences, 2):
        assert rouge_l(one, other, language) < 0.4
