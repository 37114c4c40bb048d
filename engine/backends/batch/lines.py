"""The files of a batch: requests out, a line each, and answers in.

Files are written and read a line at a time, so that fifty thousand take the memory of one. What
comes back is another's: lines in any order, twice, of other requests, broken, or cut at the end.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import orjson

from engine.backends.batch.jobs import Jobs, Result

__all__ = [
    "Survey",
    "Writing",
    "encoded",
    "line_at",
    "read_lines",
    "request_id",
    "request_of",
    "result_of",
    "survey",
]

MOST_LINE_BYTES = 32 * 2**20
"""As much as an answer over HTTP may have. A longer line is read in pieces, so that memory stays
bounded; no piece is whole JSON, so none is taken for an answer."""
ID = re.compile(r"([0-9a-f]{8})-(\d{1,15})-[0-9a-f]{8}")
"""Letters, digits and dashes, which all providers take, and at most 33 of them."""


def request_id(run_id: str, request: int, key: bytes) -> str:
    """What a line calls its request: of which run it is, its number, and what was asked."""
    return f"{run_id[:8]}-{request}-{key[:4].hex()}"


def request_of(id: str, run_id: str) -> int | None:
    """The number of the request that ``id`` names; None where it is none of this run's."""
    found = ID.fullmatch(id)
    return int(found[2]) if found is not None and found[1] == run_id[:8] else None


class Writing:
    """A file of requests in the making. Leave the context, and it is on the disk."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file: IO[bytes] = os.fdopen(os.open(path, flags, 0o600), "wb")
        self.bytes = 0
        self.lines = 0

    def add(self, line: bytes) -> None:
        self._file.write(line)
        self.bytes += len(line)
        self.lines += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())


def encoded(line: Any) -> bytes:
    """One line of a file of requests. Half a surrogate pair, which UTF-8 lacks, is escaped."""
    try:
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        return json.dumps(line, separators=(",", ":")).encode() + b"\n"


@dataclass(slots=True)
class Survey:
    """What a file of answers holds, at a glance."""

    lines: int = 0
    whole: bool = True
    """Its last line is at its end."""


def survey(path: Path) -> Survey:
    """Count the lines of a file, and see whether it was cut within one."""
    found, last = Survey(), b""
    with path.open("rb") as file:
        for line in _lines(file):
            if line.strip():
                found.lines += 1
                last = line
    if last and not last.endswith(b"\n"):
        try:
            orjson.loads(last)
        except orjson.JSONDecodeError:
            found.whole, found.lines = False, found.lines - 1
    return found


def result_of(line: bytes, jobs: Jobs) -> Result | None:
    """What a line of answers says; None for one that says nothing about a request."""
    try:
        return jobs.result(orjson.loads(line))
    except orjson.JSONDecodeError:
        return None


def line_at(file: IO[bytes], offset: int) -> bytes:
    """The line that begins there."""
    file.seek(offset)
    return file.readline(MOST_LINE_BYTES)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of each line that is not blank."""
    offset = 0
    with path.open("rb") as file:
        for line in _lines(file):
            if line.strip():
                yield offset, line
            offset += len(line)


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file; one that is too long to be an answer comes in pieces, which are none."""
    while line := file.readline(MOST_LINE_BYTES):
        yield line
