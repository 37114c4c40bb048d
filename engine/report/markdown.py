"""The report as Markdown, for a terminal, a pull request or a wiki: the figures, no pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.report.stages import COLUMNS, costs, lines, models
from engine.text import counted, shorten, visible

__all__ = ["markdown", "table"]

CHARACTERS = 160
"""Of a field in a table."""


def markdown(analysis: Mapping[str, Any]) -> str:
    """Headline figures, refusals with one example each, checks and bursts."""
    return "\n\n".join(_parts(analysis)) + "\n"


def _parts(analysis: Mapping[str, Any]) -> Iterable[str]:
    figures = analysis["figures"]
    yield f"# {counted(figures['accepted'], 'record')} by {_cell(models(analysis))}"
    names = (
        "run", "backend", "requests", "responses", "failed", "dropped_at_a_stop",
        "waiting_at_a_stop", "lost_in_a_crash", "in_flight", "wasted", "pieces", "parsed",
        "accepted", "not_compared_by_meaning", "input_rows_left_out",
        "tokens_per_accepted", "tokens_per_s", "seconds", "sessions",
    )  # fmt: skip
    stage = [("stage", told["stage"]) for told in analysis["stages"][-1:]]
    told = [*stage, *((name, figures[name]) for name in names)]
    yield table(("figure", "value"), [*told, *costs(analysis)])
    if stages := lines(analysis):
        yield "## Stages"
        yield table(COLUMNS, stages)
    if examples := analysis["accepted_examples"]:
        yield "## Rows at random"
        fields = list(examples[0]["fields"])
        rows = [[row["id"], *(_few(row["fields"].get(f, "")) for f in fields)] for row in examples]
        yield table(("row", *fields), rows)
    yield "## Refused"
    refused = [
        (reason, told["count"], *_example(told["examples"], analysis["told_by"]))
        for reason, told in analysis["rejected"].items()
    ]
    yield table(("reason", "pieces", "for example", "because of"), refused)
    yield f"## Lengths, in {analysis['unit']}"
    lengths = [
        (name, words["mean"], words["median"], words["max"])
        for name, words in analysis["words"].items()
    ]
    yield table(("field", "mean", "median", "longest"), lengths)
    if openings := analysis["openings"]:
        yield "## Most frequent openings"
        yield table(("opening", "rows"), openings)
    yield "## Before you train on it"
    checks = [*analysis["checks"].items()]
    again = analysis["output_duplicates"]["rows"]
    checks.append((f"{analysis['answer']} is that of an earlier row too", again))
    yield table(("what to look for", "rows"), checks)
    if bursts := analysis["bursts"]:
        yield "## Suspicious bursts"
        columns = ("phrase", "rows", "sign", "opening")
        yield table(columns, [[burst[column] for column in columns] for burst in bursts])


def _few(text: str) -> str:
    return shorten(text, CHARACTERS)


def _example(examples: Sequence[Mapping[str, Any]], told_by: str) -> tuple[Any, Any]:
    if not examples:
        return "", ""
    first = examples[0]
    nearest = first["nearest"]
    why = f"{nearest['text']} ({nearest['score']:.2f})" if nearest else first["detail"]
    return first[told_by] or "", why


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; text in it is text."""
    lines = [f"| {' | '.join(map(_cell, head))} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    text = visible(" ".join(str(value).split()))
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, f"\\{mark}")
    return text
