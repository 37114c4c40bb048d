"""Rows to bytes, one ``writer`` for each format, none of which holds more than a few rows.

``jsonl``     JSON Lines: the row's fields, with where it comes from and its neighbours
``parquet``   the same as typed columns (``engine.export.columns`` says which)
``datasets``  Parquet in the folder layout that Hugging Face ``datasets`` loads, with a card
``csv``       the row's fields for a spreadsheet; cells that one would run are quoted
``messages``  JSON Lines: ``{"messages": [user, assistant]}``, as chat templates and TRL take it
``sharegpt``  JSON list of ``{"id", "conversations": [human, gpt]}``, as FastChat takes it
``preference`` JSON Lines: ``{"prompt", "chosen", "rejected"}`` as lists of turns, as TRL takes it;
              pairs of rows, which ``engine.export.preference`` makes
``alpaca``    JSON list of ``{instruction, input, output}``, indented by 4, ASCII, as Alpaca's
              ``utils.jdump`` writes it; with similarity also what its ``regen.json`` has

The text is the model's, unchanged: special tokens such as ``<|im_end|>`` are for the tokenizer to
read as text (``split_special_tokens``; Woolmill's trainer does). Only CSV changes cells, because
there is no other way to keep a spreadsheet from running them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import orjson

from engine.datasets.write import NOT_WRITTEN, inert
from engine.errors import ConfigError, UsageError
from engine.export.chat import turns_of
from engine.export.columns import ListOf, StructOf, Type
from engine.export.layout import ALPACA_FIELDS, ANY_ALPACA, Layout
from engine.export.rows import Row

__all__ = [
    "CHATS",
    "FORMATS",
    "SUFFIX",
    "WITH_PROVENANCE",
    "WITH_REASONING",
    "Format",
    "dumps",
    "format_of",
    "writer",
]

Format = Literal[
    "alpaca", "jsonl", "messages", "sharegpt", "preference", "csv", "parquet", "datasets"
]
FORMATS: tuple[Format, ...] = get_args(Format)
"""What ``--format`` takes, from the type, so that the two cannot differ."""
SUFFIX: dict[Format, str] = {
    "alpaca": ".json",
    "jsonl": ".jsonl",
    "messages": ".jsonl",
    "sharegpt": ".json",
    "preference": ".jsonl",
    "csv": ".csv",
    "parquet": ".parquet",
    "datasets": ".parquet",
}
"""The ending of a file of each format: of the shards of a folder, and in advice to a person."""
ENDINGS: dict[str, tuple[Format, ...]] = {
    ".json": ("alpaca", "sharegpt"),
    ".jsonl": ("jsonl", "messages", "preference"),
    ".ndjson": ("jsonl", "messages", "preference"),
    ".csv": ("csv",),
    ".parquet": ("parquet",),
}
"""What a file of this ending may hold; the first is taken where no format is named."""
WITH_PROVENANCE: frozenset[Format] = frozenset({"jsonl", "parquet", "datasets"})
"""Formats with room beside a row's own fields for where it comes from."""
CHATS: frozenset[Format] = frozenset({"messages", "sharegpt", "preference"})
"""Formats that need to know which field asks and which answers."""
WITH_REASONING: frozenset[Format] = WITH_PROVENANCE | {"messages"}
"""Formats that have a place for thoughts."""

ROW_GROUP = 2000
"""Rows that a Parquet writer holds: some MiB."""
SPEAKERS = {"user": "human", "assistant": "gpt"}
"""ShareGPT's words for roles; others are as they are."""

Write = Callable[[Row], None]


def format_of(path: Path, asked: Format | None, default: Format) -> Format:
    """The format of a file: the one that is asked for, else by the ending of its name.

    Raises UsageError where the two contradict each other, or the ending is none of ours.
    """
    ending = path.suffix.lower()
    if ending in NOT_WRITTEN | {".gz", ".tsv", ".arrow"}:
        raise UsageError(
            f"{path}: no format is written as {ending}; end the name in {', '.join(ENDINGS)}"
        )
    if asked is None and ending and ending not in ENDINGS:
        raise UsageError(
            f"{path}: {ending} names no format; end the name in {', '.join(ENDINGS)}, or give "
            "--format"
        )
    if ending not in ENDINGS:
        return asked or default
    if asked is None:
        return default if default in ENDINGS[ending] else ENDINGS[ending][0]
    if asked not in ENDINGS[ending]:
        raise UsageError(
            f"{path}: --format {asked} is not what {ending} says; end the name in"
            f" {SUFFIX[asked]}, or choose --format {' or '.join(ENDINGS[ending])}"
        )
    return asked


