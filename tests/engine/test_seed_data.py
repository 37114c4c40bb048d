"""The seed tasks that ship with the engine, English and Chinese: their number, mix and form, read
from the files themselves.

Nothing of the engine is imported: a fault in the loader or the filters cannot hide one in the data.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from rapidfuzz.distance import LCSseq

DATA = Path(__file__).parents[2] / "engine" / "data"
SEEDS = {"en": DATA / "seed_tasks.jsonl", "zh": DATA / "seed_tasks.zh.jsonl"}

# What the filters refuse in a generated instruction; a demonstration must not teach it.
BLOCKED = {
    "en": r"\b(image|images|graph|graphs|picture|pictures|file|files|map|maps|draw|plot|go to"
    r"|video|audio|music|flowchart|diagram)\b",
    "zh": "图片|图像|图表|照片|截图|插图|附件|文件|地图|绘制|绘图|画一|画出|视频|音频|录音|音乐"
    "|流程图|示意图|思维导图|点击",
}
CHARACTERS_A_WORD = 1.5
"""Of Chinese, so that its lengths are as varied as those of the English tasks."""


def read(language: str) -> list[dict[str, Any]]:
    lines = SEEDS[language].read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module", params=list(SEEDS))
def language(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tasks(language: str) -> list[dict[str, Any]]:
    return read(language)


def words(text: str, language: str) -> float:
    """The length of a text in words, or in what makes one."""
    if language == "en":
        return len(text.split())
    return len("".join(text.split())) / CHARACTERS_A_WORD


def tokens(text: str, language: str) -> list[str]:
    """What near-duplicates are compared by: lower-cased words, or characters."""
    latin = re.findall(r"[a-z0-9]+", text.lower())
    if language == "en":
        return latin
    return re.findall(r"[a-z0-9]+|[\u4e00-\u9fff]", text.lower())


def texts(task: dict[str, Any]) -> tuple[str, str, str]:
    """Instruction, input and output."""
    (instance,) = task["instances"]
    return task["instruction"], instance["input"], instance["output"]


def test_each_line_has_the_self_instruct_form(tasks: list[dict[str, Any]]) -> None:
    """Same keys in the same order, one instance each, and no text is padded with white space."""
    for task in tasks:
        assert list(task) == ["id", "name", "instruction", "instances", "is_classification"]
        assert isinstance(task["is_classification"], bool)
        (instance,) = task["instances"]
        assert list(instance) == ["input", "output"]
        assert all(text == text.strip() for text in texts(task)), task["id"]
        assert instance["output"], task["id"]


def test_two_hundred_tasks_with_unique_ids_and_names(tasks: list[dict[str, Any]]) -> None:
    """Ids are numbered in the order of the lines; names are snake_case."""
    assert [task["id"] for task in tasks] == [f"seed_task_{i}" for i in range(200)]
    names = [task["name"] for task in tasks]
    assert len(set(names)) == len(names)
    assert [name for name in names if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", name)] == []


def test_shares_of_classification_and_of_inputs(tasks: list[dict[str, Any]]) -> None:
    """15 % classify, as among Alpaca's seeds, and 40 % have an input, as in its published data."""
    assert 28 <= sum(task["is_classification"] for task in tasks) <= 32
    assert 78 <= sum(texts(task)[1] != "" for task in tasks) <= 82


def test_classification_answers_are_labels(tasks: list[dict[str, Any]], language: str) -> None:
    """A classification task classifies an input, and answers with nothing but a short label."""
    for task in tasks:
        if task["is_classification"]:
            _, given, output = texts(task)
            assert given, task["id"]
            assert words(output, language) <= (2 if language == "en" else 2.7), task["id"]


def test_lengths(tasks: list[dict[str, Any]], language: str) -> None:
    """Instructions are of 4 to 60 words on one line; outputs reach from one word to a page."""
    for task in tasks:
        instruction, _, _ = texts(task)
        assert 4 <= words(instruction, language) <= 60, task["id"]
        assert "\n" not in instruction, task["id"]
    outputs = sorted(words(texts(task)[2], language) for task in tasks)
    assert outputs[0] <= 1
    assert 140 <= outputs[-1] <= 200
    assert 20 <= outputs[len(outputs) // 2] <= 60


def test_instructions_pass_the_filters(tasks: list[dict[str, Any]], language: str) -> None:
    """No instruction would be refused if a model had written it."""
    for task in tasks:
        instruction, _, _ = texts(task)
        assert re.search(BLOCKED[language], instruction, re.IGNORECASE) is None, task["id"]
        assert not re.match("Write a program|(编)?写(一个|一段)?程序", instruction), task["id"]
        first = "[A-Za-z]" if language == "en" else r"[A-Za-z\u4e00-\u9fff“]"
        assert re.match(first, instruction), task["id"]


def test_no_text_breaks_the_prompt(tasks: list[dict[str, Any]]) -> None:
    """No separator, no heading of a part, no mark of an empty input and no stop string."""
    for task in tasks:
        for text in texts(task):
            labels = "instruction|input|output|指令|输入|输出"
            assert re.search(rf"###|＃＃＃|\d+[.．]\s*({labels})[:：]", text, re.I) is None
            assert re.search("noinput|<无输入>", text.lower()) is None, task["id"]
            assert "20." not in text, task["id"]
            assert "\n20" not in text, task["id"]


def test_no_first_word_dominates(tasks: list[dict[str, Any]], language: str) -> None:
    """A word that opens many demonstrations would open most of what the model writes."""
    openings = (texts(task)[0] for task in tasks)
    if language == "en":
        first = Counter(re.split(r"\W", opening)[0].lower() for opening in openings)
    else:
        first = Counter(opening[:2] for opening in openings)
    assert first.most_common(1)[0][1] <= 8
    assert len(first) >= 80


def test_no_two_instructions_are_near_duplicates(
    tasks: list[dict[str, Any]], language: str
) -> None:
    """Pairwise ROUGE-L F (lower-cased words; characters in Chinese) is at most 0.5."""
    cut = [tokens(texts(task)[0], language) for task in tasks]
    for (i, a), (j, b) in combinations(enumerate(cut), 2):
        # F of precision and recall of the longest common subsequence: 2·lcs / (|a| + |b|).
        f = 2 * LCSseq.similarity(a, b) / (len(a) + len(b))
        assert f <= 0.5, f"{tasks[i]['id']} and {tasks[j]['id']}: {f:.2f}"


def test_the_chinese_tasks_are_no_translations() -> None:
    """They have names and figures of their own: a translation would keep the figures."""
    english, chinese = read("en"), read("zh")
    assert not {task["name"] for task in english} & {task["name"] for task in chinese}

    def figures(task: dict[str, Any]) -> set[str]:
        return set(re.findall(r"\d{2,}", " ".join(texts(task))))

    for task in chinese:
        for other in english:
            shared = figures(task) & figures(other)
            assert len(shared) < 4, (task["name"], other["name"], shared)
