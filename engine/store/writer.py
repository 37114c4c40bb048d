"""The one thread that writes: group commit.

Callers get a future; the thread takes all that waits, has it written in one transaction, and ends
the futures of the group with one call into the event loop. When idle, a call is committed at once;
under load, commits start at least ``GATHER_S`` apart, so that a group holds some hundred rows. The
price is up to that much latency. How much waits is bounded by the callers: a run records each
request before it goes out, behind the answers that came before, so at most one answer waits for
each request that may be in flight.

After a write or a sync fails, nothing is tried again: the kernel may have dropped the pages that it
failed to write and report the next sync as good (https://wiki.postgresql.org/wiki/Fsync_Errors).
The group's callers and all later ones get the error, and whoever opens the store next writes the
log into the database anew.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from engine.errors import StoppedError, WoolmillError
from engine.failpoints import failpoint
from engine.records import Answer, Prompt
from engine.store.schema import DecisionRows

__all__ = ["Work", "Writer"]

GATHER_S = 0.005
MAX_GROUP = 2000
"""Calls to one transaction."""


def _new_future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


@dataclass(slots=True)
class Work:
    """What one call wants written."""

    prompts: Sequence[Prompt] = ()
    """Requests about to be sent to ``model``; the thread that writes makes their keys."""
    model: str = ""
    sent: Sequence[tuple[int, bytes]] = ()
    """Requests sent earlier: (index, key) of each."""
    answers: Sequence[Answer] = ()
    lost_tokens: int = 0
    """What may be billed without an answer grows by so many tokens, or shrinks."""
    decided: DecisionRows | None = None
    meta: Mapping[str, object] = field(default_factory=dict)
    """Rows of that table by their names, each written in the place of the one that is there."""
    done: asyncio.Future[None] = field(default_factory=_new_future)


class Writer:
    """Runs ``commit`` on groups of work. Made where the loop runs; ``aclose`` ends the thread."""

    def __init__(self, commit: Callable[[Sequence[Work]], None]) -> None:
        self._commit = commit
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Work] = deque()
        """Calls that no transaction has taken, in their order, which is that of the commits."""
        self._wake = threading.Condition()
        self._hurry = threading.Event()  # a full group waits, or the end has come
        self._closing = False
        self._error: BaseException | None = None
        self.callers = 0
        """Calls that wait for their commit."""
        # Daemon: a loop that ended without aclose must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="woolmill-store", daemon=True)
        self._thread.start()

    def write(self, work: Work) -> asyncio.Future[None]:
        """Done when ``work`` is durable; has what ``commit`` raised, now or earlier.

        A cancelled caller's work is written all the same: what it holds was paid for.
        """
        done = work.done
        if self._error is not None or self._closing:
            done.set_exception(self._error or StoppedError("the run store is closed"))
            return done
        self.callers += 1
        with self._wake:
            self._waiting.append(work)
            self._wake.notify()
        if len(self._waiting) >= MAX_GROUP:
            self._hurry.set()
        return done

    async def aclose(self) -> None:
        """Commit what waits and end the thread. Does not raise: the callers were told."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._hurry.set()
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        started = -GATHER_S
        while True:
            with self._wake:
                while not self._waiting and not self._closing:
                    self._wake.wait()
            if not self._waiting:
                return
            # Not on the condition: every caller would wake this thread for nothing.
            gather_s = started + GATHER_S - time.monotonic()
            if gather_s > 0:
                self._hurry.wait(gather_s)
            started = time.monotonic()
            with self._wake:
                group = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_GROUP))]
                if len(self._waiting) < MAX_GROUP and not self._closing:
                    self._hurry.clear()
            if self._error is None:
                try:
                    self._commit(group)
                except WoolmillError as exc:
                    self._error = exc
                except BaseException as exc:  # noqa: BLE001 - the callers must not wait for ever
                    self._error = WoolmillError(f"the run store's writer failed: {exc!r}")
                    self._error.__cause__ = exc
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(self._acknowledge, group)
            failpoint("store.acknowledged")

    def _acknowledge(self, group: list[Work]) -> None:
        self.callers -= len(group)
        for work in group:
            if work.done.done():
                continue  # its caller was cancelled
            if self._error is None:
                work.done.set_result(None)
            else:
                work.done.set_exception(self._error)
