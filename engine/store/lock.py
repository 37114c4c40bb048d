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
import zlib
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from engine.errors import OutputError, StoppedError

__all__ = ["RunLock"]

_LINE = 128


class RunLock:
    """Held from construction to ``release``. Raises StoppedError (75) while another process holds
    it.
    """

    def __init__(self, path: Path) -> None:
        try:
            # Not inheritable (PEP 446): a child must not keep the run locked after its parent's
            # death.
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise OutputError(f"{path}: cannot be opened: {exc.strerror}") from exc
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, _LINE, 0).decode("ascii", "replace").strip(" \n\0")
            os.close(self._fd)
            raise StoppedError(
                f"{path.parent}: in use by {holder or 'another process'}; "
                "wait for it or stop it first"
            ) from None
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        with suppress(OSError):  # a full disk must not keep a run from being opened
            os.pwrite(
                self._fd, f"pid {os.getpid()} since {now}".ljust(_LINE - 1).encode() + b"\n", 0
            )

    def mark(self) -> tuple[str, int] | None:
        """(run id, commits) as last marked; None where there is no whole mark."""
        words = os.pread(self._fd, _LINE, _LINE).split()
        if len(words) != 3 or b"%d" % zlib.crc32(b" ".join(words[:2])) != words[2]:
            return None
        return words[0].decode(), int(words[1])

    def set_mark(self, run_id: str, commits: int) -> None:
        """Note the number of commits. Raises OSError."""
        text = b"%s %d" % (run_id.encode(), commits)
        os.pwrite(self._fd, (b"%s %d" % (text, zlib.crc32(text))).ljust(_LINE - 1) + b"\n", _LINE)

    def release(self) -> None:
        os.close(self._fd)
