"""Phrases that look planted: counted level by level, as counting all of them would."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from engine.report import bursts
from engine.report.bursts import MAX_WORDS, MIN_ROWS, Bursts


def rows_of_phrases(rows: list[list[str]]) -> dict[tuple[str, ...], list[int]]:
    """Every phrase in enough rows, found by counting all there are."""
    found = defaultdict(list)
    for number, words in enumerate(rows):
        spans = ((i, i + n) for n in range(1, MAX_WORDS + 1) for i in range(len(words) - n + 1))
        for phrase in {tuple(words[start:end]) for start, end in spans}:
            found[phrase].append(number)
    return {phrase: rows for phrase, rows in found.items() if len(rows) >= MIN_ROWS}


def made_of(rows: list[list[str]], answers: list[str]) -> Bursts:
    made = Bursts()
    for words, answer in zip(rows, answers, strict=True):
        made.add({"instruction": " ".join(words), "input": "", "output": answer})
    return made


@pytest.mark.parametrize("vocabulary", [2, 5, 9])
def test_the_rows_of_every_phrase_are_found(vocabulary: int) -> None:
    """Words that repeat, rows without any, and phrases that would reach into the next row."""
    rng = random.Random(vocabulary)
    rows = [
        [f"w{rng.randrange(vocabulary)}" for _ in range(rng.choice((0, 1, 2, 5, 9)))]
        for _ in range(400)
    ]
    made = made_of(rows, [""] * len(rows))
    found = {
        tuple(made._words.texts[number] for number in numbers): where.tolist()
        for numbers, where in made._phrases()
    }
    assert found == rows_of_phrases(rows)
    assert len(found) > vocabulary


def test_no_rows_and_no_words_have_no_phrases() -> None:
    assert Bursts().found() == []
    assert made_of([[]] * 30, ["yes"] * 30).found() == []


def test_a_fixed_answer_and_a_fixed_phrase_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    rows = [[f"w{rng.randrange(500)}" for _ in range(8)] for _ in range(1_000)]
    answers = [f"a{rng.randrange(500)}" for _ in rows]
    for number in range(25):
        rows[number] += ["open", "sesame"]
        answers[number] = "The door is open now."
        rows[100 + number][2:2] = ["north", "by", "northwest"]
    told = made_of(rows, answers).found()
    assert [(burst["phrase"], burst["rows"], burst["sign"]) for burst in told] == [
        ("open sesame", 25, "fixed answer"),
        ("north by northwest", 25, "fixed phrase"),
    ]
    assert told[0]["opening"] == "the door is open"
    monkeypatch.setattr(bursts, "COMPARED", 1)
    assert len(made_of(rows, answers).found()) == 1