@contextmanager
def writer(format: Format, file: BinaryIO, layout: Layout = ANY_ALPACA) -> Iterator[Write]:
    """Write rows to ``file`` one by one; the file is whole when the context ends without an error.

    Raises ConfigError where Parquet is asked for and pyarrow is not there, and from the function
    it gives: where a row cannot be had in the format.
    """
    if format in ("parquet", "datasets"):
        with _parquet(file, layout) as write:
            yield write
    elif format == "csv":
        yield _csv(file, layout)
    elif format in ("alpaca", "sharegpt"):
        with _list(file, partial(_sharegpt if format == "sharegpt" else _alpaca, layout)) as write:
            yield write
    elif layout.grouped:
        with _groups(file, layout) as write:
            yield write
    else:
        shape = layout.line if format == "jsonl" else partial(_messages, layout)
        yield lambda row: _discard(file.write(dumps(shape(row)) + b"\n"))


# -- JSON -----------------------------------------------------------------------------------------


@contextmanager
def _list(file: BinaryIO, shape: Callable[[Row], Any]) -> Iterator[Write]:
    """A JSON list as ``json.dumps(all_of_it, indent=4)`` would write it, without having all."""
    before = "[\n    "

    def write(row: Row) -> None:
        nonlocal before
        text = json.dumps(shape(row), indent=4).replace("\n", "\n    ")
        file.write((before + text).encode())
        before = ",\n    "

    yield write
    file.write(b"[]" if before.startswith("[") else b"\n]")


def _alpaca(layout: Layout, row: Row) -> dict[str, Any]:
    record = row.record
    shaped = {name: record.get(name, "") for name in ALPACA_FIELDS}
    if odd := next((name for name, text in shaped.items() if not isinstance(text, str)), None):
        raise ConfigError(
            f"row {row.id}: its {odd} is no text, which --format alpaca needs; choose "
            "--format jsonl"
        )
    if not layout.similarity:
        return shaped
    return shaped | {
        "most_similar_instructions": row.decision.most_similar,
        "avg_similarity_score": row.decision.mean_similarity,
    }


def _sharegpt(layout: Layout, row: Row) -> dict[str, Any]:
    turns = turns_of(layout.recipe, row, reasoning=False)
    if not all(isinstance(turn["content"], str) for turn in turns):
        raise ConfigError(
            f"row {row.id}: a turn of its chat is no text, as --format sharegpt needs it; choose "
            "--format messages"
        )
    return {
        "id": row.id,
        "conversations": [
            {"from": SPEAKERS.get(turn["role"], turn["role"]), "value": turn["content"]}
            for turn in turns
        ],
    }


def _messages(layout: Layout, row: Row) -> dict[str, Any]:
    return {"messages": turns_of(layout.recipe, row, reasoning=layout.reasoning)}


@contextmanager
def _groups(file: BinaryIO, layout: Layout) -> Iterator[Write]:
    """A line for each input row, with all rows that were made of it."""
    waiting: list[Row] = []

    def flush() -> None:
        for number, rows in groupby(waiting, lambda row: layout.place(row)[0]):
            samples = [layout.line(row) for row in rows]
            for sample in samples:
                del sample[layout.own("row")]
            file.write(dumps({"row": number, "samples": samples}) + b"\n")
        waiting.clear()

    def write(row: Row) -> None:
        if waiting and layout.place(waiting[0])[0] != layout.place(row)[0]:
            flush()
        waiting.append(row)

    yield write
    flush()


_ESCAPED = str.maketrans(
    {chr(code): f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0x2028, 0x2029)}
)
"""What is valid within a JSON string, and what some readers take for the end of a line or a
terminal for a command."""


