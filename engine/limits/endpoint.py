"""One endpoint behind the pool: its limit, its paces, its breaker, and how they look.

It never waits and knows no other endpoint; ``engine.limits.Pool`` asks it what it has room for and
tells it how each call ended.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from engine.backends.base import Backend, Verdict
from engine.limits.controller import Controller, Fixed, Ticket
from engine.limits.doubts import Doubts
from engine.limits.history import History
from engine.limits.quota import Bucket, told
from engine.money import Prices
from engine.records import Completion

__all__ = ["Endpoint", "EndpointLimits", "EndpointSnapshot", "LimitSettings", "WatchedServer"]

log = logging.getLogger(__name__)

UNAVAILABLE_IN_A_ROW = 3
FAULTS_IN_A_ROW = 10
"""Failures with no answer between them that open a breaker: not there; or there, but broken.
More with many in flight."""
SILENCES_IN_A_ROW = 3
"""The same for time-outs of a server that has answered nothing yet: what hangs from the start takes
minutes for each, and they are all that its first request has."""
REFUSALS_IN_A_ROW = 20
"""Refusals that blame the settings, after which one of several endpoints gets no more work."""
OPEN_S, MAX_OPEN_S = 0.5, 5.0
"""How long an open breaker waits before it lets one request try; doubles."""
NONE_IN_A_ROW = {"unavailable": 0, "ambiguous": 0, "settings": 0}
State = Literal["closed", "open", "probing"]
Binding = Literal[
    "nothing", "limit", "pause", "outage", "requests_per_min", "tokens_per_min", "budget"
]


class LimitSettings(BaseModel):
    """What bounds a run's requests. None: no bound."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_in_flight: int | Literal["auto"] = "auto"
    """For each endpoint."""
    requests_per_min: float | None = Field(default=None, gt=0)
    """For each endpoint, as is the next."""
    tokens_per_min: float | None = Field(default=None, gt=0)
    max_tokens_total: int | None = Field(default=None, gt=0)
    """Tokens, prompt and completion together, that the run may use."""
    max_cost: float | None = Field(default=None, gt=0)
    """Money that the run may cost, in the unit of the prices."""
    prices: Prices = Prices()
    batch_price: float = Field(default=1.0, gt=0, le=1)
    """The share of the prices that answers in batches cost."""
    max_outage_s: float = Field(default=600.0, gt=0)
    """How long no endpoint may answer, or all may refuse, before the run stops."""
    max_refusals_in_a_row: int = Field(default=20, gt=0)
    """Different requests, refused as if a setting were wrong and no answer between them, that end a
    run which had answers before.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointLimits:
    """One endpoint's own limits, over those of the settings."""

    weight: float = 1.0
    """Its share of the work relative to others with as much room."""
    max_in_flight: int | None = None
    requests_per_min: float | None = None
    tokens_per_min: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSnapshot:
    """One endpoint as the live view shows it."""

    name: str
    in_flight: int
    limit: int
    state: State
    """The breaker's: ``closed`` is working, ``open`` is not, ``probing`` lets one request try."""
    binds: Binding
    """What holds it back."""
    failure: str = ""
    """Why the breaker is open."""
    oldest_s: float = 0.0
    """How long the oldest call in flight has been waited for."""
    history: History
    """Why its limit is what it is."""


@runtime_checkable
class WatchedServer(Protocol):
    """What the pool also watches in a backend that is a server. HttpBackend has it."""

    quota: dict[str, str]
    """The latest ``x-ratelimit-*`` headers, names without that prefix."""

    @property
    def heard_at_s(self) -> float:
        """Loop time when it last sent anything for a generation."""

    @property
    def hung_after_s(self) -> float:
        """Silence of everything in flight that means its engine hangs."""

    @property
    def identity(self) -> tuple[str, str, int | None] | None:
        """(model, root, context length) as served."""

    def hang_up(self) -> None:
        """Close all connections: each generation in flight fails at once."""

    async def load(self) -> tuple[float, float, float] | None:
        """(running, waiting, preemptions) by its own gauges; None where it has none."""


