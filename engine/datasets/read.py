"""Rows in: JSON Lines, CSV, Parquet and Arrow as a stream, a JSON document as a whole.

A row is what the file holds, with whatever fields it has. A folder is a run of ours, of which the
accepted records are read, what ``datasets.save_to_disk`` wrote, or one of data files of one form.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from engine.datasets.bad_rows import BadRowError, Skip
from engine.datasets.compared import USUAL
from engine.datasets.forms import (
    MAX_LINE_BYTES,
    MAX_WHOLE_BYTES,
    Form,
    Row,
    Source,
    lines_of,
    opened,
    whole,
)
from engine.datasets.tables import Schema, common_schema, read_table
from engine.errors import InputError
from engine.json_values import has_large_float

__all__ = ["Dataset", "read_rows"]

RUN_STORE = "run.sqlite"
"""The file by which a folder is known to be a run of ours."""
FIELDS_OF_ROWS = {*USUAL, "output", "response", "completion", "answer", "chosen"}
"""An object with one of these is a row, though it may hold a list of objects too."""
ROWS_OF_FOLDERS = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
"""Endings of data files, with or without ``.gz``; whatever else lies in a folder is passed over."""


FORMS = {
    "lines": "JSON", "document": "JSON", "csv": "CSV", "parquet": "a table", "arrow": "a table",
}  # fmt: skip
"""What a person calls the kinds of forms. Rows of one can be written as rows of another one of the
same name, with nothing changed."""
CONVERT = "convert it to UTF-8 from what it is: iconv -f LATIN1 -t UTF-8, or -f GB18030 for Chinese"
"""What to do with a text of another encoding."""


class Dataset:
    """The rows of a file or folder, or of several one after another; iterating reads them.

    ``form`` is how the first file holds them, and None until its first row, or the end, has been
    read. A JSON document of more than ``max_whole_bytes`` is refused. ``skip`` is told of each line
    of JSON Lines or CSV, and each item of a JSON list, that is no row, and the next is read;
    without it the first of them is an error.

    Raises InputError while rows are read, naming path and line. UsageError where a package is
    missing.
    """

    def __init__(
        self,
        path: Path,
        *more: Path,
        max_whole_bytes: int = MAX_WHOLE_BYTES,
        skip: Skip | None = None,
    ) -> None:
        self.path = path
        self._paths = (path, *more)
        self._max_whole_bytes = max_whole_bytes
        self._skip = skip
        self.form: Form | None = None
        self.schemas: dict[Path, Any] = {}
        """Of the files that are tables, as far as rows were read."""

    def __str__(self) -> str:
        return ", ".join(map(str, self._paths))

    @property
    def has_several_files(self) -> bool:
        """Whether lines may be those of different files."""
        return len(self._paths) > 1 or self.path.is_dir()

    def __iter__(self) -> Iterator[Row]:
        for given in self._paths:
            if not given.is_dir():
                yield from self._file(given)
            elif (given / RUN_STORE).exists():
                self._take(Form(kind="lines"), given)
                yield from _run(given)
            else:
                for path in _data_files(given):
                    yield from self._file(path)

    def schema_for(self, path: Path) -> Schema:
        """What a table at ``path`` needs to hold all rows; it takes a pass over them."""
        rows = Dataset(*self._paths, max_whole_bytes=self._max_whole_bytes, skip=lambda wrong: None)
        return common_schema(rows, rows.schemas, path)

    def _take(self, form: Form, path: Path) -> None:
        """Note how the first file holds its rows; the others do likewise."""
        self.form = self.form or form
        one, other = FORMS[self.form.kind], FORMS[form.kind]
        if one != other:
            raise InputError(
                f"{path}: is {other}, and what comes before it {one}; give files of one form "
                "together, or one after another, the second with --against the first"
            )

    def _file(self, path: Path) -> Iterator[Row]:
        with opened(path) as source:
            if source is None:
                raise InputError(f"{path}: is empty; there are no rows to read")
            form = source.form
            self._take(form, path)
            if form.kind == "lines":
                yield from _lines(source, self._max_whole_bytes, self._skip)
            elif form.kind == "document":
                yield from _document(source, whole(source, self._max_whole_bytes), self._skip)
            elif form.kind == "csv":
                yield from _csv(source, self._skip)
            else:
                yield from read_table(path, form.kind, self.schemas)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows in the file's order. Raises as ``Dataset`` does."""
    return iter(Dataset(path))


# -- JSON -----------------------------------------------------------------------------------------


