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

from engine.errors import ConfigError

__all__ = ["POINTS", "arm", "failpoint"]

POINTS = (
    "store.create",  # the folder exists, the database has no tables yet
    "store.created",  # tables and manifest are committed
    "store.recovered",  # an existing database was opened and its log folded in
    "store.group",  # a group is taken from the queue, nothing written
    "store.commit",  # its rows are written, not committed
    "store.committed",  # committed, nobody told
    "store.acknowledged",  # the event loop was told
    "store.close",  # everything is committed, the log is about to be folded in
    "request.recorded",  # recorded, not sent
    "answer.arrived",  # paid for, not written
    "answer.kept",  # acknowledged
    "decision.made",  # not written
    "decision.kept",  # acknowledged
    "batch.recorded",  # the batch is in the store, the provider knows nothing
    "batch.uploaded",  # its file is there, which the store does not say yet
    "batch.creating",  # about to be created, and the store says so
    "batch.created",  # it runs, and the store does not know its name
    "batch.open",  # the store does
    "batch.downloaded",  # its answers are here in a file, not in the store
    "batch.kept",  # they are in the store, which does not say that they are all
    "batch.collected",  # it says so; the files are still at the provider
    "batch.deleted",  # they are gone there, which the store does not say
    "index.written",  # a snapshot is whole and synced, under another name yet
    "index.renamed",  # it stands in the old one's place
    "export.written",  # the new dataset has another name yet
    "export.renamed",  # it stands in the old one's place, not yet noted as ours
    "loop.people",  # the seed tasks are set apart
    "loop.first",  # the first model is measured, and there is no ledger
    "loop.generated",  # a round's run is at its target, nothing is exported
    "loop.exported",  # its rows are in files
    "loop.finished",  # its training is at its end, in a folder that is not the model's yet
    "loop.trained",  # its model's folder is there, with checkpoints in it
    "loop.round",  # all is done that its line in the ledger says, and the line is not there
    "loop.ledger",  # it is; what no longer counts is still on the disk
    "loop.pruned",  # and now it is not
)
ACTIONS = {"kill": 0, "eio": errno.EIO, "enospc": errno.ENOSPC}


class _Armed:
    """One point, the passings left until it acts, and the errno it raises (0: kill)."""

    def __init__(self, setting: str) -> None:
        name, _, rest = setting.partition(":")
        nth, _, action = rest.partition(":")
        if name not in POINTS or not nth.isdecimal() or action not in ACTIONS:
            raise ConfigError(
                f"WOOLMILL_FAILPOINT={setting!r}: expected NAME:NTH:{'|'.join(ACTIONS)} "
                f"with a name of {', '.join(POINTS)}"
            )
        self.name, self.left, self.errno = name, int(nth), ACTIONS[action]


_armed: _Armed | None = None


def arm(setting: str | None) -> None:
    """Arm one point (``name:nth:action``) or none. Raises ConfigError for what is no setting."""
    global _armed
    _armed = _Armed(setting) if setting else None


def failpoint(name: str) -> None:
    """Pass the point ``name``; raises OSError or ends the process where it is armed."""
    if _armed is None or _armed.name != name:
        return
    _armed.left -= 1
    if _armed.left != 0:
        return
    if not _armed.errno:
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(_armed.errno, f"{os.strerror(_armed.errno)} (failpoint {name})")


arm(os.environ.get("WOOLMILL_FAILPOINT"))
