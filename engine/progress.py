"""What a person sees while a run goes on: one live block in a terminal, plain lines elsewhere.

Everything goes to standard error, so that standard output holds results alone.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from engine.limits import Pool
from engine.pipeline import Progress

__all__ = ["LiveDisplay", "PlainDisplay", "SilentDisplay"]

PLAIN_EVERY_S = 10.0


class SilentDisplay:
    """Shows nothing but notes of what a person must know."""

    def refresh(self, progress: Progress, pool: Pool) -> None: ...

    def note(self, message: str) -> None: ...


class PlainDisplay:
    """A line every ten seconds, and one for each note."""

    def __init__(self, stream: TextIO | None = None, every_s: float = PLAIN_EVERY_S) -> None:
        self._stream = stream or sys.stderr
        self._every_s = every_s
        self._began = self._last = time.monotonic()

    def refresh(self, progress: Progress, pool: Pool) -> None:
        now = time.monotonic()
        if now - self._last >= self._every_s:
            self._last = now
            self.note(summary(progress, pool, now - self._began))

    def note(self, message: str) -> None:
        try:
            print(f"woolmill: {message}", file=self._stream, flush=True)
        except (BrokenPipeError, ValueError):
            self._every_s = float("inf")  # nobody listens any more; the run goes on


class LiveDisplay:
    """A block that is redrawn in place; use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._began = time.monotonic()

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._live.stop()

    def refresh(self, progress: Progress, pool: Pool) -> None:
        elapsed = time.monotonic() - self._began
        grid = Table.grid(padding=(0, 2))
        share = progress.accepted / progress.target
        width = 28
        bar = "█" * int(width * share) + "░" * (width - int(width * share))
        grid.add_row(Text(bar, style="green"), Text(summary(progress, pool, elapsed)))
        refused = ", ".join(f"{reason} {n}" for reason, n in progress.reasons.most_common(6))
        if refused:
            grid.add_row(Text("refused", style="dim", justify="right"), Text(refused, style="dim"))
        self._live.update(grid, refresh=True)

    def note(self, message: str) -> None:
        self._console.print(Text(f"woolmill: {message}"))


def summary(progress: Progress, pool: Pool, elapsed_s: float) -> str:
    """One line: accepted of target, requests, in flight, tokens a second, time left."""
    per_s = progress.session_completion_tokens / elapsed_s if elapsed_s > 0 else 0.0
    parts = [
        f"accepted {progress.accepted:,}/{progress.target:,}",
        f"answers {progress.answered:,}",
        f"in flight {pool.in_flight}/{pool.limit}",
        f"{per_s:,.0f} tokens/s",
    ]
    if progress.failed:
        parts.append(f"failed {progress.failed}")
    if progress.draining:
        parts.append("draining")
    elif progress.session_accepted:
        left_s = (progress.target - progress.accepted) * elapsed_s / progress.session_accepted
        parts.append(f"{clock(left_s)} left")
    return " · ".join(parts)


def clock(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
