"""Files to rows: what a file is follows from its first bytes, not from its name.

    JSON list, JSON Lines, one JSON object that holds a list    UTF-8 or UTF-16
    CSV, TSV                                                    with a header
    Parquet, Arrow (also the folders of ``save_to_disk``)       with pyarrow
    a Woolmill run                                              its accepted records
    any of the first three in gzip, bzip2 or xz

Everything but a JSON list is read as a stream. A path may be a file, a folder, a pattern, or the id
of a dataset on the hub. Nothing that is read here can execute: no pickle, no loading script.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import hashlib
import io
import json
import lzma
import re
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from trainer.errors import ConfigError, DataError, UnavailableError
from trainer.formats import LISTS

__all__ = ["digest", "find_files", "rows_of"]

RUN_STORE = "run.sqlite"
"""The file by which a folder is known to be a Woolmill run."""
_SUFFIXES = frozenset(".json .jsonl .ndjson .csv .tsv .parquet .arrow".split())
"""Which files of a folder hold data. Only here do names count: a folder has other files too."""
_PACKED = {".gz", ".bz2", ".xz"}
"""Endings that may stand behind those."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""``owner/name``, as the Hugging Face Hub names datasets."""
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)([-_.]|$)", re.IGNORECASE)
"""A part of a dataset in a file's or folder's name: ``train-00000-of-00002``, ``test/``,
``dev.jsonl``. Not ``training``."""
_BATCH = 1000
"""Rows of a column store that are held at once."""

_OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
"""First bytes of a packed file, and what unpacks it as a stream."""
_STRANGE = {
    b"version https://git-lfs": "is a pointer of Git LFS and not the file; run git lfs pull",
    b"<": "is a web page or XML; download the file itself",
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "is packed with zstd; unpack it first, with unzstd",
    b"\x80\x02": "is a pickle, which can run code and is never opened",
    b"\x80\x03": "is a pickle, which can run code and is never opened",
    b"\x80\x04": "is a pickle, which can run code and is never opened",
    b"\x80\x05": "is a pickle, which can run code and is never opened",
}
"""First bytes of what people often have in the place of data, and the remedy."""

Row = tuple[str, Any]
"""A row's name and value; a DataError as value is a line that could not be read."""


# -- which files -----------------------------------------------------------------------------------


