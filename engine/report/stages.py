"""A line for each stage of a run, and what all of them took together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.records import SAMPLE
from engine.report.figures import figures
from engine.stages import open_stages, stages_of_run
from engine.store import RunReader

__all__ = ["COLUMNS", "lines", "main_reasons", "models", "stage_figures"]

KEPT = (
    "model", "requests", "responses", "failed", "pieces", "accepted", "rejected", "tokens", "cost",
    "cost_without_answer",
)  # fmt: skip
"""What is taken of a stage's figures."""
COLUMNS = ("stage", "model", "asked", "answered", "failed", "accepted", "refused", "tokens", "cost")
"""The heads of the table of which ``lines`` gives the rows."""
MAIN = 3
"""Reasons that are named; the others are counted."""


def stage_figures(run: RunReader) -> dict[str, Any]:
    """``stages``: figures of each stage in order; ``all_stages``: tokens and cost of all. Of a run
    of one stage, an empty list and None. Plain JSON values.
    """
    *earlier, last = stages_of_run(run.folder)
    if not earlier:
        return {"stages": [], "all_stages": None}
    with open_stages(earlier) as before:
        told = [*zip(earlier, before, strict=True), (last, run)]
        stages = [
            {"stage": stage.name, **{name: each[name] for name in KEPT}}
            for stage, each in ((stage, figures(reader, exact=False)) for stage, reader in told)
        ]
    summed = {
        "requests": sum(stage["requests"] for stage in stages),
        "tokens": {
            kind: sum(stage["tokens"][kind] for stage in stages)
            for kind in ("prompt", "completion")
        },
        "cost": _sum([stage["cost"] for stage in stages]),
        "cost_without_answer": _sum([stage["cost_without_answer"] for stage in stages]),
    }
    return {"stages": stages, "all_stages": summed}


def models(analysis: Mapping[str, Any]) -> str:
    """The models of all stages, each once: ``writer, judge``."""
    stages = analysis["stages"] or [analysis["figures"]]
    return ", ".join(dict.fromkeys(str(stage["model"]) for stage in stages if stage["model"]))


def _sum(costs: Sequence[float | None]) -> float | None:
    """None where one of them is not known."""
    known = [cost for cost in costs if cost is not None]
    return round(sum(known), 6) if len(known) == len(costs) else None


def costs(analysis: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """What a run cost, under a name each: of several stages, this one and all. What attempts
    of which no answer is kept may have cost stands there where it is anything.
    """
    told = [("", analysis["figures"])]
    if analysis["stages"]:
        told = [(" of this stage", analysis["figures"]), (" of all stages", analysis["all_stages"])]
    named: list[tuple[str, float | None]] = []
    for of, sums in told:
        named.append((f"cost{of}", sums["cost"]))
        if besides := sums["cost_without_answer"]:
            named.append((f"at most, for attempts of which no answer is kept{of}", besides))
    return named


def main_reasons(rejected: Mapping[str, int]) -> str:
    """The refusals in a few words: ``40 refused (short 30, duplicate_exact 10)``. A sample that a
    row was made of is none.
    """
    refused = {reason: count for reason, count in rejected.items() if reason != SAMPLE}
    total = sum(refused.values())
    if not total:
        return "none refused"
    ranked = sorted(refused.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{reason} {count:,}" for reason, count in ranked[:MAIN])
    more = sum(count for _, count in ranked[MAIN:])
    return f"{total:,} refused ({named}{f', others {more:,}' if more else ''})"


def lines(analysis: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
    """The rows of a table with ``COLUMNS``, the sums last; none for a run of one stage."""
    if not analysis["stages"]:
        return []
    told = [
        (
            stage["stage"],
            stage["model"],
            stage["requests"],
            stage["responses"],
            stage["failed"],
            stage["accepted"],
            main_reasons(stage["rejected"]),
            sum(stage["tokens"].values()),
            stage["cost"],
        )
        for stage in analysis["stages"]
    ]
    summed = analysis["all_stages"]
    tokens = sum(summed["tokens"].values())
    return [*told, ("all stages", "", summed["requests"], "", "", "", "", tokens, summed["cost"])]
