"""A run in a thread of its own, for programs that take its rows as they are committed.

The caller's thread reads from the store, never from the run: what it has not taken yet needs no
memory, however slow it is, and what it gets is on the disk. The run does not wait for it.

    caller's thread   start ─▶ chunk, chunk, … ─▶ close
    run's thread              generate() ─▶ drain ─▶ end
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401 - before ``_at_the_end`` is registered: see there
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Self

import anyio

from engine.datasets import BAD_ROWS
from engine.errors import DiskError, InternalError, WoolmillError, first_known
from engine.records import EVERY, Decision
from engine.run.display import Guarded, JsonDisplay, PlainDisplay, SilentDisplay
from engine.run.generate import Result, generate
from engine.run.progress import Display, Owner
from engine.run.spool import spool
from engine.run.textfile import MetricsFile
from engine.settings import RunConfig
from engine.store import RunReader
from engine.text import counted

__all__ = ["BackgroundRun"]

log = logging.getLogger(__name__)

CHUNK = 256
"""Decisions that are read at once."""
LAST = 2**62
"""A position behind all those of an answer."""
LEAVE_S = 30.0
"""How long a run that is to leave at once is waited for."""

_running: set[BackgroundRun] = set()


class _Notes(SilentDisplay):
    """What a person should know goes to the log."""

    def note(self, message: str) -> None:
        log.info("%s", message)


class BackgroundRun(Owner):
    """One run in a thread of its own, from ``start`` to ``close``; a context manager of the two.

    ``start``, ``chunks``, ``stop`` and ``close`` are for the caller's side.

    Args:
        config: the settings.
        rows: input rows to be written into the run's folder first.
        progress: plain lines of progress on standard error.
    """

    def __init__(
        self, config: RunConfig, rows: Iterable[Any] | None = None, *, progress: bool = False
    ) -> None:
        self._config = config
        self._rows = rows
        lines = JsonDisplay if config.log_format == "json" else PlainDisplay
        self._display: Display = lines() if progress else _Notes()
        self._thread: threading.Thread | None = None
        self._written: Path | None = None
        """Rows in a folder that has no run yet."""
        self._told = False
        """The error that ended the run has been raised."""
        self._changed = threading.Condition()
        # What follows is the other thread's too, under ``_changed``.
        self._target = EVERY
        self._commits = 0
        """How often there was something new in the store; 0: it is not open yet."""
        self._below = 0
        self._asked = False
        """To stop."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: Callable[[], None] | None = None
        self._over = False
        self._result: Result | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- the caller's side ------------------------------------------------------------------------

    def start(self) -> None:
        """Write the rows, and begin. Raises WoolmillError for rows that cannot be taken."""
        folder = self._config.out
        if self._rows is not None:
            path = spool(self._rows, folder)
            self._rows = None
            self._written = None if (folder / "run.sqlite").exists() else path
            self._config = self._config.model_copy(update={"rows": path})
        self._thread = threading.Thread(target=self._run, name="woolmill-run", daemon=True)
        _running.add(self)
        self._thread.start()

    def chunks(self, *, refused: bool) -> Iterator[list[Decision]]:
        """Decisions in plan order as they are committed, those of earlier sessions first: the
        accepted ones, and with ``refused`` the others too, up to the target.

        Raises, behind the last of them, the WoolmillError that ended the run.
        """
        accepted, after, seen = 0, (-1, -1), 0
        with ExitStack() as stack:
            reader: RunReader | None = None
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._over or self._commits > seen)  # noqa: B023
                    over, below, target = self._over, self._below, self._target
                    new, seen = self._commits > seen, self._commits
                if new and reader is None:
                    reader = stack.enter_context(RunReader(self._config.out, snapshot=False))
                if new and reader is not None and accepted < target:
                    which = None if refused else True
                    decisions = reader.decisions(accepted=which, after=after)
                    while chunk := list(islice(decisions, CHUNK)):
                        after = (chunk[-1].index, chunk[-1].position)
                        chunk = _up_to(chunk, target - accepted)
                        accepted += sum(decision.accepted for decision in chunk)
                        yield chunk
                        if accepted == target:
                            break
                    after = max(after, (below - 1, LAST))
                if over:
                    break
        if (error := self._what_ended()) is not None:
            self._told = True
            raise error

    def stop(self) -> None:
        """Ask the run to drain and end; once more: to leave at once. Does not wait."""
        with self._changed:
            self._asked = True
            loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop is closed: it is over
                loop.call_soon_threadsafe(self._obey)

    def close(self) -> None:
        """End the run if it goes on: what is in flight is waited for, as at Ctrl-C, and kept. An
        interrupt meanwhile makes it leave at once.

        Raises DiskError or InternalError where what arrived could not be kept.
        """
        if self._thread is None:
            return
        if not self._over:
            self.stop()
        try:
            self._wait(None)
        except BaseException:  # Ctrl-C once more; raised again when the run has left
            self.stop()
            self._wait(LEAVE_S)
            raise
        finally:
            _running.discard(self)
        ended = self._what_ended()
        if not self._told and isinstance(ended, DiskError | InternalError):
            self._told = True
            raise ended

    def _wait(self, timeout_s: float | None) -> None:
        assert self._thread is not None
        with self._changed:
            self._changed.wait_for(lambda: self._over, timeout_s)
        if self._over:
            self._thread.join()
            if self._written is not None and not (self._config.out / "run.sqlite").exists():
                self._written.unlink(missing_ok=True)  # there is no run to go on with

    def _what_ended(self) -> WoolmillError | None:
        """What the caller is to be told of the end."""
        if self._error is not None:
            return first_known(self._error) or InternalError.of(self._error)
        return self._result.stop.error if self._result is not None else None

    # -- the run's thread -------------------------------------------------------------------------

    def _run(self) -> None:
        result, failed = None, None
        try:
            options = {"use_uvloop": sys.platform != "win32"}
            with ExitStack() as stack:
                if self._config.metrics_file is not None:
                    metrics = MetricsFile(
                        self._display, self._config.metrics_file, self._config.out
                    )
                    self._display = stack.enter_context(Guarded(metrics, self._display))
                result = anyio.run(self._main, backend_options=options)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the caller is told
            failed = error
        if result is not None:
            self._say_what_is_lost(result)
        with self._changed:
            self._result, self._error, self._over = result, failed, True
            self._changed.notify_all()

    def _say_what_is_lost(self, result: Result) -> None:
        """Warn of requests and rows that gave nothing: whoever iterates sees only accepted rows."""
        progress = result.progress
        if failed := progress.failed + sum(each.failed for each in progress.before.values()):
            log.warning(
                "%s: %s gave no answer; open_run(out).decisions(accepted=False) says why",
                self._config.out,
                counted(failed, "request"),
            )
        if result.bad_rows:
            bad = counted(result.bad_rows, "input row")
            log.warning("left out %s, see %s", bad, self._config.out / BAD_ROWS)

    async def _main(self) -> Result | None:
        """The run; None where it was stopped before it began."""
        with anyio.CancelScope() as starting:
            with self._changed:
                self._stop = starting.cancel
                self._loop = asyncio.get_running_loop()
                if self._asked:
                    return None
            return await generate(self._config, self._display, self)
        return None

    def _obey(self) -> None:
        if self._stop is not None:
            self._stop()

    def opened(self, target: int) -> None:
        with self._changed:
            self._target = target
            self._commits += 1
            self._changed.notify_all()

    def committed(self, below: int) -> None:
        with self._changed:
            self._below = below
            self._commits += 1
            self._changed.notify_all()

    def running(self, stop: Callable[[], None]) -> None:
        self._stop = stop


def _up_to(decisions: list[Decision], accepted: int) -> list[Decision]:
    """The decisions up to the last of so many accepted ones."""
    for place, decision in enumerate(decisions, 1):
        accepted -= decision.accepted
        if accepted == 0:
            return decisions[:place]
    return decisions


def _at_the_end() -> None:
    """The interpreter ends while rows were still to be taken: drain and keep, as at a break."""
    for run in list(_running):
        try:
            run.close()
        except WoolmillError as error:
            log.error("%s", error)


# Before the threads of executors are ended, which the end of a run needs; ``atexit`` comes after.
threading._register_atexit(_at_the_end)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_running.clear)
