"""What a person sees while a run goes on: one live block in a terminal, plain lines elsewhere, or
JSON Lines for another program.

Everything goes to standard error, so that standard output holds results alone. Rates are those of
the last half minute; what stands first is what a person decides by: how far, how long still, what
holds it back, what it costs.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engine.limits import News, Pool
from engine.records import EVERY
from engine.run.progress import Display, Progress
from engine.text import shorten, visible

__all__ = [
    "Guarded",
    "JsonDisplay",
    "JsonLog",
    "LiveDisplay",
    "PlainDisplay",
    "SilentDisplay",
    "Speed",
    "event",
    "told",
]

log = logging.getLogger(__name__)

PLAIN_EVERY_S = 10.0
WINDOW_S = 30.0
SAMPLE_S = 0.5
BACKLOG = 512
"""Answers that wait for their decision, from which on deciding is what holds the run back."""
STUCK_S = 2.0
"""No decision for so long, though there is something to decide: the next one is what is slow."""
LATE_S = 5.0
"""How long an answer is waited for before the display says for how long."""
AT_DISK = 0.5
"""Share of the calls under way that wait for a commit, from which on the disk holds the run back:
the servers have less than they could."""
FEW = 4
"""Calls that always may: a commit takes its 5 ms."""
REASONS = 6
NARROWEST = 40
"""Columns of a terminal, below which plain lines are easier to read than the block."""


class Speed:
    """Rates over the last half minute, from counts that are only ever looked at now and then.

    Completion tokens are those of the answers that are here and of those in the making, so that an
    answer that takes minutes is not counted all at once at its end.
    """

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
            progress.completion_tokens + progress.tokens_in_the_making,
        )
        self._seen.append((now, counts))
        while now - self._seen[0][0] > WINDOW_S and len(self._seen) > 2:
            self._seen.popleft()

    def per_s(self) -> tuple[float, float, float, float]:
        """Answers, accepted records, prompt and completion tokens a second; 0 until it is known."""
        if len(self._seen) < 2:
            return 0.0, 0.0, 0.0, 0.0
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        seconds = ended - began
        # Never below 0: an answer that is dropped takes what was made of it with it.
        a, b, c, d = (max(0, new - old) / seconds for old, new in zip(first, last, strict=True))
        return a, b, c, d


def _way(
    progress: Progress, answers_per_s: float, accepted_per_s: float
) -> tuple[float | None, float | None]:
    """The share of the way that is done and the seconds that are left; None where nobody knows:
    an input that has not been read to its end may hold any number of rows.
    """
    if progress.target == EVERY:
        done, goal, per_s = progress.decided_answers, progress.requests, answers_per_s
    else:
        done, goal, per_s = progress.accepted, progress.target, accepted_per_s
    if goal is None:
        return None, None
    left_s = round(max(0, goal - done) / per_s, 1) if per_s else None
    return done / goal if goal else 1.0, left_s


def told(progress: Progress, pool: Pool, speed: Speed) -> dict[str, Any]:
    """The state of a run as plain JSON values; all displays show these."""
    answers, accepted, prompt_tokens, completion_tokens = speed.per_s()
    share, left_s = _way(progress, answers, accepted)
    tokens = progress.prompt_tokens + progress.completion_tokens
    cost = _cost(progress, pool)
    return {
        "accepted": progress.accepted,
        "target": None if progress.target == EVERY else progress.target,
        "decided": progress.decided_answers,
        "requests": progress.requests,
        "share": share,
        "left_s": left_s,
        "sent": progress.sent,
        "answered": progress.answered,
        "failed": progress.failed,
        "calls": progress.calls,
        "calls_at_disk": progress.calls_at_disk,
        "undecided": progress.answered - progress.decided_answers,
        "deciding_s": round(progress.deciding_s, 1),
        "tokens_in_the_making": progress.tokens_in_the_making,
        "answers_per_s": round(answers, 2),
        "prompt_tokens": progress.prompt_tokens,
        "completion_tokens": progress.completion_tokens,
        "prompt_tokens_per_s": round(prompt_tokens, 1),
        "completion_tokens_per_s": round(completion_tokens, 1),
        "tokens_per_accepted": round(tokens / progress.accepted, 1) if progress.accepted else None,
        "cost": cost,
        "cost_at_end": round(cost / share, 4) if cost is not None and share else None,
        "not_compared_by_meaning": progress.unread,
        "refused": {visible(reason): n for reason, n in progress.reasons.most_common()},
        "stages": [
            {
                "name": name,
                "accepted": stage.accepted,
                "wanted": None if stage.target == EVERY else stage.target,
                "answered": stage.answered,
                "undecided": stage.answered - stage.decided_answers,
                "calls": stage.calls,
                "refused": sum(stage.reasons.values()),
            }
            for name, stage in progress.before.items()
        ],
        "batches": [
            {
                "state": visible(batch.state),
                "requests": batch.lines,
                "done": batch.done,
                "age_s": round(batch.age_s),
                "next_look_s": round(batch.next_look_s),
            }
            for batch in progress.batches
        ],
        "first_answers": progress.session_answered == 0,
        "learning_context": progress.learning,
        "draining": progress.draining,
        "drain_left_s": None if progress.drain_left_s is None else round(progress.drain_left_s, 1),
        "endpoints": [
            {
                "name": visible(endpoint.name),
                "in_flight": endpoint.in_flight,
                "limit": endpoint.limit,
                "state": endpoint.state,
                "binds": endpoint.binds,
                "failure": visible(endpoint.failure),
                "oldest_s": round(endpoint.oldest_s, 1),
                "limit_why": endpoint.history.why,
            }
            for endpoint in pool.snapshot()
        ],
    }


def _cost(progress: Progress, pool: Pool) -> float | None:
    """Money spent, as hosts state it or by the prices; None where there is neither."""
    cost = pool.settings.prices.cost_if_known(progress)
    return None if cost is None else round(cost, 4)


WAITING = ("waiting", "draining")
"""How words begin that say what the run does, and not what holds it back."""


def _binds(state: dict[str, Any]) -> str:
    """What holds the run back, or what it waits for, in a few words; empty where nothing does."""
    found = []
    disk = f"disk ({state['calls_at_disk']:,} of {state['calls']:,} calls wait for it)"
    if state["calls_at_disk"] > max(state["calls"] * AT_DISK, FEW):
        found.append(disk)
    if state["undecided"] > BACKLOG or state["deciding_s"] >= STUCK_S:
        since = f", for {state['deciding_s']:.0f} s" if state["deciding_s"] >= STUCK_S else ""
        found.append(f"deciding ({state['undecided']:,} answers wait{since})")
    if state["draining"]:
        awaited, left_s = _awaited(state) or "waiting for the decisions", state["drain_left_s"]
        left = "" if left_s is None or not state["calls"] else f", {left_s:.0f} s left"
        return ", ".join([f"draining ({awaited}{left})", *found])
    if state["learning_context"]:
        found.append("learning the context length (one call at a time)")
    for endpoint in state["endpoints"]:
        if endpoint["binds"] == "outage":
            why = f": {shorten(endpoint['failure'], 80)}" if endpoint["failure"] else ""
            found.append(f"outage ({endpoint['name']}{why})")
    if not state["endpoints"]:
        found.append("outage (all servers have left)")
    names = {endpoint["binds"] for endpoint in state["endpoints"]}
    found += sorted(names - {"nothing", "limit", "outage"})
    awaited = _awaited(state)
    if found:
        return ", ".join(found)
    if awaited and "limit" in names and not state["first_answers"]:
        return f"limit ({'; '.join([awaited, *_limited(state)])})"
    if awaited:
        return awaited
    if state["undecided"]:
        return f"deciding ({state['undecided']:,} answers)"
    return disk if state["calls_at_disk"] else ""


def _limited(state: dict[str, Any]) -> list[str]:
    """Why the limit is what it is, where one endpoint is held back by a limit that was found."""
    held = [endpoint for endpoint in state["endpoints"] if endpoint["binds"] == "limit"]
    return [held[0]["limit_why"]] if len(held) == 1 and held[0]["limit_why"] else []


def _awaited(state: dict[str, Any]) -> str:
    """What the servers still owe; empty where it is nothing."""
    busy = [endpoint for endpoint in state["endpoints"] if endpoint["in_flight"]]
    if not busy:
        return _batches(state["batches"])
    count = sum(endpoint["in_flight"] for endpoint in busy)
    oldest_s = max(endpoint["oldest_s"] for endpoint in busy)
    of = busy[0]["name"] if len(busy) == 1 else f"{len(busy)} endpoints"
    late = f", the oldest for {oldest_s:.0f} s" if oldest_s >= LATE_S else ""
    if state["first_answers"]:
        return f"waiting for the first answers: {count:,} calls to {of}{late}"
    return f"waiting for {count:,} {'answer' if count == 1 else 'answers'} from {of}{late}"


def _batches(batches: list[dict[str, Any]]) -> str:
    """What a provider still owes, and when it is asked next; empty where it is nothing."""
    if not batches:
        return ""
    requests = sum(batch["requests"] for batch in batches)
    done = sum(batch["done"] or 0 for batch in batches)
    states = ", ".join(sorted({batch["state"] for batch in batches}))
    oldest_s = max(batch["age_s"] for batch in batches)
    next_s = min(batch["next_look_s"] for batch in batches)
    many = "a batch" if len(batches) == 1 else f"{len(batches)} batches"
    answered = f", {done:,} done" if done else ""
    return (
        f"waiting for {many} of {requests:,} requests ({states}{answered}, for"
        f" {oldest_s // 3600} h {oldest_s % 3600 // 60} min), looking again in {next_s} s"
    )


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
        return event("progress", **state, binds=_binds(state) or "nothing")


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


class LiveDisplay:
    """A block that is redrawn in place; use as a context manager."""

    @staticmethod
    def fits() -> bool:
        """Whether standard error is a terminal that can redraw a block, and wide enough for it."""
        console = Console(stderr=True)
        able = os.environ.get("TERM") and console.is_terminal and not console.is_dumb_terminal
        return bool(able and sys.stderr.isatty() and console.width >= NARROWEST)

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
    bar = ProgressBar(total=1.0, completed=state["share"] or 0.0, width=32)
    left = "" if state["left_s"] is None else f"{clock(state['left_s'])} left"
    share = "" if state["share"] is None else f"  {state['share']:.0%}"
    head.add_row(
        bar, Text(_reached(state) + share, style="bold"), Text(left),
        Text("draining" * state["draining"]),
    )  # fmt: skip
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
    if held := _binds(state):
        waits = held.startswith(WAITING)
        body.add_row("now" if waits else "held back by", Text(held))
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
        if endpoint["limit_why"]:
            body.add_row("", Text(f"  limit {endpoint['limit']:,}: {endpoint['limit_why']}", "dim"))
    for stage in state["stages"]:
        body.add_row("stage", Text(_stage(stage)))
    if unread := state["not_compared_by_meaning"]:
        body.add_row("meaning", f"{unread:,} accepted rows not compared by it")
    refused = sum(state["refused"].values())
    if refused:
        shown = list(state["refused"].items())[:REASONS]
        body.add_row("refused", Text(" · ".join(f"{r} {n / refused:.0%}" for r, n in shown)))
    return Group(head, body)


def _stage(stage: dict[str, Any]) -> str:
    """How far a stage before the last is, and how many of its rows the next one wants."""
    wanted = "" if stage["wanted"] is None else f" of {stage['wanted']:,} wanted"
    return (
        f"{visible(stage['name'])}: accepted {stage['accepted']:,}{wanted} · answers "
        f"{stage['answered']:,} · {stage['calls']:,} in flight · refused {stage['refused']:,}"
    )


def _reached(state: dict[str, Any]) -> str:
    """How far the run is, by what it is to reach."""
    if state["target"] is not None:
        return f"accepted {state['accepted']:,}/{state['target']:,}"
    rows = "" if state["requests"] is None else f"/{state['requests']:,}"
    return f"decided {state['decided']:,}{rows} · accepted {state['accepted']:,}"


def _tokens(state: dict[str, Any]) -> str:
    line = f"{state['prompt_tokens_per_s']:,.0f} in · {state['completion_tokens_per_s']:,.0f} out"
    if state["tokens_in_the_making"]:
        line += f" · {state['tokens_in_the_making']:,} in the making"
    per_row = state["tokens_per_accepted"]
    return line if per_row is None else f"{line} · {per_row:,.0f} for an accepted record"


def summary(state: dict[str, Any]) -> str:
    """One line: accepted of target, answers, in flight, tokens a second, cost, time left."""
    in_flight = sum(endpoint["in_flight"] for endpoint in state["endpoints"])
    limit = sum(endpoint["limit"] for endpoint in state["endpoints"])
    parts = [
        _reached(state),
        f"answers {state['answered']:,}",
        f"in flight {in_flight}/{limit}",
        f"{state['completion_tokens_per_s']:,.0f} tokens/s",
    ]
    if state["tokens_in_the_making"]:
        parts.append(f"{state['tokens_in_the_making']:,} in the making")
    if held := _binds(state):
        parts.append(held if held.startswith(WAITING) else f"held back by {held}")
    parts += [
        f"{visible(stage['name'])} {stage['accepted']:,} accepted" for stage in state["stages"]
    ]
    if state["failed"]:
        parts.append(f"failed {state['failed']:,}")
    if unread := state["not_compared_by_meaning"]:
        parts.append(f"not compared by meaning {unread:,}")
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
