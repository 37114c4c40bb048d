"""Input rows that a program has, written into the run's folder: from then on they are rows of a
file as all others are, read again by number, after a crash too.

They are all written before the first request, at some 300,000 a second; a generator is read to its
end. The price is that a run does not begin before its last row is known, which a resumption needs
to know anyway.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import date, time
from decimal import Decimal
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

import orjson

from engine.datasets import Dataset
from engine.errors import ConfigError, InputError, OutputError
from engine.files import new_file
from engine.json_values import loads
from engine.run.settle import earlier_manifest
from engine.stages import folders_below

__all__ = ["ROWS", "each_row", "spool"]

ROWS = "rows.jsonl"
"""The file in a run's folder that holds rows which a program gave."""
BATCH = 1_000
"""Rows of a data frame that are made at once."""


class _AsBefore(Exception):
    """The rows are those of the file, which stays as it is."""


def spool(rows: Iterable[Any], folder: Path) -> Path:
    """Write ``rows`` into the run's ``folder`` as JSON Lines; the file's path.

    A run that goes on must be given the same rows; there may be more of them at the end.

    Args:
        rows: mappings, or a data frame of pandas or polars.

    Raises:
        ConfigError: a row is none, has values that JSON has not, or is not what the run was
            started with; it is named by its number, from 1.
        InputError: there are no rows.
        OutputError: the folder cannot be written, or has a file of that name that is not ours.
    """
    path = folder / ROWS
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be created: {error.strerror}") from error
    before = iter(Dataset(path)) if _is_ours(path) else None
    lines = _lines(rows)
    with suppress(_AsBefore), new_file(path) as file:
        # A single line would be read as a document, whose one object may be there for a list in it.
        first, second = next(lines, None), next(lines, None)
        if first is None:
            raise InputError("rows: there are none; was a generator read to its end before?")
        if second is None:
            lines = iter([b"[" + first + b"]"])
        else:
            lines = chain([first, second], lines)
        count = 0
        for count, line in enumerate(lines, 1):
            if before is not None and (earlier := next(before, None)) is not None:
                if loads(line) not in (earlier.values, [earlier.values]):
                    raise _changed(path, count)
            elif before is not None:
                before = None
            file.write(line + b"\n")
        if before is not None:
            if next(before, None) is not None:
                raise _changed(path, count + 1)
            raise _AsBefore
    return path


def _is_ours(path: Path) -> bool:
    """Whether the rows there were written here. Raises OutputError where they are another's."""
    if not os.path.lexists(path):
        return False
    stages = [stage.folder for _, stage in folders_below(path.parent)]
    manifest = earlier_manifest(stages[0] if stages else path.parent)  # rows are the first one's
    if manifest is not None and str(manifest.free.get("rows")) == str(path):
        return True
    raise OutputError(
        f"{path}: exists, and was not written for this run; choose another folder with out, or "
        "give the file itself as rows"
    )


def _changed(path: Path, number: int) -> ConfigError:
    return ConfigError(
        f"rows: row {number:,} is not what the run in {path.parent} was started with; resume with "
        "the same rows, or start a new run"
    )


def _lines(rows: Iterable[Any]) -> Iterator[bytes]:
    for number, row in enumerate(each_row(rows), 1):
        if not isinstance(row, Mapping):
            raise ConfigError(f"rows: row {number:,} is a {type(row).__name__}, not a mapping")
        if not all(isinstance(name, str) for name in row):
            raise ConfigError(f"rows: row {number:,} has a field whose name is no text")
        yield _line(row if isinstance(row, dict) else dict(row), number)


def each_row(rows: Any) -> Iterator[Any]:
    """The rows of an iterable; a data frame, iterated, would give the names of its columns."""
    if hasattr(rows, "iter_rows"):  # polars
        yield from rows.iter_rows(named=True)
    elif hasattr(rows, "iloc"):  # pandas
        for start in range(0, len(rows), BATCH):
            yield from rows.iloc[start : start + BATCH].to_dict("records")
    elif isinstance(rows, Mapping):
        raise ConfigError("rows: a mapping is one row; give a list of them")
    else:
        yield from rows


def _line(row: dict[Any, Any], number: int) -> bytes:
    options = orjson.OPT_SERIALIZE_NUMPY
    try:
        try:
            return orjson.dumps(row, default=_plain, option=options)
        except TypeError:  # half of a surrogate pair, or an integer of any size
            return json.dumps(row, default=_plain, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"rows: row {number:,} has what JSON has not: {error}") from error


def _plain(value: Any) -> Any:
    """What stands for a value that JSON does not have; only what says the same."""
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal | PurePath):
        return str(value)
    convert: Callable[[], Any] | None = getattr(value, "tolist", None) or getattr(
        value, "item", None
    )
    if convert is not None:  # of NumPy
        return convert()
    raise TypeError(f"a value of type {type(value).__name__}")
