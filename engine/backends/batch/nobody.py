"""Stands where a host would, in a run that asks in batches alone."""

from __future__ import annotations

from collections.abc import Sequence

from engine.backends.base import Failure, Verdict
from engine.errors import InternalError
from engine.records import Completion, Prompt

__all__ = ["Nobody"]


class Nobody:
    """A backend that is never asked; it has the model's name."""

    def __init__(self, provider: str, model: str) -> None:
        self.name = provider
        self.model = model
        self.context_length: int | None = None
        self.max_in_flight: int | None = 1

    async def start(self) -> None:
        return

    async def complete(self, prompts: Sequence[Prompt]) -> list[Completion | BaseException]:
        error = InternalError.of(RuntimeError("a request went live, and there is no host"))
        raise Failure(Verdict(kind="fatal", reason="no_host", message=str(error), error=error))

    async def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        return None

    async def aclose(self) -> None:
        return
