"""Displays: plain lines, or JSON Lines for another program; ``live`` has the block of a terminal.

Everything goes to standard error, so that standard output holds results alone. What stands first is
what a person decides by: how far, how long still, what holds it back, what it costs.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from engine.limits import News, Pool
from engine.run.progress import Display, Progress
from engine.run.status import Speed, told
from engine.run.wording import binds, summary
from engine.text import visible

__all__ = ["Guarded", "JsonDisplay", "JsonLog", "PlainDisplay", "SilentDisplay", "event"]

log = logging.getLogger(__name__)

PLAIN_EVERY_S = 10.0


class Guarded:
    """Displays in the order in which they are tried: one that fails is left, and the run goes on
    with the next or with none. Use as a context manager, which enters the first.
    """

    def __init__(self, *displays: Display) -> None:
        self._left = deque(displays)
        self._entered = ExitStack()

    def __enter__(self) -> Guarded:
        def enter(display: Display) -> None:
            if isinstance(display, AbstractContextManager):
                self._entered.enter_context(display)

        self._try(enter)
        return self

    def __exit__(self, *exc_info: object) -> None:
        with suppress(Exception, SystemExit):
            self._entered.close()

    def refresh(self, progress: Progress, pool: Pool) -> None:
        self._try(lambda display: display.refresh(progress, pool))

    def note(self, message: str) -> None:
        self._try(lambda display: display.note(message))

    def _try(self, show: Callable[[Display], None]) -> None:
        while self._left:
            try:
                show(self._left[0])
                return
            except (Exception, SystemExit) as error:  # noqa: BLE001 - rich leaves a closed pipe so
                self._left.popleft()
                self.__exit__()
                log.warning(
                    "the display failed and is left, the run goes on (%s: %s)",
                    type(error).__name__,
                    visible(str(error)),
                )


class SilentDisplay:
    """Shows nothing but notes of what a person must know."""

    def refresh(self, progress: Progress, pool: Pool) -> None: ...

    def note(self, message: str) -> None: ...


class PlainDisplay:
    """A line every ten seconds, and one for each note."""

    def __init__(self, stream: TextIO | None = None, every_s: float = PLAIN_EVERY_S) -> None:
        self._stream = stream or sys.stderr
        self._every_s = every_s
        self._last = time.monotonic()
        self._speed = Speed()

    def refresh(self, progress: Progress, pool: Pool) -> None:
        self._speed.note(progress)
        now = time.monotonic()
        if now - self._last >= self._every_s:
            self._last = now
            self._write(self._line(told(progress, pool, self._speed)))

    def note(self, message: str) -> None:
        self._write(f"woolmill: {visible(message)}")

    def _line(self, state: dict[str, Any]) -> str:
        return f"woolmill: {summary(state)}"

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class JsonDisplay(PlainDisplay):
    """JSON Lines: ``{"time", "event": "progress" | "limit" | "note", …}``; ``"end"`` is the
    command's.
    """

    def __init__(self, stream: TextIO | None = None, every_s: float = PLAIN_EVERY_S) -> None:
        super().__init__(stream, every_s)
        self._news = News()

    def refresh(self, progress: Progress, pool: Pool) -> None:
        for endpoint, change in self._news.of(e.history for e in pool.snapshot()):
            self._write(event("limit", **change.plain(visible(endpoint))))
        super().refresh(progress, pool)

    def note(self, message: str) -> None:
        self._write(event("note", message=message))

    def _line(self, state: dict[str, Any]) -> str:
        return event("progress", **state, binds=binds(state) or "nothing")


class JsonLog(logging.Formatter):
    """Log records as JSON Lines with ``"event": "log"``."""

    def format(self, record: logging.LogRecord) -> str:
        more = {"traceback": self.formatException(record.exc_info)} if record.exc_info else {}
        return event(
            "log", level=record.levelname, logger=record.name, message=record.getMessage(), **more
        )


def event(kind: Literal["progress", "limit", "note", "log", "end"], **fields: Any) -> str:
    """One line of JSON."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "event": kind, **fields})
