"""The seam between the engine and whatever generates text.

A backend makes **one attempt**: it knows nothing of limits, retries or other endpoints. Those
belong to ``limits.py`` and ``retry.py``, so that every backend, the scripted one of the tests
included, gets them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.records import Completion, Prompt

__all__ = ["Backend"]


class Backend(Protocol):
    """One place that answers prompts: an endpoint, or an engine in a child process or thread.

    Attributes:
        name: for people and the store: ``http://host:port``, ``transformers``, …
        model: the model id asked for.
        context_length: tokens that prompt and completion take together at most; None until known.
        max_in_flight: how many prompts make sense at once; None where the answers must tell.
    """

    name: str
    model: str
    context_length: int | None
    max_in_flight: int | None

    async def start(self) -> None:
        """Load or probe; find ``context_length``. Raises ConfigError, AuthError or
        UnavailableError.
        """

    async def complete(self, prompts: Sequence[Prompt]) -> list[Completion | BaseException]:
        """Answer prompts of one call, in their order; a failure of one of them stands in its place.

        Several prompts are given only to backends that batch (Alpaca's ``request_batch_size``).
        Raises BackendError (``engine.retry`` has its forms) where the whole call failed.
        """

    async def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        """Tokens of each text under the model's own tokenizer; None where it cannot be had."""

    async def aclose(self) -> None:
        """Release what ``start`` took. Never raises."""
