"""What a round's run is worth in figures, from its store alone.

Only what the accepted rows followed from is counted: which answers came beyond that, and how many
rows an early stage had ready, depends on the moment a run ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine import models
from engine.errors import ConfigError
from engine.languages import ENGLISH
from engine.records import SAMPLE
from engine.report.analysis import nearest_cosines
from engine.report.pictures import PARSER, verbs
from engine.stages import open_stages, samples_of, stages_of_run
from engine.store import RunReader

__all__ = ["Figures", "figures_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """See ``engine.loop.ledger.Round``."""

    accepted: int
    completion_tokens: int
    refused: dict[str, int]
    distinct_verbs: int | None
    nearest_rouge_l: float | None
    nearest_cosine: float | None


def figures_of(folder: Path, recipe: str) -> Figures:
    """The figures of the finished run in ``folder``. ``recipe``: as the person has named it."""
    with open_stages(stages_of_run(folder)) as stages:
        last = stages[-1]
        last.named_recipe = recipe
        tokens, refused = _spent(stages)
        cosines = nearest_cosines(last)
        return Figures(
            accepted=last.counts().accepted,
            completion_tokens=tokens,
            refused=dict(sorted(refused.items(), key=lambda each: (-each[1], each[0]))),
            distinct_verbs=_distinct_verbs(last),
            nearest_rouge_l=_nearest_rouge_l(last),
            nearest_cosine=None if cosines is None else round(float(np.mean(cosines)), 4),
        )


def _spent(stages: Sequence[RunReader]) -> tuple[int, Counter[str]]:
    """Completion tokens and refused pieces of the requests that the rows followed from."""
    tokens, refused = 0, Counter[str]()
    last = _last_decided(stages[-1])
    for place in reversed(range(len(stages))):
        run = stages[place]
        for answer, _ in run.all_answers():
            if answer.index > last:
                break
            if answer.completion is not None:
                tokens += answer.completion.usage.completion_tokens
        for decision in run.decisions(accepted=False):
            if decision.index <= last and decision.reason != SAMPLE:
                refused[decision.reason or ""] += 1
        if place:
            before = stages[place - 1]
            parent = before.accepted_place(last // (samples_of(run) or 1))
            last = parent[0] if parent is not None else _last_decided(before)
    return tokens, refused


def _last_decided(run: RunReader) -> int:
    """The last request of which something is decided; -1: there is none."""
    place = run.counts().last_decided
    return -1 if place is None else place[0]


def _distinct_verbs(run: RunReader) -> int | None:
    if run.manifest.decision.get("language", ENGLISH) != ENGLISH or models.find(PARSER) is None:
        return None
    try:
        found: int = verbs(run)["distinct"]
    except ConfigError:  # there is no spaCy
        return None
    return found


def _nearest_rouge_l(run: RunReader) -> float | None:
    if run.manifest.decision.get("rouge_threshold") is None:
        return None
    nearest = [
        max(decision.most_similar.values(), default=0.0)
        for decision in run.decisions(accepted=True)
        if decision.mean_similarity is not None
    ]
    return round(float(np.mean(nearest)), 4) if nearest else None
