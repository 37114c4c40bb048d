"""The least of what the witnesses say, and its history."""

from __future__ import annotations

import math

import pytest

from engine.limits.finder.bound import Bound
from engine.limits.finder.finder import Adaptive
from engine.limits.finder.goodput import Phase
from engine.limits.history import Witness


@pytest.mark.parametrize(
    ("refusals", "gauges", "most", "who"),
    [
        (math.inf, math.inf, 4.0, Witness.GOODPUT),  # neither has a number
        (10.0, math.inf, 10.0, Witness.REFUSALS),  # goodput is not asked beside them
        (math.inf, 7.0, 7.0, Witness.GAUGES),
        (10.0, 7.0, 7.0, Witness.GAUGES),
        (5.0, 7.0, 5.0, Witness.REFUSALS),
        (9000.0, math.inf, 4096.0, Witness.REFUSALS),  # never beyond the ceiling
    ],
)
def test_the_least_holds(refusals: float, gauges: float, most: float, who: Witness) -> None:
    controller = Adaptive()
    controller.observe(0.0, running=1, waiting=0, preemptions=0)
    if refusals < math.inf:
        controller._refusals.bound = Bound(refusals, "refused")
    if gauges < math.inf:
        controller._gauges._bound = Bound(gauges, "it queues")
    controller.complete(controller.admit(0.0), 1.0, 100)
    assert controller.limit(60.0) == most
    assert controller.history.who is who
    assert [change.new for change in controller.history.changes] == [int(most)] * (most != 4.0)


def test_gauges_that_fall_silent_leave_what_they_found() -> None:
    """Five seconds without a reading: goodput goes on from their number."""
    controller = Adaptive()
    tickets = [controller.admit(0.0) for _ in range(4)]
    controller.observe(1.0, running=1, waiting=3, preemptions=0)
    assert (controller.limit(1.0), controller.history.who) == (1.05, Witness.GAUGES)
    controller.complete(tickets[0], 3.0, 10)
    assert controller.history.who is Witness.GAUGES
    controller.complete(tickets[1], 7.0, 10)
    assert (controller.limit(7.0), controller.history.who) == (1.05, Witness.GOODPUT)
    assert controller.history.why == "the server's gauges are silent"


def test_a_number_that_is_outdated_is_doubled_from() -> None:
    """The refusals' bound is gone, and says why: goodput goes on from its number."""
    controller = Adaptive()
    controller._refusals.bound = Bound(10.0, "refused with 10 in flight")
    controller.complete(controller.admit(0.0), 1.0, 100)
    controller._refusals.bound = Bound(math.inf, "no longer refused with 10 in flight")
    controller.complete(controller.admit(2.0), 3.0, 100)
    assert controller._goodput.phase is Phase.DOUBLING
    assert (controller.limit(9.0), controller.history.who) == (10.0, Witness.GOODPUT)
    assert controller.history.why == "no longer refused with 10 in flight"
