"""What may be used: requests and tokens a minute, and tokens and money in all.

Both are checked by reservation. A call reserves the most that it can use before it is sent and
settles what it did use afterwards, so a hundred calls that look at the same time cannot pass a
limit together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from engine.money import Prices, Spent
from engine.records import Usage

__all__ = ["Bucket", "Spending"]


class Bucket:
    """``per_min`` units a minute, paced: at most ``burst_s`` seconds' worth at once.

    A server's own headers (``x-ratelimit-remaining-…``) correct the level: others may use the same
    key, and a full minute at the start may be spent faster than the pace.
    """

    def __init__(self, per_min: float, *, burst_s: float = 1.0) -> None:
        self.per_min = per_min
        self._burst = max(per_min * burst_s / 60, 1.0)
        self._level = self._burst
        self._then_s: float | None = None

    def level(self, now_s: float) -> float:
        if self._then_s is not None:
            grown = (now_s - self._then_s) * self.per_min / 60
            self._level = max(self._level, min(self._level + grown, self._burst))
        self._then_s = now_s
        return self._level

    def ready_s(self, now_s: float, units: float) -> float:
        """When ``units`` can be taken. More than fits at once is let through when it is full."""
        short = min(units, self._burst) - self.level(now_s)
        return now_s + max(short, 0.0) * 60 / self.per_min

    def take(self, now_s: float, units: float) -> None:
        self._level = self.level(now_s) - units

    def give_back(self, units: float) -> None:
        self._level += units

    def correct(self, now_s: float, *, remaining: float, unseen: float) -> None:
        """The server says what is left; ``unseen`` units were sent that it cannot know of yet."""
        left = remaining - unseen
        if left < self.level(now_s) or left > self._burst:
            self._level = left


RESET = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?")


def told(headers: Mapping[str, str], unit: str) -> tuple[float, float] | None:
    """(limit a minute, remaining) of ``unit`` from ``x-ratelimit-*`` headers without that prefix.

    Some servers count by the day; what refills slower than in two minutes is not a pace.
    """
    try:
        limit, remaining = float(headers[f"limit-{unit}"]), float(headers[f"remaining-{unit}"])
    except (KeyError, ValueError):
        return None
    found = RESET.fullmatch(headers.get(f"reset-{unit}", "").strip())
    if found and (found[1] or found[2] or float(found[3] or 0) > 2):
        return None
    return (limit, remaining) if 0 < limit < float("inf") and remaining >= 0 else None


class Spending:
    """Tokens and money of a run, reserved before they are used.

    Args:
        max_tokens, max_cost: what the run may use; None: no bound.
        prices: of tokens whose cost no host states.
        batch_price: the share of them that tokens in batches cost.
    """

    def __init__(
        self,
        *,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        prices: Prices | None = None,
        batch_price: float = 1.0,
    ) -> None:
        self._max_tokens = max_tokens
        self._max_cost = max_cost
        self._prices = prices or Prices()
        self._batch_price = batch_price
        self._spent = Spent()
        self._reserved = 0
        self._reserved_in_batches = 0

    @property
    def tokens(self) -> int:
        """Tokens booked, those of which nobody knows at their most."""
        return self._spent.tokens + self._spent.lost_tokens

    @property
    def cost(self) -> float:
        """Money booked, likewise."""
        return self._prices.cost(self._spent) + self._prices.cost_of_lost(self._spent)

    def fits(self, tokens: int, *, batch: bool = False) -> bool:
        """Whether another ``tokens`` can be promised whatever becomes of all that is reserved."""
        live = self._reserved + (0 if batch else tokens)
        batched = self._reserved_in_batches + (tokens if batch else 0)
        if self._max_tokens is not None and self.tokens + live + batched > self._max_tokens:
            return False
        if self._max_cost is None:
            return True
        dear = (live + batched * self._batch_price) * self._prices.dearest
        return self.cost + dear <= self._max_cost

    def short_of(self, tokens: int | None = None) -> str:
        """Why there is no room for another request of so many tokens, or for a batch, and what to
        do about it.
        """
        most_tokens, most_cost, needs = self._max_tokens, self._max_cost, tokens or 0
        lost = f"{self._spent.lost_tokens:,}" if self._spent.lost_tokens else ""
        if most_tokens is not None and (most_cost is None or self.tokens + needs > most_tokens):
            spent, flag = f"{self.tokens:,} of {most_tokens:,} tokens", "--max-tokens-total"
            next_takes = f"{needs:,} tokens"
        else:
            spent, flag = f"{self.cost:.4g} of {most_cost:g}", "--max-cost"
            cost = self._prices.cost_of_lost(self._spent)
            lost = f"{cost:.4g}" if cost else ""
            next_takes = f"{needs * self._prices.dearest:.4g}"
        what, may_take = "batch", ""
        if tokens is not None:
            what, may_take = "request", f", and the next may take {next_takes}"
        besides = ""
        if lost:  # which looks like a wrong sum to whoever knows what the answers cost
            besides = f" ({lost} of it set aside for attempts that may have been billed)"
        return (
            f"the budget has no room for another {what}: {spent} are spent{besides}{may_take}; "
            f"raise {flag}, then resume"
        )

    def reserve(self, tokens: int, *, batch: bool = False) -> None:
        if batch:
            self._reserved_in_batches += tokens
        else:
            self._reserved += tokens

    def begin(self, spent: Spent) -> None:
        """Book what earlier sessions used."""
        self._spent.begin_with(spent)

    def settle(self, tokens: int, used: Usage | None = None, *, batch: bool = False) -> None:
        """Give back a reservation of ``tokens`` and book what a completion used."""
        self.reserve(-tokens, batch=batch)
        if used is not None:
            self._spent.add(used)

    def lose(self, tokens: int, taken: int | None = None) -> int:
        """Book for a reservation of ``tokens`` what was ``taken`` of it without an answer, or all
        of it where nobody knows; returns that.
        """
        self._reserved -= tokens
        lost = tokens if taken is None else min(taken, tokens)
        self._spent.lost_tokens += lost
        return lost
