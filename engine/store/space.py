"""Room on the disk: seen to run out before it does, and kept for what has been paid.

While a run is open it holds ``run.reserve``, a file of real blocks. When less than as much again is
free, no request may be sent any more; answers in flight still land. Should the disk fill up all the
same, because others write to it, the reserve is given back to the file system and the group that
failed is written once more.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from engine.errors import DiskError, OutputError, StoppedError

__all__ = ["RESERVE_BYTES", "Reserve", "unsafe_filesystem"]

RESERVE_BYTES = 32 << 20
"""Room for the answers in flight at the usual limits: a thousand of 16 KiB, in the log and in the
database.
"""

MOUNTS = Path("/proc/self/mountinfo")
"""Linux's list of mounted file systems; other systems have none, and nothing is said there."""
_UNSAFE = {
    **dict.fromkeys(("nfs", "nfs4", "cifs", "smb3", "ceph", "lustre"), "a network file system"),
    **dict.fromkeys(("9p", "virtiofs"), "a folder of another machine"),
    **dict.fromkeys(("fuse", "fuseblk"), "a file system in user space"),
    **dict.fromkeys(("tmpfs", "ramfs"), "in memory"),
}
"""File systems on which SQLite's locks, or what is synced, may not hold; by their names in
``MOUNTS``."""


class Reserve:
    """The reserve of one run. Raises StoppedError (75) where the disk has no room for it, and
    OutputError (73) where it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "run.reserve"
        self._held = True
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(self._path, flags, 0o600)
            try:
                os.posix_fallocate(fd, 0, RESERVE_BYTES)
            finally:
                os.close(fd)
        except OSError as exc:
            self.release()
            if exc.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                return  # a file system without reservations: watching the free space is left
            if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OutputError(f"{self._path}: cannot be written: {exc.strerror}") from exc
            raise StoppedError(
                f"{folder}: no room for {RESERVE_BYTES >> 20} MiB ({exc.strerror}); "
                "free that much, then resume the run"
            ) from exc

    def shortage(self) -> StoppedError | None:
        """Why nothing may be sent now; None while there is room. Costs one statvfs."""
        try:
            status = os.statvfs(self._folder)
        except OSError as exc:
            raise DiskError(f"{self._folder}: is gone ({exc.strerror})") from exc
        free = status.f_bavail * status.f_frsize
        if free >= RESERVE_BYTES:
            return None
        return StoppedError(
            f"{self._folder}: the disk is nearly full ({free >> 20} MiB left); all answers are "
            f"kept; free {(2 * RESERVE_BYTES - free) >> 20} MiB, then resume the run"
        )

    def release(self) -> bool:
        """Give the room back to the file system. False where that was done before."""
        held, self._held = self._held, False
        self._path.unlink(missing_ok=True)
        return held


def unsafe_filesystem(folder: Path) -> str | None:
    """Why the file system of ``folder`` cannot keep the promise, for the person; None where it can.

    Locks and shared memory do not work between the hosts of a network file system, and what is in
    memory does not outlive a power cut.
    """
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = MOUNTS.read_text()
    except OSError:
        return None  # not Linux: nothing is known
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == wanted:
            kind = rest.split()[0]
            why = _UNSAFE.get(kind.partition(".")[0])
            if why is not None:
                return (
                    f"{folder}: lies on {kind}, {why}: a crash may lose results; use a local disk"
                )
    return None
