"""The seed tasks that ship with the engine: their number, mix and form, read from the file itself.

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

SEEDS = Path(__file__).parents[2] / "engine" / "data" / "seed_tasks.jsonl"

# What Alpaca's filters refuse in a generated instruction; a demonstration must not teach it.
BLOCKED = (
    "image|images|graph|graphs|picture|pictures|file|files|map|maps|draw|plot|go to"
    "|video|audio|music|flowchart|diagram"
)


@pytest.fixture(scope="module")
def tasks() -> list[dict[str, Any]]:
    return [json.loads(line) for line in SEEDS.read_text(encoding="utf-8").splitlines()]


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


def test_classification_answers_are_labels(tasks: list[dict[str, Any]]) -> None:
    """A classification task classifies an input, and answers with nothing but a short label."""
    for task in tasks:
        if task["is_classification"]:
            _, given, output = texts(task)
            assert given, task["id"]
            assert len(output.split()) <= 2, task["id"]


def test_lengths(tasks: list[dict[str, Any]]) -> None:
    """Instructions are of 4 to 60 words on one line; outputs reach from one word to a page."""
    for task in tasks:
        instruction, _, _ = texts(task)
        assert 4 <= len(instruction.split()) <= 60, task["id"]
        assert "\n" not in instruction, task["id"]
    outputs = sorted(len(texts(task)[2].split()) for task in tasks)
    assert outputs[0] == 1
    assert 140 <= outputs[-1] <= 200
    assert 20 <= outputs[len(outputs) // 2] <= 60


def test_instructions_pass_the_filters(tasks: list[dict[str, Any]]) -> None:
    """No instruction would be refused if a model had written it."""
    for task in tasks:
        instruction, _, _ = texts(task)
        assert re.search(rf"\b({BLOCKED})\b", instruction, re.IGNORECASE) is None, task["id"]
        assert not instruction.startswith("Write a program"), task["id"]
        assert re.match("[A-Za-z]", instruction), task["id"]


def test_no_text_breaks_the_prompt(tasks: list[dict[str, Any]]) -> None:
    """No separator, no heading of a part, no mark of an empty input and no stop string."""
    for task in tasks:
        for text in texts(task):
            assert re.search(r"###|\d+\.\s*(instruction|input|output):", text, re.I) is None
            assert "noinput" not in text.lower(), task["id"]
            assert "20." not in text, task["id"]
            assert "\n20" not in text, task["id"]


def test_no_first_word_dominates(tasks: list[dict[str, Any]]) -> None:
    """A word that opens many demonstrations would open most of what the model writes."""
    first = Counter(re.split(r"\W", texts(task)[0])[0].lower() for task in tasks)
    assert first.most_common(1)[0][1] <= 8
    assert len(first) >= 80


def test_no_two_instructions_are_near_duplicates(tasks: list[dict[str, Any]]) -> None:
    """Pairwise ROUGE-L F (lower case, letters and digits, no stemming) is at most 0.5."""
    words = [re.findall(r"[a-z0-9]+", texts(task)[0].lower()) for task in tasks]
    for (i, a), (j, b) in combinations(enumerate(words), 2):
        # F of precision and recall of the longest common subsequence: 2·lcs / (|a| + |b|).
        f = 2 * LCSseq.similarity(a, b) / (len(a) + len(b))
        assert f <= 0.5, f"{tasks[i]['id']} and {tasks[j]['id']}: {f:.2f}"
