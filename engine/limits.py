"""How many requests are in flight, and where: one ``Pool`` over all endpoints.

Work asks for a ``Lease`` and gets it from the endpoint with the most room. Nothing here sleeps
while it holds one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.backends.base import Backend
from engine.errors import UnavailableError
from engine.records import Completion
from engine.retry import Verdict

__all__ = ["EndpointSnapshot", "Lease", "LimitSettings", "Pool"]


class LimitSettings(BaseModel):
    """What bounds a run's requests. None: no bound."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_in_flight: int | Literal["auto"] = "auto"
    """For each endpoint."""
    requests_per_min: float | None = Field(default=None, gt=0)
    tokens_per_min: float | None = Field(default=None, gt=0)
    max_tokens_total: int | None = Field(default=None, gt=0)
    """Tokens, prompt and completion together, that the run may use."""
    max_cost: float | None = Field(default=None, gt=0)
    """Money that the run may cost, in the unit of the two prices."""
    price_per_million_prompt_tokens: float = Field(default=0.0, ge=0)
    price_per_million_completion_tokens: float = Field(default=0.0, ge=0)
    max_outage_s: float = Field(default=600.0, gt=0)
    """How long no endpoint may answer before the run stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSnapshot:
    """One endpoint as the live view shows it."""

    name: str
    in_flight: int
    limit: int
    state: Literal["open", "closed", "probing"]
    """The breaker's, as an electrician has it: ``closed`` is working."""
    binds: str
    """Which capacity holds it back: ``limit``, ``requests_per_min``, ``tokens_per_min``,
    ``outage``, ``nothing``.
    """


class _Endpoint:
    def __init__(self, backend: Backend, limit: int) -> None:
        self.backend = backend
        self.limit = limit
        self.in_flight = 0


class Lease:
    """The right to have one call in flight on ``backend``, until ``release``."""

    __slots__ = ("_endpoint", "_pool", "backend", "tokens")

    def __init__(self, pool: Pool, endpoint: _Endpoint, tokens: int) -> None:
        self.backend = endpoint.backend
        self.tokens = tokens
        self._pool: Pool | None = pool
        self._endpoint = endpoint

    def release(self, results: Sequence[Completion | Verdict] = ()) -> None:
        """Give the slot back with what happened, for the controller and the budget. Twice is
        once.
        """
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._released(self._endpoint, self, results)


class Pool:
    """All endpoints of a run and what bounds them."""

    def __init__(self, backends: Sequence[Backend], settings: LimitSettings | None = None) -> None:
        self.settings = settings or LimitSettings()
        wanted = self.settings.max_in_flight
        self._endpoints = [
            _Endpoint(b, b.max_in_flight or (64 if wanted == "auto" else wanted)) for b in backends
        ]
        self._waiting: tuple[deque[asyncio.Future[Lease]], deque[asyncio.Future[Lease]]] = (
            deque(),
            deque(),
        )

    async def start(self) -> None:
        """Start every backend. Raises ConfigError, AuthError; UnavailableError where none
        answers.
        """
        errors = []
        for endpoint in self._endpoints:
            try:
                await endpoint.backend.start()
            except UnavailableError as exc:
                errors.append(exc)
        if len(errors) == len(self._endpoints):
            raise errors[0]

    async def run(self) -> None:
        """Watch the servers' own metrics until cancelled; for the pipeline's task group."""
        await asyncio.Event().wait()

    async def acquire(self, *, tokens: int, retry: bool = False) -> Lease:
        """A slot on the best endpoint, as soon as there is one; retries go before first attempts.

        ``tokens``: the most that the call can use, prompts and completions together.
        Raises StoppedError where the budget is used up, UnavailableError after ``max_outage_s``.
        """
        if not any(self._waiting) and (endpoint := self._best()) is not None:
            return self._lease(endpoint, tokens)
        future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        future.tokens = tokens  # type: ignore[attr-defined]
        self._waiting[0 if retry else 1].append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                future.result().release()
            raise

    @property
    def in_flight(self) -> int:
        return sum(e.in_flight for e in self._endpoints)

    @property
    def limit(self) -> int:
        return sum(e.limit for e in self._endpoints)

    def snapshot(self) -> list[EndpointSnapshot]:
        return [
            EndpointSnapshot(
                name=e.backend.name,
                in_flight=e.in_flight,
                limit=e.limit,
                state="closed",
                binds="limit" if e.in_flight >= e.limit else "nothing",
            )
            for e in self._endpoints
        ]

    async def aclose(self) -> None:
        for endpoint in self._endpoints:
            await endpoint.backend.aclose()

    def _best(self) -> _Endpoint | None:
        best = min(self._endpoints, key=lambda e: e.in_flight / e.limit)
        return best if best.in_flight < best.limit else None

    def _lease(self, endpoint: _Endpoint, tokens: int) -> Lease:
        endpoint.in_flight += 1
        return Lease(self, endpoint, tokens)

    def _released(
        self, endpoint: _Endpoint, lease: Lease, results: Sequence[Completion | Verdict]
    ) -> None:
        endpoint.in_flight -= 1
        for queue in self._waiting:
            while queue and (best := self._best()) is not None:
                future = queue.popleft()
                if not future.done():
                    future.set_result(self._lease(best, future.tokens))  # type: ignore[attr-defined]
