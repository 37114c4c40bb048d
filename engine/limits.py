"""How many requests are in flight, and where: one ``Pool`` over all endpoints.

Work asks for a ``Lease`` and gets it from the endpoint with the most room; retries go before first
attempts while they are few. What holds an endpoint back is one of these, and ``snapshot`` says
which: its limit (``engine.controller``, or a fixed number), requests or tokens a minute, the money
of the run (``engine.quota``), a pause that it asked for, or its breaker.

Nothing here sleeps: a release or a timer wakes whoever can go on, so a limit costs no CPU while it
binds. The pool alone knows all endpoints, so it is also the one that gives up: after
``max_outage_s`` without an answer from anywhere.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from engine.backends.base import Backend
from engine.controller import Adaptive, Controller, Ticket
from engine.errors import ConfigError, StoppedError, UnavailableError, WoolmillError
from engine.quota import Bucket, Spending, told
from engine.records import Completion
from engine.retry import Verdict

__all__ = ["EndpointLimits", "EndpointSnapshot", "Lease", "LimitSettings", "Pool", "WatchedServer"]

log = logging.getLogger(__name__)

UNAVAILABLE_IN_A_ROW = 3
FAULTS_IN_A_ROW = 10
"""Failures with no answer between them that open a breaker: not there; or there, but broken.
More with many in flight."""
OPEN_S, MAX_OPEN_S = 0.5, 5.0
"""How long an open breaker waits before it lets one request try; doubles."""
RETRY_SHARE = 0.1
"""Retries that go before first attempts, as a share of the answers; more wait for their turn."""
POLL_S = 1.0

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
    """Money that the run may cost, in the unit of the two prices."""
    price_per_million_prompt_tokens: float = Field(default=0.0, ge=0)
    price_per_million_completion_tokens: float = Field(default=0.0, ge=0)
    max_outage_s: float = Field(default=600.0, gt=0)
    """How long no endpoint may answer, or all may refuse, before the run stops."""


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


@runtime_checkable
class WatchedServer(Protocol):
    """What the pool also watches in a backend that is a server. HttpBackend has it."""

    quota: dict[str, str]
    """The latest ``x-ratelimit-*`` headers, names without that prefix."""
    heard_at_s: float
    """Loop time when it last sent anything for a generation."""
    hung_after_s: float
    """Silence of everything in flight that means its engine hangs."""

    @property
    def identity(self) -> tuple[str, str, int | None] | None:
        """(model, root, context length) as served."""

    def hang_up(self) -> None:
        """Close all connections: each generation in flight fails at once."""

    async def load(self) -> tuple[float, float, float] | None:
        """(running, waiting, preemptions) by its own gauges; None where it has none."""


class Lease:
    """The right to have one call in flight on ``backend``, until ``release``."""

    __slots__ = ("_endpoint", "_pool", "_ticket", "backend", "tokens")

    def __init__(self, pool: Pool, endpoint: _Endpoint, ticket: Ticket, tokens: int) -> None:
        self.backend = endpoint.backend
        self.tokens = tokens
        self._pool: Pool | None = pool
        self._endpoint = endpoint
        self._ticket = ticket

    def release(self, results: Sequence[Completion | Verdict] = ()) -> None:
        """Give the slot back with what happened; nothing, where nothing was sent. Twice is once."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._released(self._endpoint, self._ticket, self.tokens, results)


