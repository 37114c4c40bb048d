"""One writer per run, and a mark of how far it came.

``run.lock`` is held by flock for the life of the writer: the kernel lets go when the process ends,
however it ends. The file's first line says who holds it; its second, the *mark*, how many groups
have been committed. The mark is written after the database's own sync and never synced itself, so
it can lag behind the database but not lead it. A database behind its mark has lost commits that
were acknowledged: a log file deleted, or an older copy put in its place.
"""

from __future__ import annotations

import fcntl
import os
import time
import zlib
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from engine.errors import InputError, OutputError, StoppedError

__all__ = ["RunLock", "is_held", "read_mark"]

_LINE = 128
"""Bytes of each line of the file, filled up with blanks, so that either is written in one place
without touching the other."""
_LOOKED_AT_S = 1.0
"""How long others who only look (``is_held``) may keep a writer from its lock."""


class RunLock:
    """Held from construction to ``release``. Raises StoppedError (75) while another process holds
    it.

    Attributes:
        mark: (run id, commits) as the last holder left it; None where there is no whole mark.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._run_id = b""
        try:
            # Not inheritable: a child must not keep the run locked after its parent's death.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(path, flags, 0o600)
        except OSError as exc:
            raise OutputError(f"{path}: cannot be opened: {exc.strerror}") from exc
        try:
            _lock(self._fd)
        except OSError as exc:
            holder = os.pread(self._fd, _LINE, 0).decode("ascii", "replace").strip(" \n\0")
            os.close(self._fd)
            if not isinstance(exc, BlockingIOError):
                raise OutputError(f"{path}: cannot be locked: {exc.strerror}") from exc
            raise StoppedError(
                f"{path.parent}: in use by {holder or 'another process'}; "
                "wait for it or stop it first"
            ) from None
        self.mark = read_mark(path)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        who = f"pid {os.getpid()} since {now}".ljust(_LINE - 1).encode() + b"\n"
        with suppress(OSError):  # a full disk must not keep a run from being opened
            os.pwrite(self._fd, who, 0)

    def check(self, run_id: str, commits: int) -> None:
        """Raises InputError where a database with ``commits`` lost some, or is another run's."""
        self._run_id = run_id.encode()
        if self.mark is None or self.mark == (run_id, commits):
            return
        marked_id, marked = self.mark
        folder = self._path.parent
        if marked_id != run_id:
            raise InputError(
                f"{folder}: run.sqlite is of another run than run.lock; put the right one back, "
                "or delete run.lock if the database is the one you want"
            )
        if marked > commits:
            raise InputError(
                f"{folder}: run.sqlite holds {commits} of {marked} commits: its log "
                "(run.sqlite-wal) was removed, or an older copy put in its place; "
                "bring those files back, or go on with what there is: woolmill salvage"
            )

    def set_mark(self, commits: int) -> None:
        """Note the number of commits; ``check`` has named the run. Raises OSError."""
        text = b"%s %d" % (self._run_id, commits)
        os.pwrite(self._fd, (b"%s %d" % (text, zlib.crc32(text))).ljust(_LINE - 1) + b"\n", _LINE)

    def release(self) -> None:
        os.close(self._fd)


def _lock(fd: int) -> None:
    """Take the lock. Raises BlockingIOError while another process writes the run.

    Whoever only looks has the lock too, but shared and for some microseconds: where it can be
    shared, nobody writes, and it is tried again.
    """
    until_s = time.monotonic() + _LOOKED_AT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # raises where somebody writes
            fcntl.flock(fd, fcntl.LOCK_UN)
            if time.monotonic() > until_s:
                raise
        os.sched_yield()


def is_held(path: Path) -> bool:
    """Whether a process writes the run whose lock file is ``path``; True where nobody can tell."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def read_mark(path: Path) -> tuple[str, int] | None:
    """The mark in the lock file ``path``; None where there is no whole one."""
    try:
        words = path.read_bytes()[_LINE:].split()
    except OSError:
        return None
    if len(words) != 3 or b"%d" % zlib.crc32(b" ".join(words[:2])) != words[2]:
        return None
    return words[0].decode(), int(words[1])
