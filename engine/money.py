"""What a run has used, and what that costs.

A host that states the cost of an answer is believed; all else is tokens times the prices that the
user gave. Sums are whole numbers, so that they do not depend on the order of adding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from engine.records import Usage

__all__ = ["NANO", "Prices", "Spent"]

NANO = 1_000_000_000
"""Stated costs are kept in billionths of the host's currency."""


@dataclass(slots=True, kw_only=True)
class Spent:
    """Tokens used, the cost that hosts stated themselves, and what may have been used besides."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Of ``prompt_tokens``."""
    reasoning_tokens: int = 0
    """Of ``completion_tokens``."""
    stated_nano: int = 0
    """The sum of all stated costs."""
    stated_prompt_tokens: int = 0
    """Tokens of the answers whose cost was stated; the next two likewise."""
    stated_cached_tokens: int = 0
    stated_completion_tokens: int = 0
    lost_tokens: int = 0
    """The most that may have been billed for no answer that is kept: attempts that failed after
    they were sent or were not waited for, at what was reserved for them. It is part of no other
    sum. In a store, those under way count too, so that a crash forgets none of them.
    """

    def add(self, usage: Usage) -> None:
        """Count one completion."""
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens
        self.cached_tokens += usage.cached_tokens
        self.reasoning_tokens += usage.reasoning_tokens
        if usage.cost is not None:
            self.stated_nano += round(usage.cost * NANO)
            self.stated_prompt_tokens += usage.prompt_tokens
            self.stated_cached_tokens += usage.cached_tokens
            self.stated_completion_tokens += usage.completion_tokens

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def begin_with(self, earlier: Spent) -> None:
        """Take over what was used before."""
        for each in fields(Spent):
            setattr(self, each.name, getattr(earlier, each.name))

    def take_over(self, other: Spent) -> None:
        """Add what was used elsewhere."""
        for each in fields(Spent):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


class Prices(BaseModel):
    """Money for a million tokens, in any one currency. None: not known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    completion: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    cached: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Of prompt tokens that the server's prefix cache holds; None: as other prompt tokens."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Prices:
        """Those that a run's settings name; 0 stood there in runs from before it could be left
        out.
        """
        return cls(
            prompt=settings.get("price_prompt") or None,
            completion=settings.get("price_completion") or None,
            cached=settings.get("price_cached"),
        )

    @property
    def known(self) -> bool:
        return self.prompt is not None or self.completion is not None

    @property
    def dearest(self) -> float:
        """The most that one token can cost."""
        return max(self.prompt or 0.0, self.completion or 0.0, self.cached or 0.0) / 1e6

    def cost(self, spent: Spent) -> float:
        """What ``spent`` costs: as stated, and by the prices where nothing was."""
        prompt = self.prompt or 0.0
        cached = prompt if self.cached is None else self.cached
        read_anew = spent.prompt_tokens - spent.cached_tokens
        read_anew -= spent.stated_prompt_tokens - spent.stated_cached_tokens
        read_cached = spent.cached_tokens - spent.stated_cached_tokens
        written = spent.completion_tokens - spent.stated_completion_tokens
        by_price = read_anew * prompt + read_cached * cached + written * (self.completion or 0.0)
        return spent.stated_nano / NANO + by_price / 1e6

    def cost_of_lost(self, spent: Spent) -> float:
        """The most that attempts without an answer can have cost, as far as prices are known."""
        return spent.lost_tokens * self.dearest

    def cost_if_known(self, spent: Spent) -> float | None:
        """The same; None where neither a host nor the person says what anything costs."""
        return self.cost(spent) if self.known or spent.stated_nano else None
