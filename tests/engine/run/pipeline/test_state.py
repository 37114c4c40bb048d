"""What follows from how far a run is: how many answers are called for, and what is at its end."""

from __future__ import annotations

import pytest

from engine.records import EVERY
from engine.run.pipeline.state import RunState
from engine.run.plan import Plan
from engine.run.progress import Pace, Progress


def state(
    *, target: int = 100, accepted: int = 0, decided: int = 0, sent: int = 0, **pace: object
) -> RunState:
    """A run whose answers are all decided but those of the requests sent beyond."""
    plan = Plan(answered_below=decided, undecided=decided)
    plan.take(max(0, sent - decided))
    progress = Progress(target=target, accepted=accepted, decided_answers=decided, most_records=10)
    return RunState(plan=plan, progress=progress, pace=Pace(target=target, **pace))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "accepted", "decided", "paid", "needed"),
    [
        pytest.param(1000, 0, 0, True, 100, id="at first as if each answer held the most"),
        pytest.param(10, 0, 0, True, 8, id="a server is busy before the first decision"),
        pytest.param(100, 0, 30, True, 60, id="nothing accepted: twice what was seen"),
        pytest.param(100, 50, 25, True, 22, id="by the yield so far"),
        pytest.param(100, 99, 50, True, 1, id="near the target no more than is missing"),
        pytest.param(100, 99, 50, False, 8, id="what costs nothing keeps the machine busy"),
        pytest.param(100, 100, 50, True, 0, id="at the target"),
        pytest.param(100, 100, 50, False, 0, id="at the target of what costs nothing"),
    ],
)
def test_how_many_answers_are_called_for(
    target: int, accepted: int, decided: int, paid: bool, needed: int
) -> None:
    """Records an answer are estimated from above: (accepted + 10) / (decided + 1)."""
    run = state(target=target, accepted=accepted, decided=decided, paid=paid)
    assert run.needed() == needed


def test_the_target_of_a_stage_that_feeds_another_is_only_that_of_now() -> None:
    assert state(accepted=100).is_reached
    assert not state(accepted=99).is_reached
    assert not state(accepted=100, feeds=True).is_reached


@pytest.mark.parametrize(
    ("changes", "quiet"),
    [({}, True), ({"in_flight": 1}, False), ({"committing": 1}, False)],
)
def test_a_run_is_quiet_where_only_batches_are_left(changes: dict[str, int], quiet: bool) -> None:
    run = state(decided=5)
    for name, value in changes.items():
        setattr(run, name, value)
    assert run.is_quiet is quiet


def test_a_run_with_an_answer_to_decide_is_not_quiet() -> None:
    run = state(decided=5, sent=6)
    run.plan.answered(5)
    assert not run.is_quiet


@pytest.mark.parametrize(
    ("settings", "exhausted"),
    [
        pytest.param({"decided": 7, "max_requests": 7}, True, id="all that were allowed"),
        pytest.param({"decided": 6, "max_requests": 7}, False, id="one more is allowed"),
        pytest.param({"decided": 6, "sent": 7, "max_requests": 7}, False, id="one undecided"),
        pytest.param({"decided": 7}, False, id="without a cap"),
        pytest.param({"decided": 7, "accepted": 100}, True, id="nothing more is wanted"),
        pytest.param(
            {"decided": 7, "accepted": 100, "feeds": True}, False, id="more may come to be wanted"
        ),
        pytest.param({"decided": 7, "max_requests": 7, "feeds": True}, True, id="fed all it can"),
        pytest.param({"decided": 7, "target": EVERY, "max_requests": 7}, True, id="every row"),
    ],
)
def test_when_nothing_more_may_be_sent(settings: dict[str, int], exhausted: bool) -> None:
    assert state(**settings).is_exhausted is exhausted


def test_a_run_is_not_exhausted_while_a_call_is_in_flight() -> None:
    run = state(decided=7, max_requests=7)
    run.in_flight = 1
    assert not run.is_exhausted


def test_an_input_that_grows_is_waited_for_up_to_the_cap() -> None:
    run = state(decided=7)
    run.plan.end, run.plan.grows = 7, True
    assert not run.is_exhausted
    run.plan.grows = False
    assert run.is_exhausted
    capped = state(decided=7, max_requests=7)
    capped.plan.end, capped.plan.grows = 7, True
    assert capped.is_exhausted
