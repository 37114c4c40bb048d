"""Which rows a dataset has, and in which order: the first ones, or the best by a number.

These are steps over the whole set, so they belong here and not into the run, whose decisions never
look ahead. Of rows to be sorted a number and a place are held, 20 bytes each, and never their text;
rows that are alike stay in plan order.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError, UsageError
from engine.records import Record
from engine.store import RunReader

__all__ = ["Choice", "Place", "Sorted", "choose"]

SORT = re.compile(r"(?P<sign>-?)(?:length\((?P<measured>.+)\)|(?P<field>.+))", re.S)
"""``--sort``: ``score``, ``-score`` for the highest first, or ``-length(output)``."""


class Place(NamedTuple):
    """Where a row is in the run."""

    number: int
    """Among the accepted rows in plan order, from 0."""
    request: int
    position: int


@dataclass(frozen=True, slots=True)
class Sorted:
    """Rows in an order of their own: (N,) each, in plan order, and ``order`` over them."""

    request: NDArray[np.int64]
    position: NDArray[np.int32]
    order: NDArray[np.int64]

    def __iter__(self) -> Iterator[Place]:
        for number in self.order.tolist():
            yield Place(number, int(self.request[number]), int(self.position[number]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The rows of a dataset."""

    count: int
    sorted: Sorted | None = None
    """None: the first ``count`` in plan order."""
    unsorted: int = 0
    """Of the rows sorted: those without a value to sort by, which come last."""

    def of(self, mask: NDArray[np.bool_]) -> int:
        """How many of the chosen rows ``mask`` (over all accepted rows in plan order) has."""
        if self.sorted is None:
            return int(mask[: self.count].sum())
        return int(mask[self.sorted.order].sum())


def choose(
    run: RunReader,
    *,
    take: int | None = None,
    sort: str | None = None,
    top: int | None = None,
    samples: int | None = None,
    among: NDArray[np.int64] | None = None,
) -> Choice:
    """The first ``take`` rows in plan order, of these the first ``top`` in the order of ``sort``.

    Args:
        among: the numbers, in plan order, of the rows that there are to choose from; None: all.
        samples: requests for each input row, where ``take`` counts input rows.
        sort: ``FIELD`` from low to high, ``-FIELD`` from high to low; ``length(FIELD)`` sorts by
            the characters of a text, or the items of a list.

    Raises UsageError for ``top`` without ``sort``, and where the field has nothing to sort by;
    ConfigError where rows have no such field.
    """
    if top is not None and sort is None:
        raise UsageError("--top needs --sort: give what is best, for example --sort=-score")
    count = run.counts().accepted
    if among is not None:
        among = among[:take]
    elif take is not None:
        count = min(take, count) if samples is None else _rows_of(run, take, samples)
    if sort is None and among is None:
        return Choice(count=count)
    key, downwards = _key_of(sort)
    keys, requests, positions = array("d"), array("q"), array("i")
    for decision in islice(run.decisions(accepted=True), count):
        keys.append(key(decision.record or {}))
        requests.append(decision.index)
        positions.append(decision.position)
    numbers = np.array(keys, np.float64)
    chosen = np.arange(len(numbers)) if among is None else among
    numbers = numbers[chosen]
    # Stable, and what has no value (NaN) comes last, from low to high and from high to low.
    order = chosen[np.argsort(-numbers if downwards else numbers, kind="stable")][:top]
    return Choice(
        count=len(order),
        sorted=Sorted(np.array(requests, np.int64), np.array(positions, np.int32), order),
        unsorted=int(np.isnan(numbers).sum()),
    )


def _key_of(sort: str | None) -> tuple[Callable[[Record], float], bool]:
    """What ``--sort`` sorts by, and whether from high to low; None: the order of the plan."""
    if sort is None:
        return lambda record: 0.0, False
    matched = SORT.fullmatch(sort)
    if matched is None:
        raise UsageError("--sort: name a field, for example --sort=-score")
    field = matched["measured"] or matched["field"]
    value = _length if matched["measured"] else _number
    return lambda record: _key(record, field, value), bool(matched["sign"])


def _rows_of(run: RunReader, take: int, samples: int) -> int:
    """How many rows the first ``take`` input rows gave that gave any."""
    seen, last = 0, -1
    for count, decision in enumerate(run.decisions(accepted=True)):
        if decision.index // samples != last:
            seen, last = seen + 1, decision.index // samples
        if seen > take:
            return count
    return run.counts().accepted


def _key(record: Record, field: str, value: Callable[[str, Any], float]) -> float:
    if field not in record:
        names = ", ".join(record) or "none"
        raise ConfigError(f"--sort: rows have no field {field!r}; there are: {names}")
    return math.nan if record[field] is None else value(field, record[field])


def _number(field: str, value: Any) -> float:
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    raise UsageError(
        f"--sort: {field!r} holds {_kind(value)} and no number; sort by its length with "
        f"--sort 'length({field})'"
    )


def _length(field: str, value: Any) -> float:
    if isinstance(value, str | list | dict):
        return len(value)
    raise UsageError(
        f"--sort: {field!r} holds numbers, which have no length; sort by --sort {field}"
    )


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else "objects"
