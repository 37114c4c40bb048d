"""Two runs side by side: their figures, the settings they differ in, and how far they overlap."""

from __future__ import annotations

from itertools import islice
from typing import Any

from engine.dedup.rouge import RougeIndex
from engine.languages import ENGLISH
from engine.report.figures import figures
from engine.report.shape import shape_of
from engine.store import RunReader

__all__ = ["compare"]

SAMPLE = 2000
"""Rows of each run that are looked for in the other; an even sample of a larger one."""
NUMBERS = (
    "requests", "responses", "failed", "dropped_at_a_stop", "pieces", "parsed", "accepted",
    "tokens_per_accepted", "tokens_per_s", "cost", "seconds",
)  # fmt: skip


def compare(one: RunReader, other: RunReader) -> dict[str, Any]:
    """Plain JSON values. ``overlap``: the share of a run's texts (instructions) that the other's
    near-duplicate threshold would refuse beside its own rows.
    """
    mine, theirs = figures(one), figures(other)
    reasons = sorted({*mine["rejected"], *theirs["rejected"]})
    return {
        "runs": [mine["run"], theirs["run"]],
        "figures": {name: [mine[name], theirs[name]] for name in NUMBERS},
        "acceptance": [_share(mine["accepted"], mine), _share(theirs["accepted"], theirs)],
        "rejected": {
            reason: [
                _share(mine["rejected"].get(reason, 0), mine),
                _share(theirs["rejected"].get(reason, 0), theirs),
            ]
            for reason in reasons
        },
        "settings": one.manifest.differences(other.manifest),
        "overlap": [_overlap(one, other), _overlap(other, one)],
    }


def _share(count: int, of: dict[str, Any]) -> float | None:
    return round(count / of["pieces"], 4) if of["pieces"] else None


def _overlap(of: RunReader, within: RunReader) -> float | None:
    total = of.counts().accepted
    decided_by = within.manifest.decision
    if not total or decided_by.get("rouge_threshold") is None:
        return None
    index = RougeIndex(decided_by.get("rouge_threshold"), decided_by.get("language", ENGLISH))
    shape = shape_of(within)
    for decision in within.decisions(accepted=True):
        if decision.record is not None:
            index.add(shape.told_by(decision.record))
    step = max(1, total // SAMPLE)
    looked_at = near = 0
    shape = shape_of(of)
    for decision in islice(of.decisions(accepted=True), 0, SAMPLE * step, step):
        looked_at += 1
        near += index.find(shape.told_by(decision.record)) is not None
    return round(near / looked_at, 4)
