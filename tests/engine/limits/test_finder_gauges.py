"""What a server's own gauges say of the limit."""

from __future__ import annotations

import math

import pytest

from engine.limits.finder.gauges import Gauges


def read(gauges: Gauges, now_s: float, running: float, waiting: float, lost: float = 0,
         *, level: float = 100, in_flight: int = 100, ripe: bool = True) -> float:  # fmt: skip
    """The bound after a reading."""
    gauges.read(
        now_s, running, waiting, lost, in_flight=in_flight, level=level,
        full=in_flight >= 0.8 * level, ripe=ripe,
    )  # fmt: skip
    return gauges.bound(now_s).most


@pytest.mark.parametrize(
    ("running", "waiting", "in_flight", "most"),
    [
        (100, 0, 100, 200),  # nothing waits: double
        (40, 0, 40, math.inf),  # but not where the work lacks
        (100, 9, 100, math.inf),  # a few may wait
        (60, 40, 100, 63),  # a queue is cut off at its length, but for a twentieth
        (0, 50, 50, 1),  # never to nothing
    ],
)
def test_a_first_reading(running: float, waiting: float, in_flight: int, most: float) -> None:
    assert read(Gauges(), 1.0, running, waiting, in_flight=in_flight) == most


def test_an_old_reading_says_nothing() -> None:
    gauges = Gauges()
    assert read(gauges, 1.0, 60, 40) == gauges.bound(5.9).most == 63
    assert gauges.bound(6.1) == (math.inf, "the server's gauges are silent")


def test_after_a_queue_it_grows_by_steps() -> None:
    gauges = Gauges()
    level = read(gauges, 1.0, 60, 40)
    for second in range(2, 5):
        grown = read(gauges, float(second), level, 0, level=level, in_flight=int(level))
        assert grown == pytest.approx(1.25 * level)
        level = grown
    assert gauges.bound(4.0).why == "nothing waits in the server's queue"


def test_lost_room_is_given_back_and_not_filled_at_once() -> None:
    """Preemptions cut by a tenth; the level that had them is only come halfway to for a minute."""
    gauges = Gauges()
    read(gauges, 1.0, 100, 9, 50)  # all since the server started
    assert gauges.bound(1.0).most == math.inf
    assert read(gauges, 2.0, 100, 0, 54) == pytest.approx(90)
    halfway = read(gauges, 3.0, 90, 0, 54, level=90, in_flight=90)
    assert halfway == pytest.approx((90 * 100) ** 0.5)
    assert read(gauges, 4.0, 95, 0, 54, level=97, in_flight=97) == halfway  # near enough
    assert read(gauges, 5.0, 95, 0, 54, level=80, in_flight=80, ripe=False) == halfway  # too early
    assert read(gauges, 63.0, 95, 0, 54, level=97, in_flight=97) == pytest.approx(1.25 * 97)