def _lines(source: Source, max_whole_bytes: int, skip: Skip | None) -> Iterator[Row]:
    """JSON Lines; or a document, where the first line is no whole object or the only one of a file
    whose name does not say that it is a row.
    """
    named = _named_lines(source.path)
    start, first = 1, source.stream.readline(MAX_LINE_BYTES + 1)
    while first.isspace():
        start, first = start + 1, source.stream.readline(MAX_LINE_BYTES + 1)
    complete = len(first) <= MAX_LINE_BYTES and (_is_row(first) or (named and skip is not None))
    lines = lines_of(source, start)
    second = next(lines, None) if complete else None
    if second is None and not (complete and named):
        source.form.kind = "document"
        # The lines before count: a fault is named by its own.
        data = b"\n" * (start - 1) + first + whole(source, max_whole_bytes)
        yield from _document(source, data, skip)
        return
    numbered = chain([(start, first)], [] if second is None else [second], lines)
    for number, line in numbered:
        try:
            row = _row(source.path, number, line)
        except InputError as exc:
            _leave_out(BadRowError(str(exc), source.path, number, raw=line), skip)
        else:
            yield row


def _leave_out(wrong: BadRowError, skip: Skip | None) -> None:
    if skip is None:
        raise wrong
    skip(wrong)


