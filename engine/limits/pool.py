"""How many requests are in flight, and where: one ``Pool`` over all endpoints.

Work asks for a ``Lease`` and gets it from the endpoint with the most room; retries go before first
attempts while they are few. What holds an endpoint back is one of these, and ``snapshot`` says
which: its limit (``controller``), requests or tokens a minute, the money of the run (``quota``), a
pause that it asked for, or its breaker.

Nothing here sleeps: a release or a timer wakes whoever can go on, so a limit costs no CPU while it
binds. The pool alone knows all endpoints, so it is also the one that gives up: after
``max_outage_s`` without an answer from anywhere.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from engine.backends.base import Backend, Verdict
from engine.errors import ConfigError, StoppedError, UnavailableError, WoolmillError
from engine.limits.controller import Controller, Ticket
from engine.limits.doubts import Doubts
from engine.limits.endpoint import (
    Endpoint,
    EndpointLimits,
    EndpointSnapshot,
    LimitSettings,
    WatchedServer,
)
from engine.limits.finder.finder import Adaptive
from engine.limits.quota import Spending
from engine.money import Spent
from engine.records import Completion

__all__ = ["EndpointLimits", "EndpointSnapshot", "Lease", "LimitSettings", "Pool", "WatchedServer"]

RETRY_SHARE = 0.1
"""Retries that go before first attempts, as a share of the answers; more wait for their turn."""
POLL_S = 1.0


class Lease:
    """The right to have one call in flight on ``backend``, until ``release``."""

    __slots__ = ("_endpoint", "_pool", "_ticket", "backend", "tokens")

    def __init__(self, pool: Pool, endpoint: Endpoint, ticket: Ticket, tokens: int) -> None:
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


DRAINING = "the run is stopping; what was not sent is sent when it goes on"


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
            Endpoint(backend, settings, limits, controller, alone=len(backends) == 1)
            for backend, limits in zip(backends, own, strict=True)
        ]
        self.doubts = Doubts(settings.max_refusals_in_a_row)
        self.calls_on_the_wire = 0
        """Attempts that wait for a backend now. Each holds a slot; no slot is held otherwise."""
        self._spending = Spending(
            max_tokens=settings.max_tokens_total,
            max_cost=settings.max_cost,
            prices=settings.prices,
            batch_price=settings.batch_price,
        )
        self._retries: deque[_Waiter] = deque()
        self._fresh: deque[_Waiter] = deque()
        self._retry_credit = 10.0
        self._timer: asyncio.TimerHandle | None = None
        self._down_since_s: float | None = None
        self._refused_since_s: float | None = None
        self._last_failure = ""
        self._stopping = asyncio.Event()

    # What the pipeline and ``engine.run.deliver`` call

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
        if self._stopping.is_set():
            raise StoppedError(DRAINING)
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

    @contextmanager
    def on_the_wire(self) -> Iterator[None]:
        """A backend is asked meanwhile."""
        self.calls_on_the_wire += 1
        try:
            yield
        finally:
            self.calls_on_the_wire -= 1

    def does_without(self, backend: Backend, failure: str) -> bool:
        """Give ``backend``, which can never answer again, no more work; False where there is no
        other.
        """
        if all(e.retired for e in self._endpoints if e.backend is not backend):
            return False
        next(e for e in self._endpoints if e.backend is backend).retire(failure)
        return True

    async def rest(self, seconds: float) -> None:
        """Wait between two attempts. Raises StoppedError as soon as there will be no other."""
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return
        raise StoppedError(DRAINING)

    def stop(self) -> None:
        """Hand out nothing more: whoever waits, rests or comes gets StoppedError."""
        self._stopping.set()
        self._give_up(StoppedError(DRAINING))

    def spent(self, used: Spent) -> None:
        """Book what earlier sessions of the run used, so that the budget is the run's."""
        self._spending.begin(used)

    @property
    def spending(self) -> Spending:
        """What the run may use, for what is asked otherwise than by calls."""
        return self._spending

    @property
    def backends(self) -> Sequence[Backend]:
        return [endpoint.backend for endpoint in self._endpoints]

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

    def faults_in_a_row(self, backend: Backend) -> int:
        """Failures of ``backend``, which may have been paid, since it last answered anything."""
        return next(e.faults_in_a_row for e in self._endpoints if e.backend is backend)

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
        endpoint: Endpoint,
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
            self.doubts.answered()
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
                self._spending.settle(reserved, result.usage)
            elif result.billed:
                self._spending.lose(reserved)
            else:
                self._spending.settle(reserved)
        if not results:
            self._spending.settle(tokens)

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
