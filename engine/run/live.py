"""The live block of a terminal, redrawn in place."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engine.limits import Pool
from engine.run.progress import Progress
from engine.run.status import Speed, told
from engine.run.wording import WAITING, binds, clock, reached, stage_line, tokens_line
from engine.text import in_money, visible

__all__ = ["LiveDisplay"]

REASONS = 6
"""Reasons of refusals that are shown, the most frequent first."""
NARROWEST = 40
"""Columns of a terminal, below which plain lines are easier to read than the block."""


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
        bar, Text(reached(state) + share, style="bold"), Text(left),
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
    body.add_row("tokens/s", tokens_line(state))
    if state["cost"] is not None:
        at_end = state["cost_at_end"]
        estimate = "" if at_end is None else f" · about {in_money(at_end)} at the end"
        body.add_row("cost", in_money(state["cost"]) + estimate)
    if held := binds(state):
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
        body.add_row("stage", Text(stage_line(stage)))
    if unread := state["not_compared_by_meaning"]:
        body.add_row("meaning", f"{unread:,} accepted rows not compared by it")
    refused = sum(state["refused"].values())
    if refused:
        shown = list(state["refused"].items())[:REASONS]
        body.add_row("refused", Text(" · ".join(f"{r} {n / refused:.0%}" for r, n in shown)))
    return Group(head, body)
