"""Of the samples of one input row the best, by a score that is a field of theirs."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError
from engine.export.rows import Row
from engine.stages import Lineage

__all__ = ["best_of", "group_of", "score_of"]


def best_of(rows: Iterable[Row], lineage: Lineage, field: str) -> tuple[NDArray[np.int64], int]:
    """The numbers of the best rows in plan order: for each input row the first of those with the
    highest score; and how many input rows give none, as no sample of theirs has a score.

    Raises ConfigError as ``group_of`` and ``score_of`` do.
    """
    best, unscored = array("q"), 0
    for _, group in groupby(rows, lambda row: group_of(lineage, row, "--best")):
        scored = [(score, row) for row in group if (score := score_of(row, field)) is not None]
        if scored:
            best.append(max(scored, key=lambda each: each[0])[1].number)
        else:
            unscored += 1
    return np.array(best, np.int64), unscored


def group_of(lineage: Lineage, row: Row, flag: str) -> int:
    """Which input row ``row`` is a sample of. Raises ConfigError where no stage has several."""
    group = lineage.group(row.decision.index)
    if group is None:
        raise ConfigError(
            f"{flag} needs several samples of each input row, and this run has one of each;"
            " generate with --samples 4, or let a stage of the recipe have samples"
        )
    return group


def score_of(row: Row, field: str) -> float | None:
    """Its score; None: it has none. Raises ConfigError where there is no such field, or where it is
    no number.
    """
    if field not in row.record:
        raise ConfigError(
            f"rows have no field {field!r} to be their score; there are: {', '.join(row.record)}"
        )
    value = row.record[field]
    if value is None:
        return None
    if not isinstance(value, int | float):
        raise ConfigError(f"row {row.id}: {field!r} is no number, so it can be no score")
    try:
        score = float(value)
    except OverflowError:
        score = math.inf if value > 0 else -math.inf
    return None if math.isnan(score) else score
