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
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from engine.backends.base import Backend, Verdict
from engine.errors import ConfigError, SpentError, StoppedError, UnavailableError, WoolmillError
from engine.limits.candidates import Candidates
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
from engine.limits.watch import watch
from engine.money import Spent
from engine.records import Completion

__all__ = ["EndpointLimits", "EndpointSnapshot", "Lease", "LimitSettings", "Pool", "WatchedServer"]

RETRY_SHARE = 0.1
"""Retries that go before first attempts, as a share of the answers; more wait for their turn."""


class Lease:
    """The right to have one call in flight on ``backend``, until ``release``."""

    __slots__ = ("_endpoint", "_pool", "_ticket", "backend", "probes", "tokens")

    def __init__(self, pool: Pool, endpoint: Endpoint, ticket: Ticket, tokens: int) -> None:
        self.backend = endpoint.backend
        self.tokens = tokens
        self.probes = endpoint.state == "probing"
        """The call finds out whether the endpoint is back from an outage."""
        self._pool: Pool | None = pool
        self._endpoint = endpoint
        self._ticket = ticket

    def release(self, results: Sequence[Completion | Verdict] = ()) -> int:
        """Give the slot back with what happened; nothing, where nothing was sent. Twice is once.

        Returns the most tokens that were billed, perhaps, without an answer.
        """
        pool, self._pool = self._pool, None
        if pool is None:
            return 0
        return pool._released(self._endpoint, self._ticket, self.tokens, results)


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
        self._controller = controller
        self.doubts = Doubts(settings.max_refusals_in_a_row)
        self._endpoints: dict[Backend, Endpoint] = {}
        self._leaving: dict[Endpoint, asyncio.Event] = {}
        """Those that get no more work, until their last call has ended."""
        self._candidates = Candidates()
        self._served: tuple[str, str] | None = None
        """What the servers serve: the model's name, and what it really is."""
        for backend, limits in zip(backends, own, strict=True):
            self._add(backend, limits)
        self.calls_on_the_wire = 0
        """Attempts that wait for a backend now. Each holds a slot; no slot is held otherwise."""
        self._spending = Spending(
            max_tokens=settings.max_tokens_total,
            max_cost=settings.max_cost,
            prices=settings.prices,
            batch_price=settings.batch_price,
        )
        self._retries: deque[_Waiter] = deque()
        """Calls that were made before, in the order in which they came back for another slot."""
        self._fresh: deque[_Waiter] = deque()
        """First attempts, in the order in which they came, and the retries beyond their share."""
        self._retry_credit = 10.0
        self._timer: asyncio.TimerHandle | None = None
        self._down_since_s: float | None = None
        self._tried_for_s = 0.0
        """How long no endpoint had been at work when one was last tried in vain."""
        self._refused_since_s: float | None = None
        self._last_failure = ""
        self._stopping = asyncio.Event()
        self._ended: WoolmillError | None = None

    # What the pipeline and ``engine.run.deliver`` call

    async def start(self) -> None:
        """Start every backend. Those that do not answer are tried again when work is there.

        Raises ConfigError (also where replicas serve different models), AuthError;
        UnavailableError where none answers.
        """
        failed: list[tuple[Endpoint, WoolmillError]] = []
        now_s = asyncio.get_running_loop().time()
        for endpoint in self._endpoints.values():
            try:
                await endpoint.backend.start()
            except UnavailableError as exc:
                failed.append((endpoint, exc))
        if failed and len(failed) == len(self._endpoints):
            raise failed[0][1]
        for endpoint, error in failed:
            endpoint.open(now_s, str(error))
        for backend in self._endpoints:
            self._compare(backend)

    async def join(self, backend: Backend) -> None:
        """Start one more backend, and give it work from now on.

        Raises ConfigError (also where it serves another model than the others), AuthError or
        UnavailableError; then it is closed and the pool is as it was.
        """
        try:
            await backend.start()
            self._compare(backend)
        except BaseException:  # raised again
            await backend.aclose()
            raise
        self._add(backend, EndpointLimits())
        self._down_since_s, self._tried_for_s = None, 0.0
        self._wake()

    async def leave(self, backend: Backend) -> None:
        """Give ``backend`` no more work, hang up, and close it when its last call has ended.

        What is in flight there fails at once, and is asked elsewhere by whoever asked it.
        """
        endpoint = self._endpoints.pop(backend)
        self._candidates.remove(endpoint)
        self._alone()
        self._last_failure = f"{backend.name}: it has left"
        self._note_outage()
        if endpoint.in_flight:
            ended = self._leaving[endpoint] = asyncio.Event()
            if endpoint.server is not None:
                endpoint.server.hang_up()
            await ended.wait()
        self._wake()
        await backend.aclose()

    def _add(self, backend: Backend, own: EndpointLimits) -> None:
        endpoint = Endpoint(backend, self.settings, own, self._controller, self.doubts)
        self._endpoints[backend] = endpoint
        self._candidates.add(endpoint)
        self._alone()

    def _alone(self) -> None:
        for endpoint in self._endpoints.values():
            endpoint.alone = len(self._endpoints) == 1

    def _compare(self, backend: Backend) -> None:
        """Replicas of one run serve one model; two behind one name would mix two data sets."""
        if not isinstance(backend, WatchedServer) or backend.identity is None:
            return
        model, root, _ = backend.identity
        self._served = self._served or (model, root)
        if (model, root) != self._served:
            raise ConfigError(
                f"{backend.name}: serves {model} ({root}), the others {self._served[0]} "
                f"({self._served[1]}); one run needs one model"
            )

    async def run(self) -> None:
        """Watch the servers until cancelled; for the pipeline's task group."""
        async for watched in watch(self._endpoints):
            for endpoint in watched:
                if endpoint.backend in self._endpoints:  # its limit may have grown
                    self._candidates.add(endpoint)
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
        if self._ended is not None:
            raise self._ended
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
        if all(e.retired for e in self._endpoints.values() if e.backend is not backend):
            return False
        if (endpoint := self._endpoints.get(backend)) is not None:
            endpoint.retire(failure)
        return True

    async def rest(self, seconds: float) -> None:
        """Wait between two attempts. Raises what ``acquire`` raises as soon as there will be no
        other.
        """
        now_s = asyncio.get_running_loop().time()
        end_s = now_s + seconds
        while now_s < end_s:
            try:
                async with asyncio.timeout_at(min(end_s, max(self._given_up_at_s(), now_s + 1e-3))):
                    await self._stopping.wait()
                raise StoppedError(DRAINING)
            except TimeoutError:
                now_s = asyncio.get_running_loop().time()
            if (error := self._hopeless(now_s, 0)) is not None:
                raise error

    def stop(self) -> None:
        """Hand out nothing more: whoever waits, rests or comes gets StoppedError."""
        self._stopping.set()
        self._give_up(StoppedError(DRAINING))

    def end(self, error: WoolmillError) -> None:
        """Nobody will ever answer again: whoever waits or comes gets ``error``."""
        self._ended = error
        self._give_up(error)

    def spent(self, used: Spent) -> None:
        """Book what earlier sessions of the run used, so that the budget is the run's."""
        self._spending.begin(used)

    @property
    def spending(self) -> Spending:
        """What the run may use, for what is asked otherwise than by calls."""
        return self._spending

    @property
    def backends(self) -> Sequence[Backend]:
        return list(self._endpoints)

    def has(self, backend: Backend) -> bool:
        """Whether it is one of the pool's, and has not left."""
        return backend in self._endpoints

    @property
    def in_flight(self) -> int:
        there = sum(endpoint.in_flight for endpoint in self._endpoints.values())
        return there + sum(endpoint.in_flight for endpoint in self._leaving)

    @property
    def limit(self) -> int:
        now_s = asyncio.get_running_loop().time()
        return sum(endpoint.limit(now_s) for endpoint in self._endpoints.values())

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
        endpoint = self._endpoints.get(backend)
        return endpoint.faults_in_a_row if endpoint is not None else 0

    def snapshot(self) -> list[EndpointSnapshot]:
        now_s = asyncio.get_running_loop().time()
        waiting = self._retries or self._fresh
        broke = bool(waiting) and not self._spending.fits(waiting[0].tokens)
        return [endpoint.snapshot(now_s, broke=broke) for endpoint in self._endpoints.values()]

    async def aclose(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for endpoint in (*self._endpoints.values(), *self._leaving):
            await endpoint.backend.aclose()

    # Who goes next

    def _grant(self, now_s: float, tokens: int, avoid: Backend | None) -> Lease | None:
        # A call that goes alone never waits here, as it finds room for its next attempt each time.
        if not self._spending.fits(tokens) or self._tried_for_s >= self.settings.max_outage_s:
            return None
        best = self._candidates.next(now_s, tokens, avoid)
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
    ) -> int:
        now_s = asyncio.get_running_loop().time()
        lost = self._book(tokens, results)
        if endpoint in self._leaving:
            endpoint.finish(now_s, ticket, tokens, ())
            if not endpoint.in_flight:
                self._leaving.pop(endpoint).set()
        else:
            self._heed(endpoint, results, endpoint.finish(now_s, ticket, tokens, results))
        self._wake()
        return lost

    def _heed(
        self, endpoint: Endpoint, results: Sequence[Completion | Verdict], answers: int
    ) -> None:
        """What the end of a call says about the endpoint, and about all of them."""
        now_s = asyncio.get_running_loop().time()
        if answers:
            self._retry_credit = min(self._retry_credit + RETRY_SHARE * answers, 100.0)
            self._refused_since_s = None
            self.doubts.answered()
        for result in results:
            if isinstance(result, Verdict):
                self._last_failure = f"{endpoint.backend.name}: {result.reason}: {result.message}"
                if result.kind == "throttled" and self._refused_since_s is None:
                    self._refused_since_s = now_s
        self._candidates.add(endpoint)
        self._note_outage()

    def _note_outage(self) -> None:
        """Since when no endpoint is at work, where that is so."""
        if any(e.state == "closed" for e in self._endpoints.values()):
            self._down_since_s, self._tried_for_s = None, 0.0
            return
        now_s = asyncio.get_running_loop().time()
        if self._down_since_s is None:
            self._down_since_s = now_s
        self._tried_for_s = now_s - self._down_since_s

    def _book(self, tokens: int, results: Sequence[Completion | Verdict]) -> int:
        """Settle a call's reservation; what may have been billed without an answer is returned."""
        lost = 0
        share, rest = divmod(tokens, max(len(results), 1))
        for i, result in enumerate(results):
            reserved = share + (rest if i == 0 else 0)
            if isinstance(result, Completion):
                self._spending.settle(reserved, result.usage)
            elif result.billed:
                lost += self._spending.lose(reserved, result.taken)
            else:
                self._spending.settle(reserved)
        if not results:
            self._spending.settle(tokens)
        return lost

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
        soonest_s = self._given_up_at_s()
        if self._spending.fits(waiter.tokens):
            soonest_s = min(soonest_s, self._candidates.next_change_s())
        if soonest_s < math.inf:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(soonest_s, now_s + 1e-4), self._wake)

    def _given_up_at_s(self) -> float:
        """When waiting will have taken too long, if all stays as it is."""
        since_s = [s for s in (self._down_since_s, self._refused_since_s) if s is not None]
        return min(since_s, default=math.inf) + self.settings.max_outage_s

    def _hopeless(self, now_s: float, tokens: int) -> WoolmillError | None:
        """Why waiting longer is of no use, if it is not."""
        if not self._spending.fits(tokens) and self.in_flight == 0:
            return SpentError(self._spending.short_of(tokens))
        settings = self.settings
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
        longest_s = now_s + settings.max_outage_s
        endpoints = self._endpoints.values()
        if endpoints and all(e.controller.paused_until_s > longest_s for e in endpoints):
            soonest = min(endpoints, key=lambda each: each.controller.paused_until_s)
            return StoppedError(
                f"the server asks to wait {soonest.asked_s:.0f} s, longer than --max-outage "
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
