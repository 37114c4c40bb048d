"""Settings of how much is asked at once, and of what it may cost."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from engine.sections import FREE, Flag, Positive, Price, Section

__all__ = ["BudgetSection", "PriceSection", "RateSection"]


class RateSection(Section):
    """Limits of each endpoint."""

    heading: ClassVar[str] = "How much at once"

    max_in_flight: Annotated[
        Positive | Literal["auto"], FREE, Flag("Requests at once, for each endpoint.")
    ] = "auto"
    requests_per_min: Annotated[Positive | None, FREE, Flag("Limit of each endpoint.")] = None
    tokens_per_min: Annotated[Positive | None, FREE, Flag("Limit of each endpoint.")] = None


class PriceSection(Section):
    """In the currency of ``max_cost``."""

    heading: ClassVar[str] = "Prices"

    price_prompt: Annotated[Price | None, FREE, Flag("Price of a million prompt tokens.")] = None
    price_completion: Annotated[
        Price | None, FREE, Flag("Price of a million completion tokens.")
    ] = None
    price_cached: Annotated[
        Price | None,
        FREE,
        Flag(
            "Price of a million prompt tokens that the host had cached.", shown="as --price-prompt"
        ),
    ] = None


class BudgetSection(Section):
    """What the run may use up in all."""

    heading: ClassVar[str] = "Budget"

    max_cost: Annotated[
        Annotated[float, Field(gt=0, allow_inf_nan=False)] | None,
        FREE,
        Flag("Stop before it costs more than this."),
    ] = None
    max_tokens_total: Annotated[
        Positive | None, FREE, Flag("Stop before more tokens than this.")
    ] = None
