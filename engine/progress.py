"""What a person sees while a run goes on: one live block in a terminal, plain lines elsewhere, or
JSON Lines for another program.

Everything goes to standard error, so that standard output holds results alone. Rates are those of
the last half minute; what stands first is what a person decides by: how far, how long still, what
holds it back, what it costs.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engine.limits import Pool
from engine.pipeline import Progress
from engine.report.text import visible

__all__ = [
    "JsonDisplay",
    "JsonLog",
    "LiveDisplay",
    "PlainDisplay",
    "SilentDisplay",
    "Speed",
    "told",
]

PLAIN_EVERY_S = 10.0
WINDOW_S = 30.0
SAMPLE_S = 0.5
BACKLOG = 512
"""Answers that wait for their decision, from which on deciding is what holds the run back."""
AT_DISK = 0.5
"""Share of the calls under way that wait for a commit, from which on the disk holds the run back:
the servers have less than they could."""
FEW = 4
"""Calls that always may: a commit takes its 5 ms."""
REASONS = 6


class Speed:
    """Rates over the last half minute, from counts that are only ever looked at now and then."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, tuple[int, int, int, int]]] = deque()

    def note(self, progress: Progress) -> None:
        """Take the counts as they are now."""
        now = self._clock()
        if self._seen and now - self._seen[-1][0] < SAMPLE_S:
            return
        counts = (
            progress.answered,
            progress.accepted,
            progress.prompt_tokens,
            progress.completion_tokens,
        )
        self._seen.append((now, counts))
        while now - self._seen[0][0] > WINDOW_S and len(self._seen) > 2:
            self._seen.popleft()

    def per_s(self) -> tuple[float, float, float, float]:
        """Answers, accepted records, prompt and completion tokens a second; 0 until it is known."""
        if len(self._seen) < 2:
            return 0.0, 0.0, 0.0, 0.0
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        a, b, c, d = ((new - old) / (ended - began) for old, new in zip(first, last, strict=True))
        return a, b, c, d


def told(progress: Progress, pool: Pool, speed: Speed) -> dict[str, Any]:
    """The state of a run as plain JSON values; all displays show these."""
    answers, accepted, prompt_tokens, completion_tokens = speed.per_s()
    missing = max(0, progress.target - progress.accepted)
    tokens = progress.prompt_tokens + progress.completion_tokens
    cost = _cost(progress, pool)
    share = progress.accepted / progress.target if progress.target else 1.0
    return {
        "accepted": progress.accepted,
        "target": progress.target,
        "left_s": round(missing / accepted, 1) if accepted else None,
        "sent": progress.sent,
        "answered": progress.answered,
        "failed": progress.failed,
        "calls": progress.calls,
        "calls_at_disk": progress.calls_at_disk,
        "undecided": progress.answered - progress.decided_answers,
        "answers_per_s": round(answers, 2),
        "prompt_tokens": progress.prompt_tokens,
        "completion_tokens": progress.completion_tokens,
        "prompt_tokens_per_s": round(prompt_tokens, 1),
        "completion_tokens_per_s": round(completion_tokens, 1),
        "tokens_per_accepted": round(tokens / progress.accepted, 1) if progress.accepted else None,
        "cost": cost,
        "cost_at_end": round(cost / share, 4) if cost is not None and share else None,
        "refused": {visible(reason): n for reason, n in progress.reasons.most_common()},
        "draining": progress.draining,
        "endpoints": [
            {
                "name": visible(endpoint.name),
                "in_flight": endpoint.in_flight,
                "limit": endpoint.limit,
                "state": endpoint.state,
                "binds": endpoint.binds,
                "failure": visible(endpoint.failure),
            }
            for endpoint in pool.snapshot()
        ],
    }


def _cost(progress: Progress, pool: Pool) -> float | None:
    """Money spent, as hosts state it or by the prices; None where there is neither."""
    prices = pool.settings.prices
    if not prices.known and not progress.stated_nano:
        return None
    return round(prices.cost(progress), 4)


def _binds(state: dict[str, Any]) -> str:
    """What holds the run back, in a few words."""
    if state["draining"]:
        return "draining"
    if state["calls_at_disk"] > max(state["calls"] * AT_DISK, FEW):
        return f"disk ({state['calls_at_disk']:,} of {state['calls']:,} calls wait for it)"
    if state["undecided"] > BACKLOG:
        return f"deciding ({state['undecided']:,} answers wait)"
    names = {endpoint["binds"] for endpoint in state["endpoints"]} - {"nothing"}
    return ", ".join(sorted(names)) or "nothing"


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
        try:
            print(line, file=self._stream, flush=True)
        except (BrokenPipeError, ValueError):
            self._every_s = float("inf")  # nobody listens any more; the run goes on


