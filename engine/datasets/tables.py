"""Parquet and Arrow: rows of tables in, and rows of any form out as one table.

A table has one type for each of its columns, which other rows may not fit. So the schema is known
before the first row is written, the widest of those of all files and rows, and each row that did
not come with it is looked at once more: Arrow cuts 4.75 down to an integer, and leaves out a field
that it has no column for, without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from engine.datasets.forms import Row
from engine.errors import InputError, OutputError, UsageError

__all__ = ["Schema", "common_schema", "read_table", "write_table"]

BATCH = 1_000
"""Rows of a table that are held at once."""
JSON_LINES = "give -o a name that ends in .jsonl"
"""The way on where rows fit no table."""


def read_table(
    path: Path, kind: Literal["parquet", "arrow"], schemas: dict[Path, Any]
) -> Iterator[Row]:
    """The rows of a file, whose schema is noted in ``schemas``. Raises InputError."""
    yield from _parquet(path, schemas) if kind == "parquet" else _arrow(path, schemas)


def _parquet(path: Path, schemas: dict[Path, Any]) -> Iterator[Row]:
    pa, pq = _pyarrow(path)
    try:
        with pq.ParquetFile(path) as file:
            schemas[path] = file.schema_arrow
            yield from _batches(path, file.iter_batches(BATCH))
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise InputError(f"{path}: not a Parquet file that can be read: {_line(exc)}") from exc


def _arrow(path: Path, schemas: dict[Path, Any]) -> Iterator[Row]:
    """A stream, as ``datasets`` writes it, or a file of Arrow's own."""
    pa, _ = _pyarrow(path)
    try:
        with pa.OSFile(str(path)) as file:
            if file.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                file.seek(0)
                batches = reader = pa.ipc.open_stream(file)
            schemas[path] = reader.schema
            yield from _batches(path, batches)
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise InputError(f"{path}: not an Arrow file that can be read: {_line(exc)}") from exc


def _batches(path: Path, batches: Any) -> Iterator[Row]:
    number = 0
    for batch in batches:
        batch.validate(full=True)
        names = batch.schema.names
        if len(set(names)) < len(names):
            twice = ", ".join(sorted({name for name in names if names.count(name) > 1}))
            raise InputError(f"{path}: its columns name a column twice: {twice}; rename one")
        for start in range(0, batch.num_rows, BATCH):
            for values in batch.slice(start, BATCH).to_pylist():
                number += 1
                yield Row(path, number, values)


# -- out ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Schema:
    """The columns of a table with their types, which all rows are to fit."""

    arrow: Any
    origins: frozenset[Path] = frozenset()
    """Files that have the same themselves, so that their rows fit for sure."""


def common_schema(rows: Iterable[Row], schemas: dict[Path, Any], path: Path) -> Schema:
    """The schema of all rows, in which each column has the widest of its types.

    Args:
        schemas: those of the files among them that are tables, as far as ``rows`` has come.
        path: where the table is to be, for errors.

    Raises OutputError where a column has types that no other holds both of.
    """
    pa, _ = _pyarrow(path)
    common: Any = None
    joined: set[Path] = set()

    def join(schema: Any) -> None:
        nonlocal common
        if common is None:
            common = schema
        elif not common.equals(schema):
            with _fitting(path):
                common = pa.unify_schemas([common, schema], promote_options="permissive")

    rows = iter(rows)
    while batch := list(islice(rows, BATCH)):
        for file in [file for file in schemas if file not in joined]:
            joined.add(file)
            join(schemas[file])
        if plain := [row for row in batch if row.path not in joined]:
            join(_table_of(plain, None, path).schema)
    for file, own in schemas.items():
        if file not in joined:  # it has no row
            join(own)
    origins = frozenset(file for file, own in schemas.items() if own.equals(common))
    if common is not None and len(origins) < len(schemas):
        common = common.remove_metadata()  # which may name narrower types, as datasets' does
    return Schema(common, origins)


@contextmanager
def write_table(
    file: BinaryIO, path: Path, kind: Literal["parquet", "arrow"], schema: Schema | None
) -> Iterator[Callable[[Row], None]]:
    """Gives a function that writes one row. Without a schema it is that of the first rows.

    Raises OutputError for a row that the table would not hold as it is.
    """
    pa, pq = _pyarrow(path)
    known, origins = (None, frozenset()) if schema is None else (schema.arrow, schema.origins)
    rows: list[Row] = []
    table_writer: Any = None

    def flush() -> None:
        nonlocal known, table_writer
        table = _table_of(rows, known, path)
        doubtful = [i for i, row in enumerate(rows) if row.path not in origins]
        held = table.to_pylist() if doubtful else []
        for i in doubtful:
            if (field := _lost(held[i], rows[i].values)) is not None:
                raise OutputError(
                    f"{path}: row {rows[i].line} of {rows[i].path}: its {field} does not fit the "
                    f"column that other rows have; {JSON_LINES}"
                )
        if table_writer is None:
            known = table.schema
            make = pa.ipc.new_stream if kind == "arrow" else pq.ParquetWriter
            with _fitting(path):  # Parquet has no objects without fields
                table_writer = make(file, table.schema)
        table_writer.write_table(table)
        rows.clear()

    def put(row: Row) -> None:
        rows.append(row)
        if len(rows) == BATCH:
            flush()

    try:
        yield put
        if rows or table_writer is None:
            flush()
    finally:
        if table_writer is not None:
            table_writer.close()


def _table_of(rows: Sequence[Row], schema: Any, path: Path) -> Any:
    """Rows as a table, with the columns of ``schema`` where there is one."""
    pa, _ = _pyarrow(path)
    names = dict.fromkeys(name for row in rows for name in row.values)
    if schema is not None:
        names = dict.fromkeys(schema.names)
    with _fitting(path):
        columns = {name: [row.values.get(name) for row in rows] for name in names}
        return pa.Table.from_pydict(columns, schema)


def _lost(held: Any, values: Any, name: str = "") -> str | None:
    """The field of a row that a table does not hold as it is; None where it holds all of them."""
    if isinstance(values, dict) and isinstance(held, dict):
        for key, value in values.items():
            if value is not None and (lost := _lost(held.get(key), value, name or repr(key))):
                return lost
        return None
    if isinstance(values, list) and isinstance(held, list):
        if len(values) != len(held):
            return name
        items = (_lost(*pair, name) for pair in zip(held, values, strict=True))
        return next(filter(None, items), None)
    same = held == values or (held != held and values != values)  # NaN is not itself
    return None if same else name


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    pa, _ = _pyarrow(path)
    try:
        yield
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as exc:
        raise OutputError(
            f"{path}: the rows do not fit one table ({_line(exc)}); {JSON_LINES}"
        ) from exc


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.ipc
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise UsageError(
            f"{path}: Parquet and Arrow need pyarrow: pip install 'woolmill[parquet]'"
        ) from exc
    return pa, pq


def _line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:200]
