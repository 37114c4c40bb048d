"""What a run has used, to the billionth."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from engine.money import Prices, Spent
from engine.records import Usage


def spent(*usages: Usage) -> Spent:
    total = Spent()
    for usage in usages:
        total.add(usage)
    return total


PLAIN = Usage(prompt_tokens=1_000_000, completion_tokens=500_000)
CACHED = Usage(prompt_tokens=1_000_000, completion_tokens=0, cached_tokens=600_000)
THOUGHT = Usage(prompt_tokens=0, completion_tokens=1_000_000, reasoning_tokens=900_000)
STATED = Usage(
    prompt_tokens=1_000_000, completion_tokens=1_000_000, cached_tokens=400_000, cost=0.25
)
FREE = Usage(prompt_tokens=1_000_000, completion_tokens=0, cost=0.0)
ALL = Prices(prompt=2.0, completion=8.0, cached=0.5)

COSTS = [
    ("by both prices", ALL, (PLAIN,), 2.0 + 4.0),
    ("cached tokens have their own", ALL, (CACHED,), 0.8 + 0.3),
    ("or that of the others", Prices(prompt=2.0, completion=8.0), (CACHED,), 2.0),
    ("0 is a price", Prices(prompt=2.0, completion=8.0, cached=0.0), (CACHED,), 0.8),
    ("thoughts are written tokens", ALL, (THOUGHT,), 8.0),
    ("what is stated is believed", ALL, (STATED,), 0.25),
    ("also without prices", Prices(), (STATED, PLAIN), 0.25),
    ("free is stated too", ALL, (FREE,), 0.0),
    ("stated and not, together", ALL, (STATED, CACHED, PLAIN), 0.25 + 1.1 + 6.0),
    ("nothing", ALL, (), 0.0),
]


@pytest.mark.parametrize(
    ("prices", "usages", "cost"), [pytest.param(*row[1:], id=row[0]) for row in COSTS]
)
def test_costs(prices: Prices, usages: tuple[Usage, ...], cost: float) -> None:
    assert prices.cost(spent(*usages)) == pytest.approx(cost, abs=1e-12)


def test_tokens_are_counted_once_each() -> None:
    """Cached tokens are prompt tokens, and thoughts completion tokens."""
    total = spent(CACHED, THOUGHT, PLAIN)
    assert total.tokens == 3_500_000
    assert (total.cached_tokens, total.reasoning_tokens) == (600_000, 900_000)


def test_the_order_of_adding_does_not_matter() -> None:
    """A hundred stated costs that no binary fraction is: the same sum from either end."""
    usages = [Usage(prompt_tokens=1, completion_tokens=1, cost=n / 7e6) for n in range(100)]
    assert spent(*usages) == spent(*reversed(usages))


def test_a_run_goes_on_from_what_was_spent() -> None:
    later = Spent()
    later.begin_with(spent(STATED, PLAIN))
    later.add(CACHED)
    assert later == spent(STATED, PLAIN, CACHED)


@pytest.mark.parametrize(
    ("prices", "dearest", "known"),
    [
        (ALL, 8e-6, True),
        (Prices(prompt=9.0), 9e-6, True),
        (Prices(prompt=1.0, completion=2.0, cached=3.0), 3e-6, True),
        (Prices(prompt=0.0, completion=0.0), 0.0, True),
        (Prices(), 0.0, False),
    ],
)
def test_the_dearest_token(prices: Prices, dearest: float, known: bool) -> None:
    """What an attempt is reserved at."""
    assert (prices.dearest, prices.known) == (dearest, known)


@pytest.mark.parametrize("price", [-1.0, float("inf"), float("nan")])
def test_no_price_is_less_than_nothing_or_without_end(price: float) -> None:
    with pytest.raises(ValidationError):
        Prices(prompt=price)
