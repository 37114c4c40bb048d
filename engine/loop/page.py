"""The rounds of a loop as curves: a page, a table, a line for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from engine.loop.ledger import Ledger, Round
from engine.report.charts import Chart, curve
from engine.report.html import document, table_of
from engine.report.markdown import table
from engine.text import visible

__all__ = ["html", "line_of", "markdown", "told"]

COLUMNS = (
    "round", "held-out loss", "kept", "rows", "trained on", "rows per 1,000 tokens", "verbs",
    "nearest, words", "nearest, meaning", "loss on its own rows", "main reasons of refusal",
)  # fmt: skip
REASONS = 3
CURVES = {
    "loss": "held-out loss, nats a token",
    "per_1000_tokens": "accepted rows per 1,000 tokens",
    "distinct_verbs": "distinct verbs",
    "nearest_rouge_l": "ROUGE-L F to the nearest earlier text, mean",
    "nearest_cosine": "cosine to the nearest other row, mean",
}
"""Figures of a round that are drawn, and what their axes say."""
_BARS = "▁▂▃▄▅▆▇█"


def told(ledger: Ledger) -> dict[str, Any]:
    """All that the ledger says, as plain JSON values."""
    start = None if ledger.start is None else asdict(ledger.start)
    return {"start": start, "rounds": [asdict(each) for each in ledger.rounds]}


def markdown(ledger: Ledger) -> str:
    """The rounds as a table."""
    return f"# {_title(ledger)}\n\n{table(COLUMNS, _cells(ledger))}\n"


def html(ledger: Ledger, *, refresh_s: int | None = None) -> str:
    """The page with its curves; one that is looked at while the loop goes on asks for itself again.

    Raises ConfigError where a package is missing.
    """
    drawn = _curves(ledger)
    charts = "".join(
        f'<div class="chart" id="{name}" role="img" aria-label="{escape(CURVES[name])}"></div>'
        for name in drawn
    )
    cells = [[f"<bdi>{escape(_shown(value))}</bdi>" for value in row] for row in _cells(ledger)]
    body = (
        f"<h1>{escape(_title(ledger))} <small>{escape(_folder(ledger))}</small></h1>"
        f'<section><h2>Round by round</h2><div class="row">{charts}</div></section>'
        f"<section><h2>Figures</h2>{table_of(COLUMNS, cells)}</section>"
    )
    return document(_title(ledger), body, drawn, refresh_s=refresh_s)


def line_of(done: Round, ledger: Ledger) -> str:
    """A round in a line, with the held-out loss from the first model on as a small curve."""
    rate = "" if done.per_1000_tokens is None else f", {done.per_1000_tokens:g} per 1,000 tokens"
    verb = "kept" if done.kept else "not kept"
    return (
        f"round {done.number}: held-out loss {done.loss_before:.4f} -> {done.loss:.4f} "
        f"{_spark(_losses(ledger))}, {verb}; {done.accepted:,} rows{rate}"
    )


def _title(ledger: Ledger) -> str:
    rounds = len(ledger.rounds)
    kept = sum(each.kept for each in ledger.rounds)
    return f"{rounds} {'round' if rounds == 1 else 'rounds'}, {kept} kept"


def _folder(ledger: Ledger) -> str:
    return visible(str(ledger.path.parent))


def _losses(ledger: Ledger) -> list[float]:
    first = [] if ledger.start is None else [ledger.start.loss]
    return [*first, *(each.loss for each in ledger.rounds)]


def _cells(ledger: Ledger) -> Iterator[Sequence[Any]]:
    if ledger.start is not None:
        yield (0, ledger.start.loss, "first model", *[None] * (len(COLUMNS) - 3))
    for each in ledger.rounds:
        reasons = [f"{reason} {count:,}" for reason, count in list(each.refused.items())[:REASONS]]
        yield (
            each.number,
            each.loss,
            "yes" if each.kept else "no",
            each.accepted,
            each.trained,
            each.per_1000_tokens,
            each.distinct_verbs,
            each.nearest_rouge_l,
            each.nearest_cosine,
            each.own_loss,
            ", ".join(reasons),
        )


def _curves(ledger: Ledger) -> dict[str, Chart]:
    """A chart for each figure that some round has."""
    drawn = {}
    for name, title in CURVES.items():
        points = [
            (each.number, getattr(each, name), "kept" if each.kept else "not kept")
            for each in ledger.rounds
            if getattr(each, name) is not None
        ]
        if name == "loss" and ledger.start is not None:
            points.insert(0, (0, ledger.start.loss, "kept"))
        if points:
            drawn[name] = curve(points, "round", title)
    return drawn


def _spark(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    steps = len(_BARS) - 1
    return "".join(
        _BARS[round((v - low) / (high - low) * steps) if high > low else 0] for v in values
    )


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4f}"
    return f"{value:,}" if isinstance(value, int) else visible(str(value))
