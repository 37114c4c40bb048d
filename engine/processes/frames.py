"""Frames, in which processes here exchange messages: two lengths (4 bytes each, big-endian), a head
of so many bytes, always JSON, and a body of so many, often none.

The standard library alone: the program that runs vLLM loads this file by its path, since its
environment need not have the engine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

__all__ = ["Frame", "Frames", "frame", "keep_pipes", "read_frame"]

LENGTHS = 8


class Frame(NamedTuple):
    """One message."""

    head: bytes
    body: bytes


def frame(head: bytes, body: Sequence[bytes] = ()) -> list[bytes]:
    """What goes out for a message, to be written in this order."""
    size = sum(map(len, body))
    return [len(head).to_bytes(4, "big") + size.to_bytes(4, "big"), head, *body]


def read_frame(source: BinaryIO) -> Frame | None:
    """The next message, waited for; None at the end, in the middle of one too."""
    lengths = source.read(LENGTHS)
    head_size, body_size = _sizes(lengths)
    head, body = source.read(head_size), source.read(body_size)
    if len(lengths) < LENGTHS or len(head) < head_size or len(body) < body_size:
        return None
    return Frame(head, body)


class Frames:
    """Cuts what comes in pieces of any size into messages."""

    def __init__(self) -> None:
        self._rest = bytearray()
        """The beginning of a message that is not whole yet."""

    def take_in(self, piece: bytes) -> Iterator[Frame]:
        """The messages that are whole with this piece."""
        rest = self._rest
        rest += piece
        while len(rest) >= LENGTHS:
            head_size, body_size = _sizes(rest)
            middle, end = LENGTHS + head_size, LENGTHS + head_size + body_size
            if len(rest) < end:
                return
            message = Frame(bytes(rest[LENGTHS:middle]), bytes(rest[middle:end]))
            del rest[:end]
            yield message

    def __len__(self) -> int:
        """Bytes that are there of a message that is not whole yet."""
        return len(self._rest)


def keep_pipes() -> tuple[BinaryIO, BinaryIO]:
    """For a child: its standard input and output, kept for messages. Whatever else reads finds an
    empty input, and what libraries print goes to standard error.
    """
    source, out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return source, out


def _sizes(lengths: bytes | bytearray) -> tuple[int, int]:
    return int.from_bytes(lengths[:4], "big"), int.from_bytes(lengths[4:LENGTHS], "big")
