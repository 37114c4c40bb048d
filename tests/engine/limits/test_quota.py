"""Paces and budgets, on a clock that the tests turn."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.limits.quota import Bucket, Spending, told
from engine.money import Prices
from engine.records import Usage


def test_a_bucket_keeps_its_pace() -> None:
    """Ten minutes of taking whenever it is ready never exceed the pace by more than one burst."""
    bucket, now_s, taken = Bucket(600), 0.0, 0
    while now_s < 600:
        now_s = max(now_s, bucket.ready_s(now_s, 1))
        bucket.take(now_s, 1)
        taken += 1
    assert 5990 <= taken <= 6020


def test_what_was_reserved_in_excess_comes_back() -> None:
    """A call that used less than the most it could leaves room for the next."""
    bucket = Bucket(60_000)
    bucket.take(0.0, 1000)
    assert bucket.ready_s(0.0, 1000) > 0.5
    bucket.give_back(900)
    assert bucket.ready_s(0.0, 1000) < 0.11


def test_a_call_larger_than_the_burst_waits_until_it_is_full() -> None:
    """Not for ever: the debt is paid off by those who come later."""
    bucket = Bucket(600)
    assert bucket.ready_s(0.0, 5000) == 0.0
    bucket.take(0.0, 5000)
    assert bucket.ready_s(0.0, 1) > 400


def test_headers_correct_the_level_both_ways() -> None:
    """Others use the same key, or a full minute lies ready: the server knows."""
    bucket = Bucket(600)
    bucket.correct(0.0, remaining=600, unseen=100)
    assert bucket.level(0.0) == 500
    bucket.correct(0.0, remaining=5, unseen=8)
    assert bucket.ready_s(0.0, 1) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({"limit-requests": "500", "remaining-requests": "499", "reset-requests": "120ms"},
         (500.0, 499.0)),
        ({"limit-requests": "10000", "remaining-requests": "9999", "reset-requests": "8.64s"},
         (10000.0, 9999.0)),
        ({"limit-requests": "200", "remaining-requests": "1", "reset-requests": "23h59m"}, None),
        ({"limit-requests": "200"}, None),
        ({"limit-requests": "many", "remaining-requests": "few"}, None),
        ({"limit-requests": "0", "remaining-requests": "0"}, None),
        ({"limit-requests": "inf", "remaining-requests": "1"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_quota_headers(headers: dict[str, str], found: tuple[float, float] | None) -> None:
    """A limit a minute is learned; one a day, half a pair or nonsense is not."""
    assert told(headers, "requests") == found


@given(
    cap=st.integers(0, 50_000),
    calls=st.lists(
        st.tuples(st.integers(1, 4000), st.floats(0, 1), st.sampled_from("used lost cut".split())),
        max_size=200,
    ),
    at_once=st.integers(1, 50),
)
def test_fault_115_the_budget_is_never_passed(
    cap: int, calls: list[tuple[int, float, str]], at_once: int
) -> None:
    """Whatever is used of what was reserved, and however many look together."""
    spending = Spending(max_tokens=cap, max_cost=cap * 2e-6, prices=Prices(prompt=1, completion=2))
    open_calls: list[tuple[int, float, str]] = []
    for call in calls:
        if spending.fits(call[0]):
            spending.reserve(call[0])
            open_calls.append(call)
        if len(open_calls) >= at_once or not spending.fits(call[0]):
            for tokens, share, became in open_calls:
                used = int(tokens * share)
                if became == "lost":
                    assert spending.lose(tokens) == tokens
                elif became == "cut":
                    assert spending.lose(tokens, 2 * used) == min(2 * used, tokens)
                else:
                    half = used // 2
                    usage = Usage(prompt_tokens=half, completion_tokens=used - half)
                    spending.settle(tokens, usage)
            open_calls = []
        assert spending.tokens <= cap
        assert spending.cost <= cap * 2e-6 * (1 + 1e-9)


def test_a_budget_that_has_no_room_names_the_bound_that_binds() -> None:
    """Of two the one that is in the way, in its own unit."""
    spending = partial(Spending, prices=Prices(prompt=1.0, completion=2.0))
    short = spending(max_tokens=1_000).short_of(2_000)
    assert "0 of 1,000 tokens are spent, and the next may take 2,000 tokens; raise" in short
    assert short.endswith("raise --max-tokens-total, then resume")
    short = spending(max_cost=0.003).short_of(2_000)
    assert "0 of 0.003 are spent, and the next may take 0.004; raise --max-cost," in short
    assert "raise --max-cost," in spending(max_tokens=9_000, max_cost=0.003).short_of(2_000)
    assert "another batch: 0 of 0.003 are spent; raise" in spending(max_cost=0.003).short_of()
