"""Datasets to stay clear of: their rows as references of a cascade."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from engine.datasets import BadRowError, Compared, Dataset, Row, Skip, choose
from engine.dedup.cascade import Cascade
from engine.dedup.shared import SharedRuns
from engine.errors import InputError

__all__ = ["add_references", "batches"]

BATCH = 256
"""Rows that are read, and then compared and embedded, together; so memory holds few of a large
dataset."""


def add_references(
    cascade: Cascade,
    path: Path,
    fields: tuple[str, ...] = (),
    shared: SharedRuns | None = None,
) -> Compared:
    """Compare with the rows of a dataset from now on; those with nothing to compare are left out.

    ``fields`` are compared where the dataset has them all, else what its first row suggests: a set
    to stay clear of may well have other columns. ``shared`` takes their runs of words. Returns what
    is compared.

    Raises InputError where there are no such rows: a comparison with nothing would go unnoticed.
    """
    known, added = None, 0
    for rows, texts, compared in batches(Dataset(path), fields, strict=False):
        known = compared
        found = [(row, text) for row, text in zip(rows, texts, strict=True) if text]
        added += len(found)
        sources = [f"against:{row.path}:{row.line}" for row, _ in found]
        cascade.add_reference([text for _, text in found], sources)
        if shared is not None:
            for (_, text), source in zip(found, sources, strict=True):
                shared.add(text, source)
    if known is None or not added:
        raise InputError(f"{path}: holds nothing to compare with; check --against")
    return known


def batches(
    dataset: Dataset,
    fields: tuple[str, ...] = (),
    *,
    strict: bool = True,
    skip: Skip | None = None,
) -> Iterator[tuple[list[Row], list[str], Compared]]:
    """Rows, what is compared of each (empty: nothing), and what that is.

    Args:
        strict: a dataset without one of ``fields`` is an error.
        skip: is told of rows of which that cannot be read, which are left out; else the first is
            an error.
    """
    rows = iter(dataset)
    compared = None
    while batch := list(islice(rows, BATCH)):
        if compared is None:
            named = fields if strict or batch[0].values.keys() >= set(fields) else ()
            compared = choose(batch[0], named)
        kept, texts = [], []
        for row in batch:
            try:
                texts.append(compared.text(row))
            except InputError as exc:
                if skip is None:
                    raise
                skip(BadRowError(str(exc), row.path, row.line, values=row.values))
            else:
                kept.append(row)
        yield kept, texts, compared
