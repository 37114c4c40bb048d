"""Named places where a test may end the process, or make the disk fail, to see what is left.

``WOOLMILL_FAILPOINT=name:nth:action`` arms one of them: on its nth passing (from 1) the action
happens. Actions: ``kill`` (SIGKILL to this process: nothing is flushed, no handler runs), ``eio``
and ``enospc`` (the OSError of that errno). The price when nothing is armed: one comparison with
None.
"""

from __future__ import annotations

import errno
import os
import signal
import sys

from engine.errors import ConfigError

__all__ = ["POINTS", "failpoint"]

POINTS = (
    "store.create",  # the folder exists, the database has no tables yet
    "store.created",  # tables and manifest are committed
    "store.recovered",  # an existing database was opened and its log folded in
    "store.group",  # a group is taken from the queue, nothing written
    "store.commit",  # its rows are written, not committed
    "store.committed",  # committed, nobody told
    "store.acknowledged",  # the event loop was told
    "store.close",  # everything is committed, the log is about to be folded in
    "export.write",  # the export's temporary file is written, not renamed
    "export.renamed",  # renamed, the folder not synced
)


class _Armed:
    def __init__(self, setting: str) -> None:
        name, _, rest = setting.partition(":")
        nth, _, action = rest.partition(":")
        if name not in POINTS or not nth.isdecimal() or action not in ("kill", "eio", "enospc"):
            raise ConfigError(
                f"WOOLMILL_FAILPOINT={setting!r}: expected NAME:NTH:kill|eio|enospc with a name of "
                + ", ".join(POINTS)
            )
        self.name, self.left, self.action = name, int(nth), action


_setting = os.environ.get("WOOLMILL_FAILPOINT")
_armed = _Armed(_setting) if _setting else None


def failpoint(name: str) -> None:
    """Pass the point ``name``; raises OSError or ends the process where it is armed."""
    if _armed is None or _armed.name != name:
        return
    _armed.left -= 1
    if _armed.left != 0:
        return
    if _armed.action == "kill":
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    code = errno.EIO if _armed.action == "eio" else errno.ENOSPC
    raise OSError(code, f"{os.strerror(code)} (failpoint {name})")
