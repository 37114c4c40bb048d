"""Filters by language, and as a person sets them. Alpaca's own: tests/engine/recipes."""

from __future__ import annotations

import pytest

from engine.recipes.filters import ALPACA_FILTERS, Filters, FilterSettings, first_refusal
from engine.records import Record
from tests.engine.sentences import CHANGED, OTHERS


def refusal(text: str, language: str = "zh", **settings: object) -> tuple[str, str] | None:
    given = FilterSettings(**settings)  # type: ignore[arg-type]
    return Filters(language, given).refusal(Record(instruction=text, input="", output="x"))


@pytest.mark.parametrize("language", [*CHANGED, *(code for code in OTHERS if code != "emoji")])
def test_everyday_sentences_pass_in_their_language(language: str) -> None:
    """Alpaca's own filters refuse them all."""
    sentences = [row[0] for row in CHANGED.get(language, ())] or list(OTHERS[language])
    assert [refusal(sentence, language) for sentence in sentences] == [None] * len(sentences)
    alpacas = [first_refusal(Record(instruction=s, input="", output="x")) for s in sentences]
    assert None not in alpacas


@pytest.mark.parametrize(
    ("text", "reason", "detail"),
    [
        ("写诗吧", "too_short", "3 characters"),
        ("", "too_short", "0 words"),
        ("春" * 301, "too_long", "301 characters"),
        ("请根据这张图片写一个故事", "blocked_word", "图片"),
        ("编写一个程序计算平均数", "write_a_program", ""),
        ("，写一首关于秋天的诗", "punctuation_start", "，"),
        ("#写一首关于秋天的诗", "punctuation_start", "#"),
    ],
)
def test_chinese_instructions_are_refused_for_the_same_causes(
    text: str, reason: str, detail: str
) -> None:
    assert refusal(text) == (reason, detail)


@pytest.mark.parametrize(
    "text",
    [
        "写一首诗",
        "“塞翁失马”是什么意思",
        "《红楼梦》的作者是谁",
        "（多选）下列哪项正确",
        "3加5等于几呢",
        "春" * 300,
    ],
)
def test_chinese_instructions_may_begin_as_chinese_does(text: str) -> None:
    assert refusal(text) is None


def test_each_rule_is_a_persons_to_set() -> None:
    assert refusal("写一首诗", min_length=5) == ("too_short", "4 characters")
    assert refusal("写", min_length=0) is None
    assert refusal("写一首关于秋天的诗", max_length=8) == ("too_long", "9 characters")
    assert refusal("请根据这张图片写一个故事", blocked_words=()) is None
    assert refusal("聊聊彩票中奖", blocked_words=("彩票",)) == ("blocked_word", "彩票")
    assert refusal("写首词牌名为C的词", blocked_words=("c",)) == ("blocked_word", "c")
    assert refusal("学习Csharp语言", blocked_words=("c",)) is None
    assert refusal("编写一个程序计算平均数", blocked_openings=()) is None
    assert refusal("，写一首关于秋天的诗", first_character="any") is None
    assert refusal("写一首关于秋天的诗", first_character="ascii") == ("not_ascii_start", "写")
    assert refusal("Name two nice files", "en", min_length=3) == ("blocked_word", "files")
    assert refusal("Name two", "en", min_length=2) is None
    assert refusal("Étudie la mer encore", "en", first_character="letter") is None


def test_english_without_settings_is_alpacas() -> None:
    assert Filters()._checks == ALPACA_FILTERS
    assert refusal("Name a big file please", "en") == ("blocked_word", "file")
    assert str(Filters("zh")).startswith("4 to 300 characters, ")
    assert str(Filters("ru")) == (
        "4 to 150 words, 0 blocked words, 0 blocked openings, no punctuation first"
    )
