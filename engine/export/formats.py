"""Rows to bytes, one ``writer`` for each format, none of which holds more than a few rows.

``alpaca``    JSON list of ``{instruction, input, output}``, indented by 4, ASCII, as Alpaca's
              ``utils.jdump`` writes it; with similarity also what its ``regen.json`` has
``jsonl``     JSON Lines: a record with where it comes from and its neighbours
``messages``  JSON Lines: ``{"messages": [user, assistant]}``, as chat templates and TRL take it
``sharegpt``  JSON list of ``{"id", "conversations": [human, gpt]}``, as FastChat takes it
``csv``       instruction, input, output for a spreadsheet; cells that one would run are quoted
``parquet``   typed columns
``datasets``  Parquet in the folder layout that Hugging Face ``datasets`` loads, with a card

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
from typing import Any, BinaryIO, Literal, get_args

import orjson

from engine.datasets.write import inert
from engine.errors import ConfigError
from engine.export.rows import Row
from engine.records import Record

__all__ = ["FORMATS", "SUFFIX", "WITH_PROVENANCE", "Format", "dumps", "question", "writer"]

Format = Literal["alpaca", "jsonl", "messages", "sharegpt", "csv", "parquet", "datasets"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIX: dict[Format, str] = {
    "alpaca": ".json",
    "jsonl": ".jsonl",
    "messages": ".jsonl",
    "sharegpt": ".json",
    "csv": ".csv",
    "parquet": ".parquet",
    "datasets": ".parquet",
}
WITH_PROVENANCE: frozenset[Format] = frozenset({"jsonl", "parquet", "datasets"})

ROW_GROUP = 2000
"""Rows that a Parquet writer holds: some MiB."""

Write = Callable[[Row], None]


@contextmanager
def writer(format: Format, file: BinaryIO, with_similarity: bool = False) -> Iterator[Write]:
    """Write rows to ``file`` one by one; the file is whole when the context ends without an error.

    Raises ConfigError where Parquet is asked for and pyarrow is not there.
    """
    if format in ("parquet", "datasets"):
        with _parquet(file) as write:
            yield write
    elif format == "csv":
        yield _csv(file)
    elif format in ("alpaca", "sharegpt"):
        shape = (
            _sharegpt if format == "sharegpt" else _with_similarity if with_similarity else _alpaca
        )
        with _list(file, shape) as write:
            yield write
    else:
        shape = _line if format == "jsonl" else _messages
        yield lambda row: _discard(file.write(dumps(shape(row)) + b"\n"))


def question(record: Record) -> str:
    """What the person asks in a chat: the instruction, and the input below it."""
    return (
        f"{record['instruction']}\n\n{record['input']}"
        if record["input"]
        else record["instruction"]
    )


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


def _alpaca(row: Row) -> dict[str, Any]:
    record = row.record
    return {
        "instruction": record["instruction"],
        "input": record["input"],
        "output": record["output"],
    }


def _with_similarity(row: Row) -> dict[str, Any]:
    return _alpaca(row) | {
        "most_similar_instructions": row.decision.most_similar,
        "avg_similarity_score": row.decision.mean_similarity,
    }


def _sharegpt(row: Row) -> dict[str, Any]:
    return {
        "id": row.id,
        "conversations": [
            {"from": "human", "value": question(row.record)},
            {"from": "gpt", "value": row.record["output"]},
        ],
    }


def _messages(row: Row) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question(row.record)},
            {"role": "assistant", "content": row.record["output"]},
        ]
    }


def _line(row: Row) -> dict[str, Any]:
    return {
        "id": row.id,
        **_alpaca(row),
        "model": row.model,
        "demonstrations": row.demonstrations,
        # A list, where Alpaca has an object: a key for each neighbour would give a table thousands
        # of columns.
        "most_similar_instructions": [
            {"instruction": text, "score": score}
            for text, score in row.decision.most_similar.items()
        ],
        "avg_similarity_score": row.decision.mean_similarity,
    }


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


def _csv(file: BinaryIO) -> Write:
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\r\n")

    def put(cells: list[str]) -> None:
        table.writerow(cells)
        file.write(text.getvalue().encode(errors="replace"))
        text.seek(0)
        text.truncate()

    put(["instruction", "input", "output"])
    return lambda row: put([inert(row.record[name]) for name in ("instruction", "input", "output")])


@contextmanager
def _parquet(file: BinaryIO) -> Iterator[Write]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise ConfigError(
            "Parquet needs one package more: pip install 'woolmill[parquet]'"
        ) from exc

    schema = pa.schema(
        [
            ("id", pa.string()),
            ("instruction", pa.string()),
            ("input", pa.string()),
            ("output", pa.string()),
            ("model", pa.string()),
            ("demonstrations", pa.list_(pa.string())),
            ("max_similarity", pa.float64()),
            ("avg_similarity_score", pa.float64()),
        ]
    )
    waiting: list[dict[str, Any]] = []

    def flush() -> None:
        if waiting:
            table.write_batch(pa.RecordBatch.from_pylist(waiting, schema=schema))
            waiting.clear()

    def write(row: Row) -> None:
        texts = {name: _encodable(text) for name, text in _alpaca(row).items()}
        waiting.append(
            {
                "id": row.id,
                **texts,
                "model": row.model,
                "demonstrations": list(row.demonstrations),
                "max_similarity": max(row.decision.most_similar.values(), default=None),
                "avg_similarity_score": row.decision.mean_similarity,
            }
        )
        if len(waiting) == ROW_GROUP:
            flush()

    with pq.ParquetWriter(file, schema, compression="zstd") as table:
        yield write
        flush()


def _encodable(text: str) -> str:
    """Lone surrogates, which Parquet's UTF-8 has no form for, become the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _discard(_: object) -> None:
    """For lambdas that only act."""
