"""A rate, learnt from the refusals of a server that counts by the minute."""

from __future__ import annotations

import pytest

from engine.limits.finder.rate import Rate


@pytest.mark.parametrize("began_s", [0.0, 1e5])
def test_a_rate_is_what_is_taken_between_two_refusals(began_s: float) -> None:
    """Whatever the clock shows at the start."""
    rate = Rate()
    rate.mark(began_s, 1000)
    assert rate.learn(began_s + 10, 1200, None)
    assert rate.per_s == pytest.approx(20, rel=0.02)
    assert rate.learn(began_s + 30, 1400, None)
    assert rate.per_s == pytest.approx(10, rel=0.02)  # kept for long: measured from the latest


@pytest.mark.parametrize("taken", [9, 90, 900])
def test_a_rate_is_known_better_the_more_was_taken(taken: int) -> None:
    """Just more than what was taken, by one request; a tenth of the error for ten times as many."""
    rate = Rate()
    rate.mark(1.0, 15)
    rate.learn(1.0 + 4 * taken, 15 + taken, None)
    assert 0.2475 <= (rate.per_s or 0) <= 0.25 * (1 + 1 / taken)


@pytest.mark.parametrize(
    ("took_s", "wait_s", "silence_s"),
    [
        (0.5, None, 1.0),  # too short to measure
        (5.0, None, 0.245),  # as long as one request takes
        (5.0, 3.0, 3.0),  # as the server asks for
    ],
)
def test_silence_after_a_refusal(took_s: float, wait_s: float | None, silence_s: float) -> None:
    rate = Rate()
    rate.mark(0.0, 0)
    rate.learn(took_s, int(4 * took_s), wait_s)
    assert rate.next_s == pytest.approx(took_s + silence_s, abs=0.01)


def test_after_a_while_a_little_more_is_tried() -> None:
    """Not before 160 were taken; then more and more, until it is refused."""
    rate = Rate()
    rate.mark(0.0, 0)
    rate.learn(10.0, 200, None)
    per_s = rate.per_s or 0
    assert not rate.rise(100.0, 359)
    assert rate.rise(100.0, 360)
    assert rate.per_s == pytest.approx(1.05 * per_s)
    assert not rate.rise(101.0, 1000)
    assert rate.rise(104.0, 1000)
    assert rate.per_s == pytest.approx(1.05 * 1.1 * per_s)
    assert "about 1,379 a minute; set --requests-per-min" in rate.bound(1.0).why


@pytest.mark.parametrize(("between", "kept"), [(1, False), (5, False), (200, True)])
def test_refusals_that_no_rate_explains_end_it(between: int, *, kept: bool) -> None:
    """Each refusal of a clock comes after about as many as all before; by chance they do not."""
    rate = Rate()
    rate.mark(0.0, 0)
    learnt = [rate.learn(float(count), count * between, None) for count in range(1, 20)]
    assert all(learnt) is kept
    assert learnt[:3] == 3 * [True]
    assert (rate.per_s is not None) is kept
