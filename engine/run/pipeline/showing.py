"""What the person sees of a run, some times a second, and how its limits changed."""

from __future__ import annotations

import anyio

from engine.backends.base import Making
from engine.limits import Pool
from engine.run.batches.bulk import Bulk
from engine.run.limit_log import LimitLog
from engine.run.pipeline.requests import Requests
from engine.run.pipeline.state import RunState
from engine.run.pipeline.stopping import Stopping
from engine.run.progress import Display
from engine.store import RunStore

__all__ = ["Showing"]

REFRESH_S = 0.25


class Showing:
    """Brings the gauges of ``Progress`` up to date, and shows it.

    Args:
        display: None: another stage shows this one.
    """

    def __init__(
        self,
        state: RunState,
        stopping: Stopping,
        requests: Requests,
        *,
        store: RunStore,
        pool: Pool,
        bulk: Bulk | None,
        display: Display | None,
    ) -> None:
        self._state = state
        self._stopping = stopping
        self._requests = requests
        self._store = store
        self._pool = pool
        self._bulk = bulk
        self._display = display
        self._limit_log = LimitLog(store)
        self._decided = -1
        """Where the plan was decided to, the last time one looked."""
        self._decided_s = 0.0
        """Since when that has not changed though there was something to decide."""

    async def run(self) -> None:
        """Show the run until cancelled."""
        while True:
            self._look()
            self._limit_log.keep(self._pool)
            # A display must not block; one that fails is left (``display.Guarded``).
            if self._display is not None:
                self._display.refresh(self._state.progress, self._pool)
            await anyio.sleep(REFRESH_S)

    def end(self) -> None:
        """Keep what is known of the limits."""
        # The last changes are what a person looks for after a run that was slow.
        self._limit_log.keep(self._pool, at_once=True)

    def _look(self) -> None:
        """What is under way at this moment."""
        state, progress = self._state, self._state.progress
        self._time_decisions()
        progress.calls = state.in_flight
        progress.calls_at_disk = self._store.waiting
        progress.learning = self._requests.scouting
        if self._bulk is not None:
            progress.batches = self._bulk.views()
        progress.tokens_in_the_making = sum(
            backend.tokens_in_the_making
            for backend in self._pool.backends
            if isinstance(backend, Making)
        )
        progress.drain_left_s = self._stopping.drain_left_s()

    def _time_decisions(self) -> None:
        """How long answers have waited without a single decision."""
        plan, progress = self._state.plan, self._state.progress
        now_s = anyio.current_time()
        # Since the last decision, or since there was something to decide at all.
        if not plan.to_decide or not progress.to_decide or plan.undecided != self._decided:
            self._decided_s = now_s
        self._decided = plan.undecided
        progress.to_decide, progress.deciding_s = plan.to_decide, now_s - self._decided_s
