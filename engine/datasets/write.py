"""Rows out, in the form that they came in, or the one that the name of the file asks for.

A line of JSON Lines that goes to JSON Lines is the same bytes: numbers, escapes and doubled keys
stay as somebody wrote them.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from engine.datasets.forms import Form, Kind, Row
from engine.datasets.read import Dataset
from engine.datasets.tables import write_table
from engine.errors import OutputError, UsageError
from engine.files import new_output

__all__ = ["NOT_WRITTEN", "inert", "writer"]

ENDINGS: dict[str, Kind] = {
    ".jsonl": "lines", ".ndjson": "lines", ".json": "document", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
NOT_WRITTEN = frozenset({".bz2", ".xz", ".zst", ".zip", ".xls", ".xlsx", ".ods", ".db", ".sqlite"})
"""Endings that promise what nothing here writes; of others, the form is that of the rows."""
PACKED_LEVEL = 6
"""gzip's own default; at 9 it takes far longer for little."""

Write = Callable[[Row], None]


@contextmanager
def writer(path: Path, dataset: Dataset | None = None) -> Iterator[Write]:
    """Gives a function that writes one row; the file appears when the context ends well.

    Args:
        dataset: whose rows they are, read so far that its form is known. What has its form is
            written as it stands there, and where the two names end alike, so do their contents.
    """
    like = None if dataset is None else dataset.form
    form = _form(path, like, None if dataset is None else dataset.path)
    if form.packed and form.kind in ("parquet", "arrow"):
        raise UsageError(f"{path}: tables are not packed once more; leave the .gz out")
    with ExitStack() as stack:
        file: Any = stack.enter_context(new_output(path))
        if form.packed:
            file = stack.enter_context(
                gzip.GzipFile(
                    "", "wb", PACKED_LEVEL, file, mtime=0
                )  # the same rows, the same bytes
            )
        if form.kind == "parquet" or form.kind == "arrow":
            schema = None if dataset is None else dataset.schema_for(path)
            yield stack.enter_context(write_table(file, path, form.kind, schema))
            return
        write = {"lines": _lines, "document": _document, "csv": _csv}[form.kind]
        same = like is not None and like.kind == form.kind
        yield stack.enter_context(write(file, path, form, same))


def _form(path: Path, like: Form | None, source: Path | None) -> Form:
    name = path.name.lower()
    packed = name.endswith(".gz")
    ending = Path(name.removesuffix(".gz")).suffix
    kind = ENDINGS.get(ending)
    if ending in NOT_WRITTEN:
        raise UsageError(
            f"{path}: nothing is written as {ending}; end the name in {', '.join(ENDINGS)}, with "
            ".gz behind it or not"
        )
    if like is None:
        return Form(kind=kind or "lines", packed=packed)
    if kind is None:  # the name says nothing
        return replace(like, packed=packed or like.packed)
    if source is not None and Path(source.name.lower().removesuffix(".gz")).suffix == ending:
        kind = like.kind
    delimiter = like.delimiter if like.kind == "csv" else "\t" if ending == ".tsv" else ","
    return replace(like, kind=kind, packed=packed, delimiter=delimiter)


# -- JSON -----------------------------------------------------------------------------------------


@contextmanager
def _lines(file: BinaryIO, path: Path, form: Form, same: bool) -> Iterator[Write]:
    def put(row: Row) -> None:
        file.write((row.raw if row.raw is not None else _dumps(row, path)) + b"\n")

    yield put


@contextmanager
def _document(file: BinaryIO, path: Path, form: Form, same: bool) -> Iterator[Write]:
    """A list with a row on each line, within what stood around the rows before."""
    head, tail = b"", b""
    if form.around is not None:
        around, key = form.around
        head = json.dumps(around).removesuffix("}").encode()
        head += (b", " if around else b"") + json.dumps(key).encode() + b": "
        tail = b"}"
    separator = b"[\n"
    file.write(head)

    def put(row: Row) -> None:
        nonlocal separator
        file.write(separator + (row.raw if row.raw is not None else _dumps(row, path)))
        separator = b",\n"

    yield put
    file.write((b"[]" if separator == b"[\n" else b"\n]") + tail + b"\n")


def _dumps(row: Row, path: Path) -> bytes:
    try:
        text = orjson.dumps(row.values)
        if b"null" not in text:  # which is what orjson makes of NaN
            return text
    except TypeError:  # an integer beyond 64 bits, a lone surrogate, or a type JSON has not
        pass
    write = partial(json.dumps, row.values, default=_as_text, separators=(",", ":"))
    try:
        try:
            return write(ensure_ascii=False).encode()
        except UnicodeEncodeError:  # a lone surrogate
            return write().encode()
    except TypeError as exc:
        raise OutputError(
            f"{path}: row {row.line} of {row.path} is none that JSON can hold ({exc}); "
            "give -o a name that ends in .parquet"
        ) from exc


def _as_text(value: Any) -> Any:
    """Dates and times as orjson writes them."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"a value of type {type(value).__name__}")


# -- tables ---------------------------------------------------------------------------------------


@contextmanager
def _csv(file: BinaryIO, path: Path, form: Form, same: bool) -> Iterator[Write]:
    text = io.StringIO(newline="")
    table = csv.writer(text, delimiter=form.delimiter, lineterminator=form.line_end)
    columns = form.columns

    def flush() -> None:
        try:
            file.write(text.getvalue().encode())
        except UnicodeEncodeError as exc:
            raise OutputError(f"{path}: CSV cannot hold half a surrogate pair") from exc
        text.seek(0)
        text.truncate()

    if columns is not None:
        table.writerow(columns)

    def put(row: Row) -> None:
        nonlocal columns
        if columns is None:
            columns = list(row.values)
            table.writerow(columns)
        if row.values.keys() - set(columns):
            raise OutputError(
                f"{path}: row {row.line} of {row.path} has other fields than the first, and CSV "
                "needs the same for all; give -o a name that ends in .jsonl"
            )
        cells = [_cell(row, path, row.values.get(column)) for column in columns]
        table.writerow(cells if same else map(inert, cells))
        flush()

    yield put
    flush()


def _cell(row: Row, path: Path, value: Any) -> str:
    if isinstance(value, list | dict | bytes):
        raise OutputError(
            f"{path}: row {row.line} of {row.path} holds a value of type {type(value).__name__}, "
            "and CSV has only text; give -o a name that ends in .jsonl"
        )
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def inert(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula; see
    https://owasp.org/www-community/attacks/CSV_Injection.
    """
    cell = cell.replace("\0", "\ufffd")
    risky = cell.startswith(("\t", "\r", "\n")) or cell.lstrip().startswith(("=", "+", "-", "@"))
    return f"'{cell}" if risky else cell
