"""Which language texts are in, and how long they are."""

from __future__ import annotations

import json

import pytest

from engine.languages import detect, has_tokens, language_of, measure, tokens_of, unit_of
from engine.recipes.seeds import BUNDLED, bundled_seeds, read_seeds
from tests.engine.sentences import CHANGED, OTHERS


@pytest.mark.parametrize("language", [*CHANGED, *(code for code in OTHERS if code != "emoji")])
def test_a_script_tells_its_language(language: str) -> None:
    sentences = [row[0] for row in CHANGED.get(language, ())] or list(OTHERS.get(language, ()))
    assert detect(sentences) == language
    with_latin = [f"{sentence} Python 3.11 API" for sentence in sentences]
    assert detect(with_latin) == language


@pytest.mark.parametrize("language", BUNDLED)
def test_bundled_seeds_are_in_their_language(language: str) -> None:
    tasks = read_seeds(bundled_seeds(language))
    assert detect(task.instruction for task in tasks) == language
    assert detect(f"{task.instruction}\n{task.input}" for task in tasks) == language


@pytest.mark.parametrize(
    ("texts", "language"),
    [
        ([], "en"),
        (["", "123", "😀"], "en"),
        (["Translate 你好 into English.", *["Name three primary colours."] * 20], "en"),
        (["Name three colours.", "写一首关于大海的诗歌", "列出三种健康的早餐"], "zh"),
        (["Name three primary colours in any order you like.", "写一首关于大海的诗"], "mul"),
        (
            ["Écris un poème sur la mer où brille l'été.", "Où est né le président français ?"],
            "mul",
        ),
        (["Напиши стихи", "写一首诗", "สวัสดี"], "mul"),
    ],
)
def test_a_few_words_of_another_script_do_not_decide(texts: list[str], language: str) -> None:
    """Latin letters are English unless a fair share of the words says otherwise."""
    assert detect(texts) == language


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("Name three primary colours.", (4, "words")),
        ("写一首关于 秋天 的诗", (9, "characters")),
        ("用 Python 写排序", (10, "characters")),
        ("오늘 저녁에 만나요", (3, "words")),
        ("", (0, "words")),
    ],
)
def test_length_is_in_the_unit_of_the_text(text: str, length: tuple[int, str]) -> None:
    assert measure(text) == length


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Name three primary colours.", (True, "words")),
        ("Translate “café” and 你好 into English.", (True, "words")),
        ("", (True, "words")),
        ("😀 5", (True, "words")),
        ("5 + 3 = 8 吗？", (False, "characters")),
        ("用 Python 写一个排序函数", (False, "characters")),
        ("用 Python API 写", (True, "words")),
        ("Напиши стихи Python", (False, "words")),
        ("오늘 저녁에 만나요", (False, "words")),
        ("สวัสดีครับ", (False, "characters")),
    ],
)
def test_a_text_is_cut_as_most_of_it_is(text: str, expected: tuple[bool, str]) -> None:
    assert unit_of(text) == expected


def test_tokens_of_scripts() -> None:
    assert tokens_of("用Python3写一个24点游戏！", "zh") == [
        *"用",
        "python3",
        *"写一个",
        "24",
        *"点游戏",
    ]
    assert tokens_of("น้ำเย็น", "th") == ["น้ํ", "า", "เ", "ย็", "น"]
    assert tokens_of("नमस्ते दुनिया", "hi") == ["नमस्ते", "दुनिया"]
    assert tokens_of("ＡＰＩ　５月", "ja") == ["api", "5", "月"]
    assert not has_tokens("😀 … ❤️", "zh")
    assert has_tokens("℃", "zh")
    assert not has_tokens("写诗", "en")


def test_a_code_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="'chinese' is no language known here"):
        language_of("chinese")
    assert json.dumps(language_of("zh").name) == '"Chinese"'