def find_files(source: str | Path, notes: list[str]) -> list[Path]:
    """The files (and run folders) that ``source`` stands for, in a fixed order.

    ``notes`` gets a line for what lies there and is not read.

    Raises:
        ConfigError: there is nothing, or a folder that holds no dataset.
        UnavailableError: a dataset of the hub, which cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path, notes)
    if path.exists():
        return [path.parent] if path.name == RUN_STORE else [path]
    if glob.has_magic(str(path)):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        if not found:
            raise ConfigError(f"{path}: no file has such a name; check --data_path")
        return [file for match in found for file in find_files(match, notes)]
    if _HUB_ID.fullmatch(str(source)) and not _is_data(path):
        return _in_folder(_from_hub(str(source)), notes)
    raise ConfigError(f"{path}: there is no such file; check --data_path")


def _in_folder(folder: Path, notes: list[str]) -> list[Path]:
    if (folder / RUN_STORE).is_file():
        return [folder]
    if (folder / "dataset_dict.json").is_file():
        splits = [str(split) for split in _json_file(folder / "dataset_dict.json", "splits")]
        if any(split != Path(split).name or split == ".." for split in splits):
            raise DataError(f"{folder}/dataset_dict.json: names a split outside of the folder")
        kept = _training(splits, folder, notes)
        return [file for split in kept for file in _saved(folder / split)]
    if (folder / "state.json").is_file():
        return _saved(folder)
    files = sorted(
        path
        for path in folder.rglob("*")
        if _is_data(path)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.name not in ("dataset_info.json", "dataset_infos.json", "state.json")
    )
    if not files:
        raise ConfigError(
            f"{folder}: is a folder without {RUN_STORE} and without data files"
            f" ({', '.join(sorted(_SUFFIXES))}, also packed with gzip); name a dataset or a run"
        )
    kept_names = set(_training([str(f.relative_to(folder)) for f in files], folder, notes))
    return [file for file in files if str(file.relative_to(folder)) in kept_names]


def _training(names: list[str], folder: Path, notes: list[str]) -> list[str]:
    """Of the parts of a dataset those to train on: where some are called ``train``, only they."""

    def split(name: str) -> str:
        matches = [_SPLIT.match(part) for part in Path(name).parts]
        return next((m[1].lower() for m in reversed(matches) if m), "")

    kept = [name for name in names if split(name) == "train"]
    if not kept:
        return names
    if left := [name for name in names if name not in kept]:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        notes.append(
            f"{folder}: trains on its train split; not read are {', '.join(left[:3])}{more}"
        )
    return kept


def _is_data(path: Path) -> bool:
    packed = path.suffix.lower() in _PACKED
    return Path(path.stem if packed else path.name).suffix.lower() in _SUFFIXES


def _saved(folder: Path) -> list[Path]:
    """The files of one dataset that ``save_to_disk`` has written."""
    if _json_file(folder / "state.json", "_indices_data_files", default=()):
        raise ConfigError(f"{folder}: keeps its rows apart from their order; save it again")
    entries = _json_file(folder / "state.json", "_data_files")
    try:
        # The names come from a file that a stranger may have written.
        return [folder / Path(str(entry["filename"])).name for entry in entries]
    except (TypeError, KeyError) as exc:
        raise DataError(f"{folder}/state.json: is damaged: it names no data files") from exc


def _json_file(path: Path, key: str, default: Any = None) -> Any:
    """The list under ``key`` in a small file of JSON."""
    try:
        value = json.loads(path.read_bytes()).get(key) or default
    except (ValueError, AttributeError) as exc:
        raise DataError(f"{path}: is damaged: {exc}") from exc
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror}") from exc
    if not isinstance(value, list | tuple):
        raise DataError(f"{path}: is damaged: it has no list of {key}")
    return value


def _from_hub(name: str) -> Path:
    import huggingface_hub
    import huggingface_hub.errors as hub

    patterns = [f"*{suffix}{packed}" for suffix in _SUFFIXES for packed in ("", *_PACKED)]
    try:
        return Path(
            huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=patterns)
        )
    except hub.RepositoryNotFoundError as exc:
        raise ConfigError(f"{name}: is neither a file nor a dataset on the hub") from exc
    except (hub.LocalEntryNotFoundError, hub.HfHubHTTPError, OSError) as exc:
        raise UnavailableError(
            f"{name}: is no file, and the dataset hub cannot be reached"
        ) from exc


# -- rows of a file --------------------------------------------------------------------------------


def rows_of(path: Path) -> Iterator[Row]:
    """(name, row) of every row; rows are counted from 0, lines from 1.

    Raises:
        ConfigError: a kind of file that is not read, or Parquet without pyarrow.
        DataError: the file is damaged. Names the file and, where there is one, the line.
    """
    if path.is_dir():
        yield from _run_rows(path)
        return
    try:
        with _opened(path) as stream:
            yield from _rows_of_stream(path, stream)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as exc:
        raise DataError(f"{path}: is not a whole packed file: {exc}") from exc
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror or exc}") from exc


def digest(path: Path) -> bytes:
    """SHA-256 of everything that the rows of ``path`` follow from."""
    if path.is_dir():
        sha = hashlib.sha256()
        for name, row in _run_rows(path):
            sha.update(json.dumps([name, row], sort_keys=True).encode())
        return sha.digest()
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror}") from exc


def _opened(path: Path) -> IO[bytes]:
    stream = path.open("rb")
    head = stream.read(8)
    stream.seek(0)
    for magic, opener in _OPENERS.items():
        if head.startswith(magic):
            stream.close()
            unpacked: IO[bytes] = opener(path, "rb")
            return unpacked
    return stream


def _rows_of_stream(path: Path, stream: IO[bytes]) -> Iterator[Row]:
    head = stream.read(4096)
    stream.seek(0)
    for magic, why in _STRANGE.items():
        if head.startswith(magic):
            raise ConfigError(f"{path}: {why}")
    if head.startswith(b"PAR1") or path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        yield from _arrow_rows(path, head.startswith(b"ARROW1"))
    elif head.startswith(b"SQLite format 3"):
        raise ConfigError(f"{path}: is a database; of a run, name the folder that holds it")
    else:
        yield from _text_rows(path, stream, head)


def _text_rows(path: Path, stream: IO[bytes], head: bytes) -> Iterator[Row]:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        stream = io.BytesIO(_decoded(path, stream.read(), "utf-16").encode())
        head = stream.getvalue()[:4096]
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        yield from _list_rows(path, stream)
    elif start.startswith(b"{"):
        yield from _line_rows(path, stream)
    elif start:
        _decoded(path, head[: head.rfind(b"\n") + 1] or head[:-4] or head)
        yield from _table_rows(path, stream, start)


def _decoded(path: Path, body: bytes, encoding: str = "utf-8-sig", offset: int = 0) -> str:
    try:
        return body.decode(encoding)
    except UnicodeDecodeError as exc:
        raise DataError(
            f"{path}: is not {'UTF-16' if encoding == 'utf-16' else 'UTF-8'} at byte"
            f" {offset + exc.start}"
        ) from exc


def _list_rows(path: Path, stream: IO[bytes]) -> Iterator[Row]:
    text = _decoded(path, stream.read())
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as exc:
        if exc.msg != "Extra data":
            raise DataError(f"{path}:{exc.lineno}:{exc.colno}: {exc.msg}") from exc
        # A list on each line: JSON Lines, each a chat.
        yield from _line_rows(path, io.BytesIO(text.encode()))
        return
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{path}: {_no_json(exc)}") from exc
    yield from ((f"{path.name}#{index}", row) for index, row in enumerate(rows))


def _line_rows(path: Path, stream: IO[bytes]) -> Iterator[Row]:
    """JSON Lines, or one or more objects over several lines each."""
    filled = (line for line in stream if line.strip())
    first, second = next(filled, b""), next(filled, b"")
    stream.seek(0)
    row = _value(path, 1, first)
    if isinstance(row, DataError) or (not second and isinstance(row, dict) and _wrapped(row)):
        if whole := _whole(path, stream.read()):
            yield from whole
            return
        stream.seek(0)
    offset = 0
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield f"{path.name}:{number}", _value(path, number, line, offset)
        offset += len(line)


def _value(path: Path, number: int, line: bytes, offset: int = 0) -> Any:
    """The JSON value of one line, or the DataError that says why there is none."""
    try:
        return json.loads(_decoded(path, line, offset=offset))
    except json.JSONDecodeError as exc:
        return DataError(f"{path}:{number}:{exc.colno}: {exc.msg}")
    except (ValueError, RecursionError) as exc:
        return DataError(f"{path}:{number}: {_no_json(exc)}")
    except DataError as exc:
        return exc


def _no_json(exc: Exception) -> str:
    """Why a text that is JSON cannot be read; in Python's words where it has some."""
    return "is nested too deeply" if isinstance(exc, RecursionError) else _first_line(exc)


