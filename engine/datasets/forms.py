"""What form a file of rows has, from its first bytes; and its bytes as UTF-8 from then on.

    gzip ─▶ UTF-8, UTF-16 or UTF-32 ─▶ JSON Lines · a JSON document · CSV or TSV · Parquet · Arrow

A file is somebody's input. What is unpacked is bounded by what was packed, and a line by
``MAX_LINE_BYTES``, so that memory is too.
"""

from __future__ import annotations

import codecs
import gzip
import io
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

from engine.errors import InputError

__all__ = [
    "MAX_LINE_BYTES",
    "MAX_WHOLE_BYTES",
    "Form",
    "Row",
    "Source",
    "lines_of",
    "opened",
    "whole",
]

Reader: TypeAlias = "io.BufferedReader[Any]"
Kind = Literal["lines", "document", "csv", "parquet", "arrow"]

MAX_LINE_BYTES = 64 * 2**20
"""Of one line, which is a row of JSON Lines or a part of one."""
MAX_WHOLE_BYTES = 4 * 2**30
"""Of a JSON document, which must be read as a whole."""
MAX_RATIO = 200
"""Bytes that one byte of gzip may unpack to, once there are ``FREE_BYTES`` of them. Text packs to
a fifth, and a file that unpacks without end to a thousandth."""
FREE_BYTES = 64 * 2**20
"""A packed file may unpack to this much whatever its ratio: a small one of equal rows packs to
almost nothing."""
HEAD_BYTES = 1 << 16
"""Bytes read at a time; the form is told from the first ones."""
PACKED = {
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"7z\xbc\xaf": "7-zip",
}
"""First bytes of what is not unpacked here, so that the message says what it is and not that the
text is broken."""
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, of which it is the beginning
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it stands."""

    path: Path
    line: int
    """Line of a JSON Lines or CSV file, or number of the row in the others, from 1."""
    values: dict[str, Any]
    raw: bytes | None = None
    """JSON Lines: the row as it stands in the file, in UTF-8."""


@dataclass(slots=True, kw_only=True)
class Form:
    """How a file holds its rows, as far as a file of the same form must follow it."""

    kind: Kind
    packed: bool = False
    """With gzip."""
    delimiter: str = ","
    """CSV: between two cells."""
    line_end: str = "\n"
    """CSV."""
    columns: list[str] | None = None
    """CSV: as the header names them."""
    around: tuple[dict[str, Any], str] | None = None
    """A document that is an object: what stands in it besides the rows, and their key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file that is open for reading, unpacked and as UTF-8 without a byte order mark."""

    path: Path
    stream: BinaryIO
    form: Form


@contextmanager
def opened(path: Path) -> Iterator[Source | None]:
    """The file and its form; None where it is blank. Raises InputError, naming the path."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: not a regular file; give a dataset, or its folder")
        with path.open("rb", buffering=HEAD_BYTES) as file:
            stream, packed = _unpacked(file, path)
            text, blank = _utf8(stream)
            if blank:
                yield None
                return
            form = _form(text.peek(HEAD_BYTES), path)
            form.packed = packed
            yield Source(path=path, stream=text, form=form)
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise InputError(f"{path}: gzip is damaged ({exc}); get the file anew") from exc
    except UnicodeDecodeError as exc:
        raise InputError(f"{path}: is not whole {exc.encoding.upper()}: {exc.reason}") from exc
    except OSError as exc:
        raise InputError(f"{path}: cannot be read: {exc.strerror or exc}") from exc


def lines_of(source: Source, number: int = 0) -> Iterator[tuple[int, bytes]]:
    """The lines behind line ``number``, numbered and with their ends; blank ones are left out."""
    while line := source.stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise InputError(
                f"{source.path}:{number}: the line is longer than {MAX_LINE_BYTES >> 20} MiB; "
                "write a row to a line"
            )
        if not line.isspace():
            yield number, line


