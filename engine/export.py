"""Store to dataset: a pure function of the run's decisions, streamed, in plan order, written whole
or not at all.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import orjson

from engine.errors import DiskError, OutputError
from engine.failpoints import failpoint
from engine.records import Decision
from engine.store import RunReader

__all__ = ["Format", "export"]

Format = Literal["alpaca", "jsonl", "messages"]
FORMATS: tuple[str, ...] = get_args(Format)


def export(run: RunReader, format: Format, path: Path, *, with_similarity: bool = False) -> int:
    """Write the accepted records of ``run`` to ``path``, replacing it in one step.

    Formats:
        ``alpaca``    JSON list of ``{instruction, input, output}``, indented by 4, ASCII, as
        Alpaca's
                      ``utils.jdump`` writes it; with similarity also ``most_similar_instructions``
                      and ``avg_similarity_score``, as in its ``regen.json``
        ``jsonl``     a record a line with its provenance and its neighbours
        ``messages``  a chat a line: ``{"messages": [user, assistant]}``

    Returns:
        The number of records.

    Raises:
        OutputError: the folder is missing or not writable.
        DiskError: writing failed; an older file at ``path`` is untouched.
    """
    rows = (decision for decision, _ in run.accepted())
    write: Callable[[BinaryIO], int]
    if format == "alpaca":
        write = lambda file: _alpaca(rows, file, with_similarity)  # noqa: E731
    else:
        row = _line if format == "jsonl" else _messages
        write = lambda file: _lines(rows, file, row)  # noqa: E731
    return replace_file(path, write)


def replace_file(path: Path, write: Callable[[BinaryIO], int]) -> int:
    """Let ``write`` fill a new file, sync it, and put it in the place of ``path``."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as exc:
        raise OutputError(f"{path}: cannot be created: {exc.strerror}; choose another -o") from exc
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            count = write(file)
            file.flush()
            os.fsync(file.fileno())
        failpoint("export.written")
        temporary.chmod(0o644)
        temporary.replace(path)
        failpoint("export.renamed")
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as exc:
        raise DiskError(f"{path}: cannot be written: {exc.strerror}; the old file stands") from exc
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _alpaca(rows: Iterator[Decision], file: BinaryIO, with_similarity: bool) -> int:
    count = 0
    for decision in rows:
        record = decision.record
        assert record is not None
        fields: dict[str, Any] = {
            "instruction": record.instruction,
            "input": record.input,
            "output": record.output,
        }
        if with_similarity:
            fields["most_similar_instructions"] = decision.most_similar
            fields["avg_similarity_score"] = decision.mean_similarity
        text = json.dumps(fields, indent=4).replace("\n", "\n    ")
        file.write((",\n    " if count else "[\n    ").encode() + text.encode())
        count += 1
    file.write(b"\n]" if count else b"[]")
    return count


def _lines(rows: Iterator[Decision], file: BinaryIO, row: Callable[[Decision], Any]) -> int:
    count = 0
    for decision in rows:
        file.write(_dumps(row(decision)) + b"\n")
        count += 1
    return count


def _line(decision: Decision) -> dict[str, Any]:
    record = decision.record
    assert record is not None
    return {
        "id": f"{decision.index}.{decision.position}",
        "instruction": record.instruction,
        "input": record.input,
        "output": record.output,
        # A list, where Alpaca has an object: a key for each neighbour would give a table thousands
        # of columns.
        "most_similar_instructions": [
            {"instruction": text, "score": score} for text, score in decision.most_similar.items()
        ],
        "avg_similarity_score": decision.mean_similarity,
    }


def _messages(decision: Decision) -> dict[str, Any]:
    record = decision.record
    assert record is not None
    asked = f"{record.instruction}\n\n{record.input}" if record.input else record.instruction
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": record.output},
        ]
    }


_LINE_SEPARATORS = str.maketrans({"\u2028": "\\u2028", "\u2029": "\\u2029", "\x7f": "\\u007f"})


def _dumps(value: Any) -> bytes:
    """One line of JSON in UTF-8; what some readers take for a line's end is escaped."""
    try:
        text = orjson.dumps(value).decode()
    except TypeError:  # a lone surrogate, which only an escape can carry
        text = json.dumps(value, separators=(",", ":"))
    return text.translate(_LINE_SEPARATORS).encode()