def _whole(path: Path, body: bytes) -> list[Row]:
    """The objects of a file that lays each over several lines; empty if it is no such file."""
    text, at = _decoded(path, body), 0
    decoder, rows = json.JSONDecoder(), []
    try:
        while at < len(text):
            row, end = decoder.raw_decode(text, at)
            rows.append(row)
            at = end + len(text[end:]) - len(text[end:].lstrip())
    except (ValueError, RecursionError):
        return []
    if len(rows) == 1 and isinstance(rows[0], dict):
        rows = rows if (inner := _wrapped(rows[0])) is None else inner
    return [(f"{path.name}#{index}", row) for index, row in enumerate(rows)]


def _wrapped(row: dict[str, Any]) -> list[Any] | None:
    """The rows of a dataset that is one object, ``{"data": [{...}, ...]}``."""
    lists = [
        value
        for key, value in row.items()
        if key not in LISTS and isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    return lists[0] if len(lists) == 1 and not set(LISTS) & set(row) else None


def _table_rows(path: Path, stream: IO[bytes], start: bytes) -> Iterator[Row]:
    header = start.split(b"\n", 1)[0].decode(errors="replace")
    delimiter = max("\t,;", key=header.count)
    if not header.count(delimiter) and path.suffix.lower() not in (".csv", ".tsv"):
        raise ConfigError(f"{path}: is none of JSON, JSON Lines, CSV with a header, Parquet, Arrow")
    csv.field_size_limit(2**31 - 1)
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise DataError(f"{path}:1: two columns have one name; rename one of them")
            for row in reader:
                value: Any = row
                if None in row or None in row.values():
                    told = "has not as many cells as line 1"
                    value = DataError(f"{path}:{reader.line_num}: {told}")
                yield f"{path.name}:{reader.line_num}", value
        except csv.Error as exc:
            raise DataError(f"{path}: after line {reader.line_num}: {exc}") from exc
        except UnicodeDecodeError as exc:
            raise DataError(f"{path}: is not UTF-8 near line {reader.line_num + 1}") from exc


def _parquet_rows(path: Path) -> Iterator[Row]:
    pyarrow = _pyarrow(path, "Parquet")
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(_BATCH))
            for index, row in enumerate(row for batch in batches for row in batch):
                yield f"{path.name}#{index}", _without_nulls(row)
    except (pyarrow.ArrowException, OSError, ValueError) as exc:
        raise DataError(f"{path}: is not a whole Parquet file: {_first_line(exc)}") from exc


