"""Refusals by chance or a limit's, told apart by evidence."""

from __future__ import annotations

import random

import pytest

from engine.limits.finder.chance import Chance


def proofs(ends: str, *, expected: bool = False) -> list[int]:
    """What each ``x`` (refused) among ``.`` (taken) proves."""
    chance = Chance()
    refused = [number for number, end in enumerate(ends, 1) if end == "x"]
    return [chance.refused(number, expected=expected) for number in refused]


@pytest.mark.parametrize(
    ("ends", "expected", "found"),
    [
        ("xx", False, [0, 0]),  # two may be chance
        ("xxx", False, [0, 0, 3]),  # three in a row are not
        ("x.x.x", False, [0, 0, 3]),  # or nearly so
        ("x" + 60 * "." + "x" + 60 * "." + "x", False, [0, 0, 0]),  # those far apart may be
        ("xx", True, [0, 2]),  # beyond a limit that was found, two are enough
        (2000 * "." + "x", True, [1]),  # or one, where none came by chance for long
        (2000 * "." + "x", False, [0]),
        ("xxxxxx", False, [0, 0, 3, 0, 0, 3]),  # each proof starts from nothing
    ],
)
def test_what_is_a_proof(ends: str, *, expected: bool, found: list[int]) -> None:
    assert proofs(ends, expected=expected) == found


@pytest.mark.parametrize("share", [0.01, 0.03, 0.1])
def test_chance_is_learnt_and_seldom_taken_for_a_limit(share: float) -> None:
    """Ten thousand requests refused at random: after the first few hundred, no more than one
    in a thousand proves a limit.
    """
    random.seed(1)
    chance, later = Chance(), 0
    for number in range(10_000):
        if random.random() < share:
            later += bool(chance.refused(number)) and number > 500
    assert later <= 10
    assert chance.share == pytest.approx(share, rel=0.5)


def test_refusals_that_come_back_out_of_order_are_no_row() -> None:
    """A hundred are sent at once, ten are refused by chance, the last of them first."""
    chance = Chance()
    assert [chance.refused(number) for number in range(100, 0, -10)] == 10 * [0]
    assert chance.share < 0.01


def test_a_limits_own_refusals_do_not_excuse_it() -> None:
    """Half of all are refused, for long: proof after proof to the end."""
    assert sum(map(bool, proofs(1000 * "x."))) > 100


def test_what_is_known_from_elsewhere_is_believed() -> None:
    chance = Chance()
    chance.learn(10, 90)
    assert chance.share == pytest.approx(0.1)
    assert [chance.refused(number) for number in (1, 2, 3)] == [0, 0, 0]
