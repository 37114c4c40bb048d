"""Standard streams that cannot end a run.

A terminal goes away with its ssh session, a log's disk fills up, whoever reads a pipe stops doing
so, and cron starts programs with no standard streams at all. None of that may cost an answer that
was paid for. So standard error is written by a thread of its own: what cannot be written is
dropped, and nobody waits for a reader who does not read. Standard output holds results, so a
failure there is an error like any other, with one line and status 74.

The price: text for standard error is a little late. ``drain`` waits for it, in bounds.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from engine.errors import DiskError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["drain", "sturdy_streams"]

MOST_WAITING_BYTES = 1 << 20
"""Text that may wait for a slow reader; what comes beyond is dropped."""
DRAIN_S = 2.0
"""How long ``drain`` waits for a reader who takes nothing."""
PLAIN = {"·": "-", "…": "...", "●": "*", "⟨": "<", "⟩": ">"}
"""What our own signs become under an encoding that lacks them."""
ERRORS = "woolmill.plain"
"""The name under which ``codecs`` knows what stands in for signs that cannot be written."""


@contextmanager
def sturdy_streams() -> Iterator[None]:
    """Standard streams that are there and hold, until the end of the block.

    Closed descriptors become the null device: the next file or socket to be opened would otherwise
    take the number, and receive what is meant for a person. Streams that are not the process's own
    (a test's) are left as they are.
    """
    _reopen()
    codecs.register_error(ERRORS, _plain)
    out, err = sys.stdout, sys.stderr
    pump = None
    if _is_own(out, 1):
        sys.stdout = _text(io.BufferedWriter(_Results(1, "w", closefd=False)), like=out)
    if _is_own(err, 2):
        with suppress(RuntimeError):  # no more threads allowed: the stream stays as it is
            pump = _Pump(2)
            sys.stderr = _text(pump, like=err)
    try:
        yield
    finally:
        with suppress(OSError, ValueError, DiskError):
            sys.stdout.flush()
        drain()
        sys.stdout, sys.stderr = out, err


def drain() -> None:
    """Wait until standard error is written, as long as whoever reads it goes on reading."""
    pump = getattr(sys.stderr, "buffer", None)
    if isinstance(pump, _Pump):
        pump.drain()


def _reopen() -> None:
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            new = os.open(os.devnull, os.O_RDWR)
            if new == fd:
                os.set_inheritable(fd, True)
            else:
                os.dup2(new, fd)
                os.close(new)
        if getattr(sys, name) is None:
            stream = open(fd, "r" if fd == 0 else "w", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)


def _is_own(stream: TextIO, fd: int) -> bool:
    try:
        return stream.fileno() == fd
    except (OSError, ValueError, AttributeError):
        return False


def _text(binary: io.BufferedWriter | _Pump, *, like: TextIO) -> TextIO:
    return io.TextIOWrapper(
        binary,  # type: ignore[type-var]
        encoding=like.encoding,
        errors=ERRORS,
        line_buffering=like.isatty(),
        write_through=isinstance(binary, _Pump),
    )


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Replace what the encoding lacks, by a plain sign of ours or by its number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    shown = (PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing)
    return "".join(shown), error.end


class _Results(io.FileIO):
    """Standard output. A failure is said once; what is still buffered then goes nowhere, so that it
    does not fail once more when the interpreter ends, which would hide the status.
    """

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            while (written := super().write(data)) is None:  # set not to block, by another program
                select.select([], [self.fileno()], [])
            return written
        except OSError as exc:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if exc.errno == errno.EPIPE:  # ``| head``: no error at all
                raise
            raise DiskError(f"standard output: {exc.strerror}; redirect it elsewhere") from exc


class _Pump(io.RawIOBase):
    """Takes bytes for descriptor ``fd`` at once and never raises; a thread writes them."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._waiting: deque[bytes] = deque()
        self._size = 0
        """Bytes of ``_waiting`` and of what is being written."""
        self._written = 0
        """Pieces done with."""
        # Reentrant: what a finaliser prints may come in the middle of a write.
        self._changed = threading.Condition(threading.RLock())
        # Daemon: a reader who does not read must not keep the process from ending.
        threading.Thread(target=self._run, name="woolmill-screen", daemon=True).start()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: ReadableBuffer, /) -> int:
        piece = bytes(data)
        with self._changed:
            if self._size + len(piece) <= MOST_WAITING_BYTES:
                self._waiting.append(piece)
                self._size += len(piece)
                self._changed.notify_all()
        return len(piece)

    def drain(self) -> None:
        with self._changed:
            while self._size:
                before = self._written
                self._changed.wait(DRAIN_S)
                if self._written == before:
                    return

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                piece = self._waiting.popleft()
            with suppress(OSError):  # a full disk, a reader or a terminal that is gone
                self._put(piece)
            with self._changed:
                self._size -= len(piece)
                self._written += 1
                self._changed.notify_all()

    def _put(self, piece: bytes) -> None:
        left = memoryview(piece)
        while left:
            try:
                left = left[os.write(self._fd, left) :]
            except BlockingIOError:  # another program set the terminal or pipe not to block
                select.select([], [self._fd], [])
