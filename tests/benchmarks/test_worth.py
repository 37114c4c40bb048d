"""What bench_worth measures by: Alpaca's loop decides as published, figures are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.bench_worth import filtered
from benchmarks.worth import measures, published
from engine.dedup.encoder import SentenceEncoder
from engine.records import SeedTask

ANSWER = (
    " Name the longest river of Europe.\n4. Input:\n<noinput>\n4. Output:\nThe Volga.\n###\n"
    "5. Instruction: Count the words of the sentence.\n5. Input:\nIt rains.\n5. Output:\n2\n###\n"
    "6. Instruction: Draw a picture of a house.\n6. Input:\n<noinput>\n6. Output:\nNo.\n###\n"
    "7. Instruction: Too short\n7. Input:\n<noinput>\n7. Output:\nx\n###\n"
    "8. Instruction: Name the longest river in Europe.\n8. Input:\nx\n8. Output:\nIt.\n###\n"
    "9. Instruction: Explain why leaves turn red.\n9. Input:\n<noinput>\n9. Output:\nBecause"
)
SEED = SeedTask(id="s", instruction="Write a poem about bread.", input="", output="x")


def row(instruction: str, output: str = "An answer.", given: str = "") -> measures.Row:
    return {"instruction": instruction, "input": given, "output": output}


def test_alpacas_loop_decides_as_published(tmp_path: Path) -> None:
    """A blocked word, too few words, a near-duplicate; and the last piece of an answer that was cut
    off.
    """
    path = tmp_path / "answers.jsonl"
    for why, last in (("stop", ["Explain why leaves turn red."]), ("length", [])):
        path.write_text(json.dumps({"text": ANSWER, "tokens": 9, "why": why}) + "\n")
        rows = list(published.rows(path, [SEED]))
        assert [each["instruction"] for each in rows] == [
            "Name the longest river of Europe.",
            "Count the words of the sentence.",
            *last,
        ]
        assert [each["input"] for each in rows[:2]] == ["", "It rains."]
        assert [each["output"] for each in rows[:2]] == ["The Volga.", "2"]


def test_trigrams_are_counted_over_the_same_number_of_words() -> None:
    rows = [row("a b c a b c", output="a b c d")]  # a b c a b c a b c d
    assert measures.words_in(rows) == 10
    assert measures.distinct_3(rows, 9) == pytest.approx(3 / 7)
    assert measures.distinct_3(rows, 10) == pytest.approx(4 / 8)
    assert measures.distinct_3(rows, 11) is None


@pytest.mark.slow
def test_rows_that_are_alike_count_once() -> None:
    rows = [
        row("Name three rivers of Europe."),
        row("Name three rivers of Europe!"),
        row("Write a song about the first day of school."),
    ]
    assert measures.alike(rows, SentenceEncoder()) == {"unique": 2, "pairs": 1}
    assert measures.alike([], SentenceEncoder()) == {"unique": 0, "pairs": 0}


@pytest.mark.slow
def test_what_repeats_itself_or_another_row_is_taken_out() -> None:
    good = row("Name three rivers of Europe.", "The Rhine, the Elbe and the Volga.")
    rows = [
        good,
        row("Name three European rivers."),
        row("Why is the sky blue?", "blue blue blue blue blue"),
        row("Write a song about bread.", "Write a song about bread."),
        row("How long does an egg take to boil?", "word " * 200),
        row("What is the capital of France?", ""),
    ]
    assert list(filtered(rows)) == [good]