class Pool:
    """All endpoints of a run and what bounds them.

    Args:
        backends: started by ``start``, closed by ``aclose``.
        settings: for all of them together or each, as they say.
        own: limits of single endpoints, in the backends' order.
        controller: what finds the limit of an endpoint that has none; benchmarks try others.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        settings: LimitSettings | None = None,
        own: Sequence[EndpointLimits] = (),
        controller: Callable[[], Controller] = Adaptive,
    ) -> None:
        self.settings = settings = settings or LimitSettings()
        own = list(own) or [EndpointLimits()] * len(backends)
        self._endpoints = [
            _Endpoint(backend, settings, limits, controller())
            for backend, limits in zip(backends, own, strict=True)
        ]
        self._spending = Spending(
            max_tokens=settings.max_tokens_total,
            max_cost=settings.max_cost,
            prompt_price=settings.price_per_million_prompt_tokens / 1e6,
            completion_price=settings.price_per_million_completion_tokens / 1e6,
        )
        self._retries: deque[_Waiter] = deque()
        self._fresh: deque[_Waiter] = deque()
        self._retry_credit = 10.0
        self._timer: asyncio.TimerHandle | None = None
        self._down_since_s: float | None = None
        self._refused_since_s: float | None = None
        self._last_failure = ""

    # What the pipeline and ``engine.retry`` call

    async def start(self) -> None:
        """Start every backend. Those that do not answer are tried again when work is there.

        Raises ConfigError (also where replicas serve different models), AuthError;
        UnavailableError where none answers.
        """
        errors: list[WoolmillError] = []
        now_s = asyncio.get_running_loop().time()
        for endpoint in self._endpoints:
            try:
                await endpoint.backend.start()
            except UnavailableError as exc:
                errors.append(exc)
                endpoint.open(now_s, str(exc))
        if len(errors) == len(self._endpoints):
            raise errors[0]
        self._compare()

    def _compare(self) -> None:
        """Replicas of one run serve one model; two behind one name would mix two data sets."""
        first: tuple[str, str] | None = None
        for endpoint in self._endpoints:
            server = endpoint.server
            if server is None or server.identity is None:
                continue
            model, root, _ = server.identity
            first = first or (model, root)
            if (model, root) != first:
                raise ConfigError(
                    f"{endpoint.backend.name}: serves {model} ({root}), the others {first[0]} "
                    f"({first[1]}); one run needs one model"
                )

    async def run(self) -> None:
        """Watch the servers until cancelled; for the pipeline's task group.

        Their gauges are to be had only by asking, so it asks, once a second, and looks at the same
        time whether everything in flight has gone silent.
        """
        watched = [endpoint for endpoint in self._endpoints if endpoint.server is not None]
        if not watched:
            return
        while True:
            await asyncio.sleep(POLL_S)
            for endpoint in watched:
                await endpoint.watch()
            self._wake()

    async def acquire(
        self, *, tokens: int, retry: bool = False, avoid: Backend | None = None
    ) -> Lease:
        """A slot on the best endpoint, as soon as there is one; retries go before first attempts.

        ``tokens``: the most that the call can use, prompts and completions together.
        ``avoid``: the backend that has just failed; taken only where no other has room.
        Raises StoppedError where the budget is used up or all endpoints only refuse,
        UnavailableError after ``max_outage_s``.
        """
        now_s = asyncio.get_running_loop().time()
        if not self._fresh and not self._retries:
            lease = self._grant(now_s, tokens, avoid)
            if lease is not None:
                return lease
        if retry and self._retry_credit >= 1:
            self._retry_credit -= 1
            queue = self._retries
        else:
            queue = self._fresh
        waiter = _Waiter(tokens, avoid, asyncio.get_running_loop().create_future())
        queue.append(waiter)
        self._wake()
        try:
            return await waiter.future
        except asyncio.CancelledError:
            if waiter.future.done() and not waiter.future.cancelled():
                waiter.future.result().release()
            raise

    @property
    def in_flight(self) -> int:
        return sum(endpoint.in_flight for endpoint in self._endpoints)

    @property
    def limit(self) -> int:
        now_s = asyncio.get_running_loop().time()
        return sum(endpoint.limit(now_s) for endpoint in self._endpoints)

    @property
    def tokens_used(self) -> int:
        """Tokens booked so far, those of failed attempts at their most."""
        return self._spending.tokens

    @property
    def cost(self) -> float:
        """Money booked so far, in the unit of the prices."""
        return self._spending.cost

    def snapshot(self) -> list[EndpointSnapshot]:
        now_s = asyncio.get_running_loop().time()
        waiting = self._retries or self._fresh
        broke = bool(waiting) and not self._spending.fits(waiting[0].tokens)
        return [endpoint.snapshot(now_s, broke=broke) for endpoint in self._endpoints]

    async def aclose(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for endpoint in self._endpoints:
            await endpoint.backend.aclose()

    # Who goes next

    def _grant(self, now_s: float, tokens: int, avoid: Backend | None) -> Lease | None:
        if not self._spending.fits(tokens):
            return None
        best, least = None, 0.0
        for endpoint in self._endpoints:
            if endpoint.blocked(now_s, tokens) is None:
                load = endpoint.load(now_s) + (1e6 if endpoint.backend is avoid else 0.0)
                if best is None or load < least:
                    best, least = endpoint, load
        if best is None:
            return None
        self._spending.reserve(tokens)
        return Lease(self, best, best.admit(now_s, tokens), tokens)

    def _released(
        self,
        endpoint: _Endpoint,
        ticket: Ticket,
        tokens: int,
        results: Sequence[Completion | Verdict],
    ) -> None:
        now_s = asyncio.get_running_loop().time()
        self._book(tokens, results)
        used = endpoint.finish(now_s, ticket, tokens, results)
        if used:
            self._retry_credit = min(self._retry_credit + RETRY_SHARE * used, 100.0)
            self._down_since_s = self._refused_since_s = None
        for result in results:
            if isinstance(result, Verdict):
                self._last_failure = f"{endpoint.backend.name}: {result.reason}: {result.message}"
                if result.kind == "throttled" and self._refused_since_s is None:
                    self._refused_since_s = now_s
        if self._down_since_s is None and all(e.state != "closed" for e in self._endpoints):
            self._down_since_s = now_s
        self._wake()

    def _book(self, tokens: int, results: Sequence[Completion | Verdict]) -> None:
        """Settle a call's reservation; whatever may have been billed counts in full."""
        share, rest = divmod(tokens, max(len(results), 1))
        for i, result in enumerate(results):
            reserved = share + (rest if i == 0 else 0)
            if isinstance(result, Completion):
                usage = result.usage
                self._spending.settle(
                    reserved, prompt=usage.prompt_tokens, completion=usage.completion_tokens
                )
            elif result.billed:
                self._spending.lose(reserved)
            else:
                self._spending.settle(reserved, prompt=0, completion=0)
        if not results:
            self._spending.settle(tokens, prompt=0, completion=0)

    def _wake(self) -> None:
        """Hand out what there is room for, and set the timer for when there will be more."""
        now_s = asyncio.get_running_loop().time()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while queue := self._retries or self._fresh:
            waiter = queue[0]
            if not waiter.future.done():
                lease = self._grant(now_s, waiter.tokens, waiter.avoid)
                if lease is None:
                    break
                waiter.future.set_result(lease)
            queue.popleft()
        else:
            return
        error = self._hopeless(now_s, waiter.tokens)
        if error is not None:
            self._give_up(error)
            return
        ends_s = [s for s in (self._down_since_s, self._refused_since_s) if s is not None]
        at_s = [s for e in self._endpoints if (s := e.blocked(now_s, waiter.tokens)) is not None]
        at_s += [s + self.settings.max_outage_s for s in ends_s]
        soonest_s = min(at_s, default=float("inf"))
        if soonest_s < float("inf"):
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(soonest_s, now_s + 1e-4), self._wake)

    def _hopeless(self, now_s: float, tokens: int) -> WoolmillError | None:
        """Why waiting longer is of no use, if it is not."""
        settings = self.settings
        if not self._spending.fits(tokens) and self.in_flight == 0:
            return StoppedError(
                f"the budget is used up: {self._spending.tokens:,} tokens, cost "
                f"{self._spending.cost:.4g}, and the next call may take {tokens:,}; raise "
                "--max-tokens-total or --max-cost, then resume"
            )
        if self._down_since_s is not None and now_s - self._down_since_s >= settings.max_outage_s:
            return UnavailableError(
                f"no endpoint has answered for {settings.max_outage_s:g} s "
                f"({self._last_failure}); bring the server back, then resume"
            )
        refused = self._refused_since_s
        if refused is not None and now_s - refused >= settings.max_outage_s:
            return StoppedError(
                f"every request has been refused for {settings.max_outage_s:g} s "
                f"({self._last_failure}); set --requests-per-min or wait, then resume"
            )
        wait_s = min(e.controller.paused_until_s for e in self._endpoints) - now_s
        if wait_s > settings.max_outage_s:
            return StoppedError(
                f"the server asks to wait {wait_s:.0f} s, longer than --max-outage "
                f"({self._last_failure}); resume later"
            )
        return None

    def _give_up(self, error: WoolmillError) -> None:
        for queue in (self._retries, self._fresh):
            for waiter in queue:
                if not waiter.future.done():
                    waiter.future.set_exception(error)
            queue.clear()


