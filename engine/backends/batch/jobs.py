"""The seam between a run and a provider's batch API: one ``Jobs`` a provider.

A provider takes a file with a request on each line, works on it for minutes or a day, and gives a
file with an answer on each line, in any order. Providers differ in their words alone, so ``Jobs``
puts those into ours and decides nothing: what is sent, waited for and tried again is up to
``engine.run.batches``.

Every method makes one attempt and raises Failure with the verdict on what went wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.backends.base import Verdict
from engine.records import Api

__all__ = ["ENDPOINTS", "Job", "Jobs", "Limits", "Order", "Result"]

ENDPOINTS: Mapping[Api, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
"""How a line names the API that it is for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a provider takes at most in one batch."""

    lines: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A batch that is about to be created."""

    tag: str
    """Ours: by it the batch is found again."""
    path: Path
    """Its requests, a line each."""
    lines: int
    model: str
    api: Api
    made_s: float
    """Unix time; the provider cannot have it for longer."""
    file: str = ""
    """The provider's name for the uploaded file; empty where requests go with the order itself."""
    others: frozenset[str] = frozenset()
    """Jobs of the provider's that are known to be other batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A batch as its provider tells of it."""

    id: str
    state: str
    """The provider's own word."""
    running: bool
    """Nothing of it can be fetched yet."""
    total: int | None = None
    done: int | None = None
    """Lines answered so far, or in the end; None where the provider does not say."""
    failed: int | None = None
    outputs: tuple[str, ...] = ()
    """Where its answers and errors are, for ``Jobs.download``."""
    failure: Verdict | None = None
    """It was refused as a whole: nothing ran, nothing is paid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One line of a provider's answers, in the words of OpenAI's API."""

    id: str
    """The request's."""
    status: int = 200
    body: Any = None
    ran: bool = True
    """False: the batch expired or was cancelled before this request's turn; it costs nothing."""


class Jobs(Protocol):
    """One provider's batch API.

    Attributes:
        name: for people and the store: ``openai``, ``anthropic``, …
        apis: by which its lines may ask.
        limits: of one batch.
        price_share: what an answer costs, as a share of the live one's price.
        counts_late: it tells how many are done only at the end.
    """

    name: str
    apis: tuple[Api, ...]
    limits: Limits
    price_share: float
    counts_late: bool

    def line(self, id: str, body: Mapping[str, Any], api: Api) -> Any:
        """The line of one request, whose ``body`` is in OpenAI's words."""

    def result(self, line: Any) -> Result | None:
        """What a line of the answers says; None where it is not about a request."""

    async def upload(self, order: Order) -> str:
        """Hand over the file of requests; its name there, empty where none is needed."""

    async def create(self, order: Order) -> Job:
        """Start the batch. After an ``ambiguous`` Failure it may run."""

    async def find(self, order: Order) -> Job | None:
        """The batch of this order, where the provider's list has it (yet)."""

    async def status(self, id: str) -> Job:
        """How far it is."""

    async def download(self, source: str, path: Path) -> None:
        """Fetch one of the job's ``outputs`` into ``path``, from its beginning."""

    async def cancel(self, id: str) -> None:
        """Ask to stop; what is answered by then stays and is paid."""

    async def delete(self, job: Job | None, file: str) -> None:
        """Remove what the provider keeps: answers of ``job``, if there is one, and ``file``."""

    async def aclose(self) -> None:
        """Release connections and children. Never raises."""
