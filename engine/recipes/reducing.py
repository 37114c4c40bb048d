"""How the samples of one input row become one row: ``all``, ``majority:FIELD``, ``best:FIELD``."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from engine.errors import ConfigError
from engine.recipes.base import Refusal
from engine.records import Record
from engine.text import nearest

__all__ = ["Reduction", "reduction"]

Reduction = Callable[[Sequence[Record]], Record | Refusal]
"""One row of those that the samples gave, at least one, in their order."""


def reduction(how: str, fields: Sequence[str], given: Sequence[str], where: str) -> Reduction:
    """What ``reduce`` names. Raises ConfigError for a field that rows have not.

    Args:
        fields: of a row.
        given: those of them that each sample has its own value of.
    """
    kind, _, field = how.partition(":")
    if kind == "all":
        return lambda rows: rows[0] | {name: [row[name] for row in rows] for name in given}
    if field not in fields:
        hint = nearest(field, fields)
        raise ConfigError(f"{where}: a row has no field {field!r}; {hint}")
    choose = _majority if kind == "majority" else _best
    return lambda rows: choose(rows, field)


def _majority(rows: Sequence[Record], field: str) -> Record:
    """The first row of those that have the most frequent value; of several values as frequent, of
    the one that came first.
    """
    values = [json.dumps(row[field], sort_keys=True) for row in rows]
    return rows[values.index(Counter(values).most_common(1)[0][0])]


def _best(rows: Sequence[Record], field: str) -> Record | Refusal:
    """The row with the largest number; of several as large, the first."""
    numbers = [_number(row[field]) for row in rows]
    largest = max((number for number in numbers if number is not None), default=None)
    if largest is None:
        return "not_a_number", f"no sample has a number in {field}"
    return rows[numbers.index(largest)]


def _number(value: Any) -> float | None:
    """A number, or what a text reads as one, for a regular expression finds texts."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number