@dataclass(slots=True, eq=False)
class _Waiter:
    tokens: int
    avoid: Backend | None
    future: asyncio.Future[Lease]


class _Endpoint:
    """One backend with its limit, paces and breaker."""

    def __init__(
        self,
        backend: Backend,
        settings: LimitSettings,
        own: EndpointLimits,
        controller: Controller,
    ) -> None:
        fixed = own.max_in_flight or backend.max_in_flight
        if fixed is None and settings.max_in_flight != "auto":
            fixed = settings.max_in_flight
        self.backend = backend
        self.server = backend if isinstance(backend, WatchedServer) else None
        self.fixed = fixed
        self.controller = controller
        self.in_flight = 0
        self.state: State = "closed"
        self.failure = ""
        self._weight = own.weight
        self._requests = _bucket(own.requests_per_min or settings.requests_per_min)
        self._tokens = _bucket(own.tokens_per_min or settings.tokens_per_min)
        self._in_a_row = {"unavailable": 0, "ambiguous": 0}
        self._opened = 0
        self._open_until_s = 0.0
        self._busy_since_s = 0.0
        self._longest_s = 0.0

    def limit(self, now_s: float) -> int:
        return self.fixed or max(int(self.controller.limit(now_s)), 1)

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
        if self.fixed:
            if self.in_flight >= self.fixed:
                return "limit", float("inf")
        elif not self.controller.has_room(now_s):
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
        return self.controller.admit(now_s)

    def finish(
        self,
        now_s: float,
        ticket: Ticket,
        tokens: int,
        results: Sequence[Completion | Verdict],
    ) -> int:
        """Take a call's end into account; how many of its prompts were answered."""
        self.in_flight -= 1
        answers = [r for r in results if isinstance(r, Completion)]
        verdicts = [r for r in results if isinstance(r, Verdict)]
        throttled = [v for v in verdicts if v.kind == "throttled"]
        if throttled:
            asked = [v.retry_after_s for v in throttled if v.retry_after_s is not None]
            # A little later than asked, and not all clients at the same moment.
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
        self._judge(
            now_s, answered=bool(answers or throttled), verdicts=verdicts, sent=bool(results)
        )
        return len(answers)

    def _judge(
        self, now_s: float, *, answered: bool, verdicts: Sequence[Verdict], sent: bool
    ) -> None:
        """The breaker: opened by failures in a row, closed by any answer."""
        if answered or any(v.kind in ("dead", "overflow") for v in verdicts):
            self._in_a_row = {"unavailable": 0, "ambiguous": 0}
            if self.state != "closed":
                log.info("%s answers again", self.backend.name)
            self.state, self._opened, self.failure = "closed", 0, ""
            return
        for verdict in verdicts:
            if verdict.kind in self._in_a_row and verdict.reason != "cancelled":
                self._in_a_row[verdict.kind] += 1
                others = (
                    self.in_flight
                )  # a burst that fails while the rest is answered is no outage
                if (
                    self.state == "probing"
                    or self._in_a_row["unavailable"] >= max(UNAVAILABLE_IN_A_ROW, others / 2)
                    or self._in_a_row["ambiguous"] >= max(FAULTS_IN_A_ROW, others)
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

    async def watch(self) -> None:
        """Read the server's gauges, and see whether all that is in flight has gone silent."""
        assert self.server is not None
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        if self.in_flight and self.state != "open":
            silent_s = now_s - max(self.server.heard_at_s, self._busy_since_s)
            if silent_s > max(self.server.hung_after_s, 3 * self._longest_s):
                self.open(now_s, f"alive but not generating: nothing heard for {silent_s:.0f} s")
                self.server.hang_up()
                return
        if not self.fixed and self.state == "closed" and self.in_flight:
            gauges = await self.server.load()
            if gauges is not None:
                self.controller.observe(loop.time(), *gauges)

    def snapshot(self, now_s: float, *, broke: bool) -> EndpointSnapshot:
        binds = "budget" if broke else self._binding(now_s, 1)[0]
        return EndpointSnapshot(
            name=self.backend.name,
            in_flight=self.in_flight,
            limit=self.limit(now_s),
            state=self.state,
            binds=binds,
            failure=self.failure,
        )


def _bucket(per_min: float | None) -> Bucket | None:
    return Bucket(per_min) if per_min else None