def whole(source: Source, max_bytes: int) -> bytes:
    """All of it, for forms that cannot be read in pieces."""
    data = source.stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise InputError(
            f"{source.path}: is a JSON document longer than {max_bytes >> 20:,} MiB, which would "
            "be read as a whole; write a row to a line (JSON Lines)"
        )
    return data


class _Gunzip(io.RawIOBase):
    """What a gzip file holds, as long as that is not out of all proportion to its size."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._packed, self._path = file, path
        self._file = gzip.GzipFile(fileobj=file)
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._count += len(data)
        if self._count > max(FREE_BYTES, MAX_RATIO * self._packed.tell()):
            raise InputError(
                f"{self._path}: unpacks to more than {MAX_RATIO} times its size; unpack it first "
                "if that is as it should be"
            )
        buffer[: len(data)] = data
        return len(data)


class _Recoded(io.RawIOBase):
    """Text of another encoding as UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            data = self._stream.read(HEAD_BYTES)
            self._left = self._decoder.decode(data, final=not data).encode()
            if not data:
                break
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _unpacked(file: BinaryIO, path: Path) -> tuple[Reader, bool]:
    assert isinstance(file, io.BufferedReader)
    head = file.peek(8)
    for mark, name in PACKED.items():
        if head.startswith(mark):
            raise InputError(f"{path}: is packed with {name}; unpack it first, or use gzip")
    if not head.startswith(b"\x1f\x8b"):
        return file, False
    stream: Reader = io.BufferedReader(_Gunzip(file, path), HEAD_BYTES)
    if stream.peek(4)[:4] in (b"PAR1", b"ARRO") or stream.peek(2).startswith(b"\x1f\x8b"):
        raise InputError(f"{path}: has been packed twice; unpack it first (gunzip)")
    return stream, True


def _utf8(stream: Reader) -> tuple[Reader, bool]:
    """The stream behind its byte order mark, as UTF-8; and whether there is nothing in it."""
    head = stream.peek(4)
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    if encoding is not None:
        stream.read(next(len(mark) for mark in MARKS if head.startswith(mark)))
    elif b"\0" in head[:4] and not head.startswith((b"ARRO", b"\xff\xff\xff\xff")):
        encoding = _without_mark(head[:4])
    if encoding not in (None, "utf-8"):
        stream = io.BufferedReader(_Recoded(stream, str(encoding)), HEAD_BYTES)
    while (head := stream.peek(HEAD_BYTES)).isspace():
        stream.read(len(head))
    return stream, not head


def _without_mark(head: bytes) -> str:
    """The encoding of a JSON text, which begins with ASCII (RFC 4627, section 3)."""
    zeros = tuple(byte == 0 for byte in head.ljust(4, b"\1"))
    if zeros[:3] == (True, True, True):
        return "utf-32-be"
    if zeros[1:] == (True, True, True):
        return "utf-32-le"
    return "utf-16-be" if zeros[0] else "utf-16-le"


def _form(head: bytes, path: Path) -> Form:
    if head.startswith(b"PAR1"):
        return Form(kind="parquet")
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return Form(kind="arrow")
    text = head.lstrip()
    named = [suffix for suffix in path.suffixes if suffix.lower() in (".csv", ".tsv")]
    if text.startswith((b"{", b"[")) and not named:
        return Form(kind="document" if text.startswith(b"[") else "lines")
    first = text.partition(b"\n")[0]
    line_end = "\r\n" if first.endswith(b"\r") else "\n"
    delimiters = [b"\t", b";", b","]
    if not named and not any(delimiter in first for delimiter in delimiters):
        raise InputError(
            f"{path}: holds neither JSON, CSV with a header, nor Parquet; it begins with "
            f"{first[:40].decode('utf-8', 'replace')!r}"
        )
    delimiter = max(delimiters, key=first.count) if any(d in first for d in delimiters) else b","
    return Form(kind="csv", delimiter=delimiter.decode(), line_end=line_end)