class Endpoint:
    """One backend with its limit, paces and breaker."""

    def __init__(
        self,
        backend: Backend,
        settings: LimitSettings,
        own: EndpointLimits,
        controller: Callable[[], Controller],
        doubts: Doubts,
    ) -> None:
        fixed = own.max_in_flight or backend.max_in_flight
        if fixed is None and settings.max_in_flight != "auto":
            fixed = settings.max_in_flight
        self.backend = backend
        self.server = backend if isinstance(backend, WatchedServer) else None
        self.fixed = fixed is not None
        self.controller = controller() if fixed is None else Fixed(fixed)
        self.controller.history.name = backend.name
        self.in_flight = 0
        self._sent_s: dict[int, float] = {}
        """When each call in flight was admitted, oldest first, by the id of its ticket."""
        self.state: State = "closed"
        self.failure = ""
        self.asked_s = 0.0
        """How long the server last asked to wait, in its own words."""
        self._said_retired = False
        self._weight = own.weight
        self._doubts = doubts
        self._requests = _bucket(own.requests_per_min or settings.requests_per_min)
        self._tokens = _bucket(own.tokens_per_min or settings.tokens_per_min)
        self.alone = False
        """There is no other to give the work to."""
        self._in_a_row = dict(NONE_IN_A_ROW)
        self._opened = 0
        self._open_until_s = 0.0
        self._busy_since_s = 0.0
        self._longest_s = 0.0
        self._answered_s = float("-inf")  # when the latest request that was answered had been sent

    def limit(self, now_s: float) -> int:
        return max(int(self.controller.limit(now_s)), 1)

    @property
    def faults_in_a_row(self) -> int:
        return self._in_a_row["ambiguous"]

    def load(self, now_s: float) -> float:
        """How full it is, for comparing endpoints."""
        return (self.in_flight + 1) / (self.limit(now_s) * self._weight)

    def blocked(self, now_s: float, tokens: int) -> float | None:
        """When it may have room again (infinity: when something ends); None: it has room now."""
        return self._binding(now_s, tokens)[1]

    def _binding(self, now_s: float, tokens: int) -> tuple[Binding, float | None]:
        if self.state == "open":
            if now_s < self._open_until_s:
                return "outage", self._open_until_s
            self.state = "probing"
        if self.state == "probing" and self.in_flight:
            return "outage", float("inf")
        if now_s < self.controller.paused_until_s:
            return "pause", self.controller.paused_until_s
        if not self.controller.has_room(now_s):
            at_s = self.controller.next_change_s(now_s)
            return "limit", float("inf") if at_s is None else at_s
        if self._requests and (at_s := self._requests.ready_s(now_s, 1)) > now_s:
            return "requests_per_min", at_s
        if self._tokens and (at_s := self._tokens.ready_s(now_s, tokens)) > now_s:
            return "tokens_per_min", at_s
        return "nothing", None

    def admit(self, now_s: float, tokens: int) -> Ticket:
        if self.in_flight == 0:
            self._busy_since_s = now_s
        self.in_flight += 1
        if self._requests:
            self._requests.take(now_s, 1)
        if self._tokens:
            self._tokens.take(now_s, tokens)
        ticket = self.controller.admit(now_s)
        self._sent_s[id(ticket)] = now_s
        return ticket

    def finish(
        self,
        now_s: float,
        ticket: Ticket,
        tokens: int,
        results: Sequence[Completion | Verdict],
    ) -> int:
        """Take a call's end into account; how many of its prompts were answered."""
        self.in_flight -= 1
        self._sent_s.pop(id(ticket), None)
        answers = [r for r in results if isinstance(r, Completion)]
        verdicts = [r for r in results if isinstance(r, Verdict)]
        throttled = [v for v in verdicts if v.kind == "throttled"]
        if throttled:
            asked = [v.retry_after_s for v in throttled if v.retry_after_s is not None]
            # A little later than asked, and not all clients at the same moment.
            self.asked_s = max(asked, default=self.asked_s)
            wait_s = max(asked) * random.uniform(1.02, 1.1) + 0.01 if asked else None
            self.controller.refuse(ticket, now_s, wait_s)
        elif answers:
            written = sum(a.usage.completion_tokens for a in answers)
            self.controller.complete(ticket, now_s, written)
        else:
            self.controller.fail(now_s)
        if self._tokens:
            used = sum(a.usage.prompt_tokens + a.usage.completion_tokens for a in answers)
            self._tokens.give_back(max(tokens - used, 0))
        self._learn_quota(now_s)
        if answers:
            self._longest_s = max(0.999 * self._longest_s, now_s - ticket.at_s)
        answered = bool(answers or throttled)
        if answered:
            self._answered_s = max(self._answered_s, ticket.at_s)
        if answered or ticket.at_s >= self._answered_s:
            self._judge(now_s, answered=answered, verdicts=verdicts, sent=bool(results))
        return len(answers)

    def _judge(
        self, now_s: float, *, answered: bool, verdicts: Sequence[Verdict], sent: bool
    ) -> None:
        """The breaker: opened by failures in a row, closed by any answer. A failure says nothing
        where a request sent later was answered: what hangs outlives the rest.
        """
        if answered or any(v.kind in ("dead", "overflow") for v in verdicts):
            self._in_a_row = dict(NONE_IN_A_ROW)
            if self.state != "closed":
                log.info("%s answers again", self.backend.name)
            self.state, self._opened, self.failure = "closed", 0, ""
            return
        for verdict in verdicts:
            if verdict.kind in self._in_a_row and verdict.reason != "cancelled":
                self._in_a_row[verdict.kind] += 1
                others = self.in_flight  # a burst that fails while these are answered is no outage
                in_a_row = self._in_a_row
                # A prompt that hangs by itself is no silence: others were answered before it.
                unproven = self._answered_s < 0 and not self._doubts.answered_before
                silent = unproven and verdict.reason == "timeout"
                faults = SILENCES_IN_A_ROW if silent else FAULTS_IN_A_ROW
                refuses = in_a_row["settings"] >= max(REFUSALS_IN_A_ROW, others)
                if (
                    self.state == "probing"
                    or in_a_row["unavailable"] >= max(UNAVAILABLE_IN_A_ROW, others / 2)
                    or in_a_row["ambiguous"] >= max(faults, others)
                    or (refuses and not self.alone)
                ):
                    self.open(now_s, f"{verdict.reason}: {verdict.message}")
        if not sent and self.state == "probing":
            self.open(now_s, self.failure)

    def open(self, now_s: float, failure: str) -> None:
        if self.state == "open" and now_s < self._open_until_s:
            return
        if self.state == "closed":
            log.warning("%s is out of service: %s", self.backend.name, failure)
        wait_s = min(OPEN_S * 2.0 ** min(self._opened, 8), MAX_OPEN_S)
        self.state, self.failure = "open", failure
        self._opened += 1
        self._open_until_s = now_s + wait_s * random.uniform(0.8, 1.0)

    def retire(self, failure: str) -> None:
        """Give it no more work in this session; an answer that still comes takes that back."""
        if not self._said_retired:  # each call in flight comes to this
            log.warning("%s gets no more work: %s", self.backend.name, failure)
        self._said_retired = True
        self.state, self.failure = "open", failure
        self._open_until_s = float("inf")

    @property
    def retired(self) -> bool:
        return self.state == "open" and self._open_until_s == float("inf")

    def _learn_quota(self, now_s: float) -> None:
        """Paces from the headers of real answers; what the user set is not overruled upwards."""
        if self.server is None or not self.server.quota:
            return
        quota, self.server.quota = self.server.quota, {}
        if (found := told(quota, "requests")) is not None:
            self._requests = self._requests or Bucket(found[0])
            self._requests.correct(now_s, remaining=found[1], unseen=self.in_flight)
        if (found := told(quota, "tokens")) is not None:
            self._tokens = self._tokens or Bucket(found[0])
            self._tokens.correct(now_s, remaining=found[1], unseen=0)

    def look(self) -> None:
        """See whether all that is in flight has gone silent; then hang up."""
        if self.server is None or not self.in_flight or self.state == "open":
            return
        now_s = asyncio.get_running_loop().time()
        silent_s = now_s - max(self.server.heard_at_s, self._busy_since_s)
        if silent_s > max(self.server.hung_after_s, 3 * self._longest_s):
            self.open(now_s, f"alive but not generating: nothing heard for {silent_s:.0f} s")
            self.server.hang_up()

    async def read_gauges(self) -> None:
        """Ask the server for its queue, where that may change the limit."""
        if self.server is None or self.fixed or self.state != "closed" or not self.in_flight:
            return
        gauges = await self.server.load()
        if gauges is not None:
            self.controller.observe(asyncio.get_running_loop().time(), *gauges)

    def snapshot(self, now_s: float, *, broke: bool) -> EndpointSnapshot:
        binds = "budget" if broke else self._binding(now_s, 1)[0]
        return EndpointSnapshot(
            name=self.backend.name,
            in_flight=self.in_flight,
            limit=self.limit(now_s),
            state=self.state,
            binds=binds,
            failure=self.failure,
            oldest_s=max(0.0, now_s - next(iter(self._sent_s.values()), now_s)),
            history=self.controller.history,
        )


def _bucket(per_min: float | None) -> Bucket | None:
    return Bucket(per_min) if per_min else None