def _named_lines(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson"))


def _is_row(line: bytes) -> bool:
    """Whether a line is a whole object."""
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        pass
    try:
        return isinstance(json.loads(line), dict)
    except UnicodeDecodeError:
        return True  # which is said of the line, and not of the document
    except (ValueError, RecursionError):
        return False


def _row(path: Path, number: int, line: bytes) -> Row:
    values = loads(line, path, number)
    if not isinstance(values, dict):
        raise InputError(f"{path}:{number}: the row is not an object with fields")
    return Row(path, number, values, line.strip())


def _document(source: Source, data: bytes, skip: Skip | None) -> Iterator[Row]:
    """A list of rows, an object around one, or objects one after the other on lines as they come.

    The rows of a list are counted; those of objects are named by the line on which they begin.
    """
    path, form = source.path, source.form
    try:
        value = loads(data, path)
    except InputError:
        first = _one_after_the_other(data, path, skip)
        if (row := next(first, None)) is None:
            raise
        form.kind = "lines"
        yield row
        yield from first
        return
    if isinstance(value, dict):
        if (key := _rows_key(value)) is not None:
            form.around = ({k: v for k, v in value.items() if k != key}, key)
            value = value[key]
        elif _is_table(value):
            raise InputError(
                f"{path}: is an object of columns or of several lists ({_some(value)}) instead of "
                "rows; write it as a list of objects (pandas: orient='records')"
            )
        else:  # JSON Lines of one line
            form.kind = "lines"
            raw = data.strip()
            number = data.count(b"\n", 0, data.find(b"{")) + 1
            yield Row(path, number, value, None if b"\n" in raw else raw)
            return
    for number, row in enumerate(value, 1):
        if isinstance(row, dict):
            yield Row(path, number, row)
        else:
            _leave_out(_no_row(path, number, row), skip)


def _rows_key(value: dict[str, Any]) -> str | None:
    """The key of an object under which its rows stand; None where it is a row itself."""
    if value.keys() & FIELDS_OF_ROWS:
        return None
    lists = [key for key, held in value.items() if _is_rows(held)]
    return lists[0] if len(lists) == 1 else None


def _is_table(value: dict[str, Any]) -> bool:
    """Whether an object is columns (as pandas writes them), or several lists of rows."""
    held = list(value.values())
    if any(isinstance(turns, list) and any(map(_is_turn, turns)) for turns in held):
        return False
    return (
        sum(map(_is_rows, held)) > 1
        or (len(held) > 0 and all(isinstance(column, dict) for column in held))
        or (len(held) > 1 and all(isinstance(column, list) for column in held))
    )


def _is_rows(held: Any) -> bool:
    """Whether a value is a list of objects that are not the turns of a chat."""
    return isinstance(held, list) and all(
        isinstance(row, dict) and not _is_turn(row) for row in held
    )


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and not value.keys().isdisjoint(("role", "from"))


def loads(data: bytes, path: Path, line: int | None = None) -> Any:
    """One JSON value. NaN and Infinity, integers of any size and half surrogate pairs are read as
    Python's own json writes and reads them. Raises InputError, naming path and line.
    """
    try:
        value = orjson.loads(data)
        if not has_large_float(value):
            return value
    except orjson.JSONDecodeError:
        pass
    where = f"{path}:{line}" if line is not None else str(path)
    try:
        text = (data if line is None else data.rstrip(b"\r\n")).decode()
    except UnicodeDecodeError as exc:
        number = (line or 1) + data.count(b"\n", 0, exc.start)
        raise InputError(
            f"{path}:{number}: is not UTF-8 (byte {data[exc.start]:#04x}); {CONVERT}"
        ) from exc
    try:
        return json.loads(text)
    except json.JSONDecodeError as exc:
        number = (line or 1) + exc.lineno - 1
        raise InputError(f"{path}:{number}: not JSON: {exc.msg} (column {exc.colno})") from exc
    except RecursionError as exc:
        raise InputError(f"{where}: not JSON that can be read: nested too deeply") from exc
    except ValueError as exc:  # an integer of thousands of digits
        raise InputError(f"{where}: not JSON that can be read: {exc}") from exc


def _no_row(path: Path, number: int, value: Any) -> BadRowError:
    raw = json.dumps(value, ensure_ascii=False).encode(errors="replace")
    message = f"{path}:{number}: the row is not an object with fields"
    return BadRowError(message, path, number, raw=raw)


def _one_after_the_other(data: bytes, path: Path, skip: Skip | None) -> Iterator[Row]:
    """Objects with nothing but blanks between, as a stream of indented ones; none where not even
    the first is whole. Raises InputError for one that is not.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*+")
    line, place = 1, 0
    while (start := _end(blank, text, place)) < len(text):
        line += text.count("\n", place, start)
        try:
            values, place = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as exc:
            if place == 0:
                return
            reason = exc.msg if isinstance(exc, json.JSONDecodeError) else "it cannot be read"
            raise InputError(f"{path}:{line}: not JSON: {reason}") from exc
        if isinstance(values, dict):
            yield Row(path, line, values)
        else:
            _leave_out(_no_row(path, line, values), skip)
        line += text.count("\n", start, place)


def _end(pattern: re.Pattern[str], text: str, place: int) -> int:
    found = pattern.match(text, place)
    assert found is not None
    return found.end()


# -- tables ---------------------------------------------------------------------------------------


def _csv(source: Source, skip: Skip | None) -> Iterator[Row]:
    path = source.path
    csv.field_size_limit(MAX_LINE_BYTES)
    with io.TextIOWrapper(source.stream, "utf-8", newline="") as text:
        table = csv.reader(text, delimiter=source.form.delimiter, strict=True)
        try:
            yield from _csv_rows(table, path, source.form, skip)
        except csv.Error as exc:
            raise InputError(f"{path}:{table.line_num}: not CSV that can be read: {exc}") from exc
        except UnicodeDecodeError as exc:
            raise InputError(
                f"{path}:{table.line_num + 1}: is not UTF-8 from about here on; {CONVERT}"
            ) from exc


def _csv_rows(table: Any, path: Path, form: Form, skip: Skip | None) -> Iterator[Row]:
    header = next(table)
    while not header:
        header = next(table)
    if len(set(header)) < len(header) or not all(name.strip() for name in header):
        raise InputError(
            f"{path}:{table.line_num}: the header names a column twice or not at all; the first "
            "line of CSV must name the columns"
        )
    form.columns = header
    line = table.line_num
    for cells in table:
        first, line = line + 1, table.line_num
        if not cells:
            continue
        if len(cells) != len(header):
            wrong = (
                f"{path}:{first}: has {len(cells)} cells, the header has {len(header)}; "
                "quote cells that hold a delimiter or a line break"
            )
            raw = form.delimiter.join(cells).encode(errors="replace")
            _leave_out(BadRowError(wrong, path, first, raw=raw), skip)
            continue
        yield Row(path, first, dict(zip(header, cells, strict=True)))


# -- folders --------------------------------------------------------------------------------------


def _run(folder: Path) -> Iterator[Row]:
    from engine.store import RunStore

    with RunStore.read(folder) as run:
        for number, decision in enumerate(run.decisions(accepted=True), 1):
            if decision.record is not None:
                yield Row(folder, number, decision.record)


def _data_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its rows, in the order of their names."""
    try:
        if (folder / "dataset_dict.json").exists():
            parts = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
            raise InputError(f"{folder}: holds several parts ({parts}); name one of these folders")
        place = folder / "data" if (folder / "data").is_dir() else folder
        paths = _saved(folder) or sorted(
            path for path in place.iterdir() if path.is_file() and not path.name.startswith(".")
        )
    except OSError as exc:
        raise InputError(f"{folder}: cannot be read: {exc.strerror or exc}") from exc
    found: dict[str, list[Path]] = {}
    for path in paths:
        suffix = Path(path.name.lower().removesuffix(".gz")).suffix
        if suffix in ROWS_OF_FOLDERS:
            found.setdefault(suffix, []).append(path)
    if not found:
        raise InputError(
            f"{folder}: is neither a run nor a folder of data files ({', '.join(ROWS_OF_FOLDERS)})"
        )
    if len(found) > 1:
        raise InputError(
            f"{folder}: holds files of several forms ({', '.join(sorted(found))}); name one file"
        )
    (paths,) = found.values()
    # What writes many files may leave some without a row; where all are so, reading says it.
    return [path for path in paths if not path.is_file() or path.stat().st_size] or paths


def _saved(folder: Path) -> list[Path]:
    """The files that ``datasets.save_to_disk`` names; others beside them are its caches."""
    try:
        state = orjson.loads((folder / "state.json").read_bytes())
        return [folder / Path(each["filename"]).name for each in state["_data_files"]]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return []


def _some(names: Any) -> str:
    shown = list(names)[:4]
    return ", ".join(shown) + (", …" if len(names) > len(shown) else "")
