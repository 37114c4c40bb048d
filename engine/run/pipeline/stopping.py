"""Stopping is one thing, whatever the cause: nothing new is sent, calls in flight come home and are
committed within ``drain_timeout_s``, and what can be decided is decided.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

import anyio

from engine.backends.base import GivesUp
from engine.errors import InternalError, WoolmillError
from engine.limits import Pool
from engine.run import endings
from engine.run.batches.bulk import Bulk
from engine.run.pipeline.state import RunState
from engine.run.progress import Display, Stop, of_target
from engine.text import counted

__all__ = ["Stopping"]


class Stopping:
    """Why one run sends nothing more, and how what is under way comes to its end.

    Args:
        leads: speaks to the person, as one stage does for all.
    """

    def __init__(
        self, state: RunState, pool: Pool, display: Display, bulk: Bulk | None, *, leads: bool
    ) -> None:
        self._state = state
        self._pool = pool
        self._display = display
        self._bulk = bulk
        self._leads = leads
        self.stopped: Stop | None = None
        """Why nothing more is sent; None: the run goes on."""
        self.sending = anyio.CancelScope()
        """Whoever sends is in it, and waits for a slot no longer than there is something to send.
        The pool does not see to that where other stages go on with it."""
        self.in_flight: Callable[[], int] = lambda: state.in_flight
        """Calls under way, as a person is told; of all stages where this one leads."""
        self.on_halt: Callable[[Stop], None] = lambda _stop: None
        """Called when nothing more is sent, with the cause."""
        self.on_leave: Callable[[], None] = lambda: None
        """Called when nothing is waited for any more."""
        self._leaving = anyio.Event()
        self._drained_at_s: float | None = None

    def halt(self, stop: Stop) -> None:
        """Send nothing more; the first cause stands."""
        if self.stopped is not None:
            return
        # ``stopped`` first: whatever the rest wakes must find it set.
        self.stopped = stop
        self._state.progress.draining = not stop.reached
        self.sending.cancel()
        if not (self._state.pace.feeds and stop.reached):  # the next stage goes on
            self._pool.stop()
        self._state.changed.set()
        self.on_halt(stop)

    def fail(self, error: Exception) -> None:
        """Stop for ``error``; one that is none of the run's is a bug of ours."""
        if not isinstance(error, WoolmillError):
            error = InternalError.of(error)
        self.halt(Stop(error=error))

    def stop(self) -> None:
        """Drain, as at a signal; once more: leave at once. In the thread of the run."""
        if self.stopped is None:
            self.halt(Stop(asked=True))
        else:
            self.leave()

    def leave(self) -> None:
        """Wait for nothing any more."""
        if self._leads:
            self._display.note("leaving now; what arrived is committed")
        self._leaving.set()
        self._state.changed.set()
        self.on_leave()

    @property
    def leaves(self) -> bool:
        """Nothing is waited for any more."""
        return self._leaving.is_set()

    # What signals do; see ``engine.run.signals``

    def halt_by_signal(self, signum: signal.Signals) -> None:
        """Drain, and say what is waited for."""
        how = "stopping already" if self.stopped is not None else "sending nothing more"
        self.halt(Stop(signum=signum))
        # Only what there is to wait for is named.
        if self._bulk is not None and self._state.is_quiet:
            how += ", leaving batches as they are"
        elif not any(isinstance(backend, GivesUp) for backend in self._pool.backends):
            how += (
                f", waiting up to {self._state.pace.drain_timeout_s:g} s for"
                f" {counted(self.in_flight(), 'call')} in flight"
            )
        # Also where something else has stopped the run: a person who waits wants an answer.
        self._display.note(f"{signum.name}: {how} (once more to leave at once)")

    def say_state(self, cause: str) -> None:
        """One line about how far the run is, for a signal that asks for no more."""
        progress = self._state.progress
        self._display.note(
            f"{cause}: going on; accepted {progress.accepted:,}{of_target(progress.target)},"
            f" {counted(self.in_flight(), 'call')} in flight"
        )

    # What is under way comes home

    async def drain(self, cancel: Callable[[], None]) -> None:
        """After a stop, give the calls in flight their time, then ``cancel`` those that are left.

        Answers that cost nothing are given up at once where that time would not do. At the target
        none of them is needed.
        """
        await self._state.changed.until(lambda: self.stopped is not None)
        assert self.stopped is not None
        pace = self._state.pace
        wait = pace.paid or not self.stopped.reached
        wait_s = pace.drain_timeout_s if wait else 0.0
        if wait and not pace.paid:
            # A model on this machine: what it could not finish in time only keeps it busy.
            self._give_up(wait_s)
        self._drained_at_s = anyio.current_time() + wait_s
        with anyio.move_on_after(wait_s):
            await self._leaving.wait()
        cancel()

    def drain_left_s(self) -> float | None:
        """How long the calls in flight will still be waited for; None before a stop."""
        if self._drained_at_s is None:
            return None
        return max(0.0, self._drained_at_s - anyio.current_time())

    def _give_up(self, within_s: float) -> None:
        """Drop the answers that could not be finished in time, and say so."""
        backends = [backend for backend in self._pool.backends if isinstance(backend, GivesUp)]
        told = [backend.give_up(within_s) for backend in backends]
        if said := endings.given_up(told):
            self._display.note(said)
