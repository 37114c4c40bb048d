"""The cursor of a plan: what is next, what comes first after a restart, and how many are wanted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.run.plan import WINDOW, Plan


def test_a_new_plan_goes_on_from_the_first_request() -> None:
    plan = Plan()
    assert plan.take(3) == [0, 1, 2]
    assert plan.sent == 3
    assert plan.wanted(10) == 7
    assert plan.wanted(1) == 0
    assert plan.is_needless(1, needed=1)
    assert not plan.is_needless(0, needed=1)


def test_what_was_in_flight_and_what_was_skipped_comes_first() -> None:
    """Answered: 0 to 3, 5 and 8; 6 was in flight, 4 and 7 were never sent."""
    plan = Plan(answered_below=4, answered_beyond={5, 8}, in_flight=[6], undecided=2)
    assert plan.next_number == 9
    assert plan.take(4) == [4, 6, 7, 9]
    assert plan.to_decide == 2


def test_what_is_put_back_comes_first_in_its_order() -> None:
    plan = Plan()
    plan.take(2)
    plan.put_back(plan.take(2))
    assert plan.take(3) == [2, 3, 4]
    for number in (4, 2, 3):
        plan.put_back([number])
    assert plan.take(4) == [2, 3, 4, 5]


def test_what_holds_all_decisions_back_is_wanted_however_much_is_answered_behind_it() -> None:
    """A killed run: 5 was in flight, 6 to 40 are answered, and only two rows are missing."""
    plan = Plan(answered_below=5, answered_beyond=range(6, 41), in_flight=[5], undecided=5)
    assert plan.wanted(2) == 1
    assert plan.take(1) == [5]
    assert not plan.is_needless(5, needed=2)
    assert plan.wanted(2) == 0
    plan.answered(5)
    plan.undecided = 41
    assert plan.wanted(2) == 2


def test_what_was_in_flight_far_behind_is_not_wanted() -> None:
    plan = Plan(answered_below=5, in_flight=[5, 6, 7], undecided=5)
    assert plan.wanted(2) == 2
    assert plan.wanted(3) == 3
    assert plan.wanted(9) == 9


def test_the_end_of_the_input_ends_the_plan() -> None:
    plan = Plan()
    plan.take(5)
    plan.ends_before(4)
    assert (plan.end, plan.next_number) == (4, 4)
    assert plan.wanted(100) == 0
    assert not plan.is_complete
    for number in range(4):
        plan.answered(number)
    plan.undecided = 4
    assert plan.is_decided
    assert plan.is_complete
    plan.ends_before(9)
    assert plan.end == 4


def test_the_window_and_a_cap_bound_what_is_under_way() -> None:
    assert Plan().wanted(10**9) == WINDOW
    capped = Plan()
    assert capped.wanted(100, most=7) == 7
    capped.take(7)
    assert capped.wanted(100, most=7) == 0


@given(st.permutations(range(12)), st.integers(0, 12))
def test_answers_in_any_order_are_complete_up_to_the_first_that_is_missing(
    order: list[int], count: int
) -> None:
    plan = Plan()
    plan.take(12)
    for number in order[:count]:
        before = plan.answered_below
        assert plan.answered(number) is (plan.answered_below > before)
    missing = set(range(13)) - set(order[:count])
    assert plan.answered_below == min(missing)
