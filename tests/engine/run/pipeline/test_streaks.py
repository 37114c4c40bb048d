"""Answers in a row that gave nothing."""

from __future__ import annotations

import pytest

from engine.decide.process import Batch
from engine.run.pipeline.decisions import Streaks
from engine.store import DecisionRows
from engine.thoughts import THOUGHTS_ONLY

THOUGHTS, NO, YES = THOUGHTS_ONLY, "too_short", None


def batch(first: int, *answers: list[str | None]) -> Batch:
    """The decisions on some answers, by their reasons."""
    decisions = [
        (first + place, position, reason, b"", 0)
        for place, reasons in enumerate(answers)
        for position, reason in enumerate(reasons)
    ]
    return Batch(first=first, end=first + len(answers), rows=DecisionRows(decisions, []))


@pytest.mark.parametrize(
    ("answers", "barren"),
    [
        ([[YES], [YES]], 0),
        ([[NO, NO], [NO]], 2),
        ([[NO, YES, NO]], 0),
        ([[YES], [NO], []], 2),  # in the last one no row was found
        ([[], [], [YES], [NO]], 1),
    ],
)
def test_answers_without_an_accepted_row(answers: list[list[str | None]], barren: int) -> None:
    streaks = Streaks()
    streaks.take_in(batch(0, *answers))
    assert streaks.barren == barren


@pytest.mark.parametrize(
    ("answers", "thoughts", "most"),
    [
        ([[THOUGHTS], [THOUGHTS]], 2, 2),
        ([[THOUGHTS], [THOUGHTS], [NO]], 0, 2),
        ([[THOUGHTS], [YES], [THOUGHTS]], 1, 1),
        ([[NO]], 0, 0),
    ],
)
def test_thoughts_in_a_row(answers: list[list[str | None]], thoughts: int, most: int) -> None:
    streaks = Streaks()
    streaks.take_in(batch(0, *answers))
    assert (streaks.thoughts, streaks.most_thoughts) == (thoughts, most)


def test_rows_go_on_from_batch_to_batch() -> None:
    streaks = Streaks()
    for first in range(0, 6, 2):
        streaks.take_in(batch(first, [THOUGHTS], [THOUGHTS]))
    assert (streaks.barren, streaks.thoughts, streaks.most_thoughts) == (6, 6, 6)
    streaks.take_in(batch(6, [YES]))
    assert (streaks.barren, streaks.thoughts, streaks.most_thoughts) == (0, 0, 0)