def dumps(value: Any) -> bytes:
    """One line of JSON in UTF-8 without control characters."""
    try:
        text = orjson.dumps(value).decode()
    except TypeError:  # a lone surrogate, which only an escape can carry
        text = json.dumps(value, separators=(",", ":"))
    return text.translate(_ESCAPED).encode()


# -- tables ---------------------------------------------------------------------------------------


def _csv(file: BinaryIO, layout: Layout) -> Write:
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\r\n")

    def put(cells: list[str]) -> None:
        table.writerow(cells)
        file.write(text.getvalue().encode(errors="replace"))
        text.seek(0)
        text.truncate()

    put([inert(name) for name in layout.fields])
    return lambda row: put([_cell(value) for value in layout.record(row).values()])


def _cell(value: Any) -> str:
    """Text as it is, where no spreadsheet takes it for a formula; other values as JSON."""
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return dumps(value).decode()
    return inert(value if isinstance(value, str) else dumps(value).decode())


@contextmanager
def _parquet(file: BinaryIO, layout: Layout) -> Iterator[Write]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise ConfigError(
            "Parquet needs one package more: pip install 'woolmill[parquet]'"
        ) from exc

    own, columns = layout.own, layout.types or dict.fromkeys(layout.fields, "text")

    def arrow(type_: Type) -> Any:
        if isinstance(type_, ListOf):
            return pa.list_(arrow(type_.items))
        if isinstance(type_, StructOf):
            return pa.struct([(name, arrow(inner)) for name, inner in type_.fields.items()])
        plain = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64()}
        return plain.get(type_, pa.string())

    def field(name: str) -> Any:
        marked = {"woolmill": "json"} if columns[name] == "json" else None
        return pa.field(name, arrow(columns[name]), metadata=marked)

    numbered = layout.samples is not None
    after = [
        (own("model"), pa.string()),
        *((own(name), pa.list_(pa.string())) for name in ("models",) if layout.makers),
        (own("demonstrations"), pa.list_(pa.string())),
        *((own(name), pa.int64()) for name in ("row", "sample") if numbered),
        *((own(name), pa.list_(pa.string())) for name in ("parents",) if layout.lineage),
        *(
            (own(name), pa.float64())
            for name in ("max_similarity", "avg_similarity_score")
            if layout.compared
        ),
        *((own(name), pa.string()) for name in ("reasoning",) if layout.reasoning),
    ]
    schema = pa.schema([(own("id"), pa.string()), *map(field, layout.fields), *after])
    waiting: list[dict[str, Any]] = []

    def flush() -> None:
        if waiting:
            table.write_batch(pa.RecordBatch.from_pylist(waiting, schema=schema))
            waiting.clear()

    def write(row: Row) -> None:
        record = layout.record(row)
        line = {name: _held(value, columns[name]) for name, value in record.items()}
        line |= {own("id"): row.id, own("model"): row.model}
        if layout.makers:
            line[own("models")] = layout.makers.of(row)
        line[own("demonstrations")] = list(row.demonstrations)
        if numbered:
            line[own("row")], line[own("sample")] = layout.place(row)
        if layout.lineage:
            line[own("parents")] = layout.parents(row)
        if layout.compared:
            near = row.decision.most_similar.values()
            line[own("max_similarity")] = max(near, default=None)
            line[own("avg_similarity_score")] = row.decision.mean_similarity
        if layout.reasoning:
            line[own("reasoning")] = _encodable(row.reasoning) or None
        waiting.append(line)
        if len(waiting) == ROW_GROUP:
            flush()

    with pq.ParquetWriter(file, schema, compression="zstd") as table:
        yield write
        flush()


def _held(value: Any, type_: Type) -> Any:
    """A value as a column of this type holds it."""
    if value is None:
        return None
    if isinstance(type_, ListOf):
        return [_held(item, type_.items) for item in value]
    if isinstance(type_, StructOf):
        return {name: _held(value[name], inner) for name, inner in type_.fields.items()}
    if type_ == "json":
        return dumps(value).decode()
    return _encodable(value) if type_ == "text" else float(value) if type_ == "float" else value


def _encodable(text: str) -> str:
    """Lone surrogates, which Parquet's UTF-8 has no form for, become the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _discard(_: object) -> None:
    """For lambdas that only act."""