def _arrow_rows(path: Path, is_file: bool) -> Iterator[Row]:
    pyarrow = _pyarrow(path, "Arrow")
    import pyarrow.ipc as ipc

    try:
        with pyarrow.memory_map(str(path)) as source:
            if is_file:
                file = ipc.open_file(source)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            else:
                batches = iter(ipc.open_stream(source))
            rows = (row for batch in batches for row in batch.to_pylist())
            for index, row in enumerate(rows):
                yield f"{path.name}#{index}", _without_nulls(row)
    except (pyarrow.ArrowException, OSError, ValueError) as exc:
        raise DataError(f"{path}: is not a whole Arrow file: {_first_line(exc)}") from exc


def _without_nulls(value: Any) -> Any:
    """Without the keys that a column store adds to nested objects to make all rows alike."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(v) for v in value]
    return value


def _pyarrow(path: Path, what: str) -> Any:
    try:
        import pyarrow
    except ImportError as exc:
        raise ConfigError(f"{path}: {what} needs pyarrow; pip install pyarrow") from exc
    return pyarrow


def _run_rows(folder: Path) -> Iterator[Row]:
    store = folder / RUN_STORE
    query = "SELECT request, position, body FROM decision WHERE reason IS NULL ORDER BY 1, 2"
    try:
        with closing(sqlite3.connect(f"{store.resolve().as_uri()}?mode=ro", uri=True)) as database:
            for request, position, body in database.execute(query):
                yield f"{folder.name}#{request}.{position}", json.loads(body)["record"]
    except (sqlite3.Error, json.JSONDecodeError, KeyError) as exc:
        raise DataError(f"{store}: is not a whole run store: {_first_line(exc)}") from exc


def _first_line(exc: Exception) -> str:
    return str(exc).partition("\n")[0]
