"""Datasets in and out: JSON Lines and Parquet as a stream, a JSON list as a whole.

A row is what the file holds, with whatever fields it has; it is written as it was read. The format
goes by the file's ending.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from engine.errors import InputError, OutputError, UsageError
from engine.files import new_file

__all__ = ["Row", "read_rows", "writer"]

LINES = (".jsonl", ".ndjson")
ENDINGS = (*LINES, ".json", ".parquet")
BATCH = 1_000
"""Rows of Parquet that are held at once."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it stands."""

    path: Path
    line: int
    """Line of a JSON Lines file, or number of the row in the others, from 1."""
    values: dict[str, Any]

    def text(self, fields: tuple[str, ...]) -> str:
        """What is compared: the fields on a line each, empty ones left out.

        Raises InputError where a field is missing or no text.
        """
        texts: list[str] = []
        for field in fields:
            if field not in self.values:
                raise InputError(
                    f"{self.path}:{self.line}: there is no field {field!r}; see --field"
                )
            value = self.values[field]
            if not isinstance(value, str | None):
                raise InputError(f"{self.path}:{self.line}: field {field!r} is not text")
            texts.append(value or "")
        return "\n".join(text for text in texts if text)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows in the file's order. Raises InputError, naming path and line."""
    reader = {".json": _json, ".parquet": _parquet}.get(_ending(path), _lines)
    try:
        for line, values in reader(path):
            if not isinstance(values, dict):
                raise InputError(f"{path}:{line}: the row is not an object with fields")
            yield Row(path, line, values)
    except OSError as exc:
        raise InputError(f"{path}: cannot be read: {exc.strerror or exc}") from exc


@contextmanager
def writer(path: Path, like: Path | None = None) -> Iterator[Callable[[Any], None]]:
    """Gives a function that writes one value; the file appears when the context ends well.

    Args:
        like: a Parquet file whose column types a Parquet file takes over; else the first rows tell
        them.
    """
    ending = _ending(path)
    if ending == ".parquet":
        with _parquet_writer(path, like) as write:
            yield write
        return
    with new_file(path) as file:
        if ending in LINES:
            yield lambda value: _write(file, _dumps(value), b"\n")
            return
        separator = b"[\n"

        def put(value: Any) -> None:
            nonlocal separator
            _write(file, separator, _dumps(value))
            separator = b",\n"

        yield put
        file.write(b"[]\n" if separator == b"[\n" else b"\n]\n")


def _ending(path: Path) -> str:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise UsageError(f"{path}: the name must end in one of {', '.join(ENDINGS)}")
    return ending


def _loads(data: bytes, where: str) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as exc:
        raise InputError(f"{where}: not JSON: {exc.msg} (column {exc.colno})") from exc


def _dumps(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # an integer beyond 64 bits, or a lone surrogate
        return json.dumps(value).encode()


def _write(file: Any, *parts: bytes) -> None:
    for part in parts:
        file.write(part)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, _loads(line, f"{path}:{number}")


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    rows = _loads(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), str(path))
    if not isinstance(rows, list):
        raise InputError(f"{path}: is not a list of rows; JSON Lines files end in .jsonl")
    yield from enumerate(rows, 1)


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    pa, pq = _pyarrow()
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    except pa.ArrowException as exc:
        raise InputError(f"{path}: not a Parquet file that can be read: {exc}") from exc


@contextmanager
def _parquet_writer(path: Path, like: Path | None) -> Iterator[Callable[[Any], None]]:
    pa, pq = _pyarrow()
    schema = None
    if like is not None and _ending(like) == ".parquet":
        schema = pq.read_schema(like)
    rows: list[Any] = []
    table_writer: Any = None
    with new_file(path) as file:

        def flush() -> None:
            nonlocal schema, table_writer
            try:
                table = pa.Table.from_pylist(rows, schema)
            except (pa.ArrowException, OverflowError) as exc:
                raise OutputError(f"{path}: the rows do not fit one Parquet table: {exc}") from exc
            schema = table.schema
            if table_writer is None:
                table_writer = pq.ParquetWriter(file, schema)
            table_writer.write_table(table)
            rows.clear()

        def put(value: Any) -> None:
            rows.append(value)
            if len(rows) == BATCH:
                flush()

        yield put
        if rows or table_writer is None:
            flush()
        table_writer.close()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise UsageError("Parquet needs pyarrow: pip install 'woolmill[parquet]'") from exc
    return pa, pq
