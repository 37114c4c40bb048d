"""Flat arrays in a file, whole or not at all: a large index that is to be there again soon.

    magic (16 bytes), length of the head (4, little-endian), head (JSON), the arrays one after the
    other as they lie in memory, SHA-256 of all before it

The head says what the file is about, and of each array its name, type and number of elements. A
reader trusts none of it before the length of the file and the checksum agree, and no number in an
array before whoever takes it has looked at it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from engine.dedup.memory import RESERVE, Part, reserve
from engine.failpoints import failpoint

__all__ = ["read_arrays", "read_head", "write_arrays"]

MAGIC = b"woolmill arrays\n"
MOST_HEAD = 1 << 16
"""Bytes of a head; real ones have two thousand."""
TYPES = {"|u1", "<u4", "<u8", "<i8"}
BLOCK = 8 << 20
"""Bytes that are written and summed together."""
SYNCED = 64 << 20
"""Bytes after which what was written is synced, so that no other sync on the disk, such as that of
a store's commit, ever waits for the whole."""


def write_arrays(path: Path, about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> int:
    """Put a file in the place of ``path``, durably; how many bytes it has. Raises OSError.

    Arrays have one dimension.
    """
    listed = [[name, array.dtype.str, len(array)] for name, array in arrays.items()]
    head = json.dumps({"about": about, "arrays": listed}).encode()
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(new, flags, 0o600), "wb", buffering=0) as file:
            _fill(file, MAGIC + len(head).to_bytes(4, "little") + head, arrays)
            os.fsync(file.fileno())
            size = file.tell()
        failpoint("index.written")
        new.replace(path)
    except OSError:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    failpoint("index.renamed")
    return size


def _fill(file: BinaryIO, head: bytes, arrays: Mapping[str, NDArray[Any]]) -> None:
    sum_ = hashlib.sha256()
    synced = 0

    def write(data: memoryview) -> None:
        nonlocal synced
        sum_.update(data)
        while data:
            data = data[file.write(data) :]
        if file.tell() - synced >= SYNCED:
            os.fdatasync(file.fileno())
            synced = file.tell()

    write(memoryview(head))
    for array in arrays.values():
        data = np.ascontiguousarray(array).data.cast("B") if len(array) else memoryview(b"")
        for start in range(0, len(data), BLOCK):
            write(data[start : start + BLOCK])
    write(memoryview(sum_.digest()))


def read_head(path: Path) -> dict[str, Any] | None:
    """What a file of arrays is about, as it says; None where there is no file of this name. Raises
    OSError, and ValueError for what is no such file.
    """
    try:
        with _opened(path) as file:
            about, _ = _head(file, hashlib.sha256())
    except FileNotFoundError:
        return None
    return about


def read_arrays(path: Path) -> tuple[dict[str, Any], dict[str, Part]]:
    """What a file is about, and its arrays by their names. Raises OSError, and ValueError for what
    is no such file, or not whole.
    """
    with _opened(path) as file:
        sum_ = hashlib.sha256()
        about, listed = _head(file, sum_)
        arrays = {}
        for name, dtype, size in listed:
            nbytes = size * dtype.itemsize
            # Twice as large, so that the next texts find room without a copy of all.
            array = reserve(dtype, nbytes=max(RESERVE, 2 * nbytes))
            _read_into(file, array.data.cast("B")[:nbytes], sum_)
            arrays[name] = Part(array, size)
        if file.read() != sum_.digest():
            raise ValueError("its checksum is another")
    return about, arrays


def _opened(path: Path) -> BinaryIO:
    """Only a plain file, and not by way of a link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    file = os.fdopen(descriptor, "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise ValueError("it is no plain file")
    return file


def _head(file: BinaryIO, sum_: Any) -> tuple[dict[str, Any], list[tuple[str, np.dtype[Any], int]]]:
    """What the file is about and its arrays, whose lengths are those of the file."""
    start = file.read(len(MAGIC) + 4)
    length = int.from_bytes(start[len(MAGIC) :], "little")
    if start[: len(MAGIC)] != MAGIC or length > MOST_HEAD:
        raise ValueError("it is no file of arrays")
    head = file.read(length)
    sum_.update(start + head)
    try:
        told = json.loads(head)
        about = dict(told["about"])
        listed = [(str(name), str(kind), int(size)) for name, kind, size in told["arrays"]]
    except (ArithmeticError, KeyError, TypeError, ValueError, RecursionError) as exc:
        raise ValueError("its head cannot be read") from exc
    if any(kind not in TYPES or size < 0 for _, kind, size in listed):
        raise ValueError("its head names arrays that there are not")
    arrays = [(name, np.dtype(kind), size) for name, kind, size in listed]
    whole = file.tell() + sum(dtype.itemsize * size for _, dtype, size in arrays) + 32
    if os.fstat(file.fileno()).st_size != whole:
        raise ValueError("it is longer or shorter than it says")
    return about, arrays


def _read_into(file: BinaryIO, data: memoryview, sum_: Any) -> None:
    for start in range(0, len(data), BLOCK):
        block = data[start : start + BLOCK]
        done = 0
        while done < len(block):
            count = file.readinto(block[done:])  # type: ignore[attr-defined]
            if not count:
                raise ValueError("it ends too soon")
            done += count
        sum_.update(block)