class JsonDisplay(PlainDisplay):
    """JSON Lines: ``{"time", "event": "progress" | "note", …}``."""

    def note(self, message: str) -> None:
        self._write(_event("note", message=message))

    def _line(self, state: dict[str, Any]) -> str:
        return _event("progress", **state, binds=_binds(state))


class JsonLog(logging.Formatter):
    """Log records as JSON Lines with ``"event": "log"``."""

    def format(self, record: logging.LogRecord) -> str:
        more = {"traceback": self.formatException(record.exc_info)} if record.exc_info else {}
        return _event(
            "log", level=record.levelname, logger=record.name, message=record.getMessage(), **more
        )


def _event(kind: Literal["progress", "note", "log"], **fields: Any) -> str:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "event": kind, **fields})


class LiveDisplay:
    """A block that is redrawn in place; use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._speed = Speed()

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._live.stop()

    def refresh(self, progress: Progress, pool: Pool) -> None:
        self._speed.note(progress)
        self._live.update(block(told(progress, pool, self._speed)), refresh=True)

    def note(self, message: str) -> None:
        self._console.print(Text(f"woolmill: {visible(message)}"))


def block(state: dict[str, Any]) -> RenderableType:
    """The live block: progress, endpoints, tokens and money, refusals."""
    head = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=state["target"], completed=state["accepted"], width=32)
    left = "" if state["left_s"] is None else f"{clock(state['left_s'])} left"
    share = state["accepted"] / state["target"] if state["target"] else 1.0
    accepted = f"{state['accepted']:,} / {state['target']:,} accepted  {share:.0%}"
    head.add_row(
        bar, Text(accepted, style="bold"), Text(left), Text("draining" * state["draining"])
    )
    body = Table.grid(padding=(0, 2))
    body.add_column(style="dim", justify="right")
    body.add_column()
    body.add_row(
        "answers",
        f"{state['answered']:,} of {state['sent']:,} sent · {state['answers_per_s']:,.1f}/s"
        + f" · {state['undecided']:,} to decide"
        + (f" · {state['failed']:,} failed" if state["failed"] else ""),
    )
    body.add_row("tokens/s", _tokens(state))
    if state["cost"] is not None:
        at_end = state["cost_at_end"]
        estimate = "" if at_end is None else f" · about {at_end:,.2f} at the end"
        body.add_row("cost", f"{state['cost']:,.2f}{estimate}")
    body.add_row("held back by", _binds(state))
    for endpoint in state["endpoints"]:
        colour = {"closed": "green", "probing": "yellow", "open": "red"}[endpoint["state"]]
        load = f"{endpoint['in_flight']:,} of {endpoint['limit']:,} in flight"
        line = Text.assemble(
            ("● ", colour),
            f"{load} · {endpoint['binds']} · ",
            (endpoint["name"], "dim"),
            (f" · {endpoint['failure']}" if endpoint["failure"] else "", "red"),
        )
        body.add_row("", line)
    refused = sum(state["refused"].values())
    if refused:
        shown = list(state["refused"].items())[:REASONS]
        body.add_row("refused", Text(" · ".join(f"{r} {n / refused:.0%}" for r, n in shown)))
    return Group(head, body)


def _tokens(state: dict[str, Any]) -> str:
    line = f"{state['prompt_tokens_per_s']:,.0f} in · {state['completion_tokens_per_s']:,.0f} out"
    per_row = state["tokens_per_accepted"]
    return line if per_row is None else f"{line} · {per_row:,.0f} for an accepted record"


def summary(state: dict[str, Any]) -> str:
    """One line: accepted of target, answers, in flight, tokens a second, cost, time left."""
    in_flight = sum(endpoint["in_flight"] for endpoint in state["endpoints"])
    limit = sum(endpoint["limit"] for endpoint in state["endpoints"])
    parts = [
        f"accepted {state['accepted']:,}/{state['target']:,}",
        f"answers {state['answered']:,}",
        f"in flight {in_flight}/{limit}",
        f"{state['completion_tokens_per_s']:,.0f} tokens/s",
        f"held back by {_binds(state)}",
    ]
    if state["failed"]:
        parts.append(f"failed {state['failed']:,}")
    if state["cost"] is not None:
        parts.append(f"cost {state['cost']:,.2f}")
    if state["left_s"] is not None and not state["draining"]:
        parts.append(f"{clock(state['left_s'])} left")
    return " · ".join(parts)


def clock(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
