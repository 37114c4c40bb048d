"""Named places where a test may end the process or make something fail, to see what is left.

``WOOLMILL_FAILPOINT=NAME:NTH:ACTION`` arms one: on its nth passing (from 1) the action happens, and
``@RANK`` after the action limits it to one rank. ``NTH+`` repeats it from the nth on. Actions:

    kill          SIGKILL: nothing is flushed, no handler runs
    term, int     SIGTERM, SIGINT
    hang          SIGSTOP: alive, but silent
    eio, enospc   an OSError
    nan           :func:`failpoint` answers True, and the caller spoils its value

The price when nothing is armed: one comparison.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from dataclasses import dataclass

from trainer.errors import ConfigError

__all__ = ["POINTS", "arm", "failpoint"]

POINTS = (
    "train.loss",  # a step's loss is known, the optimizer has not moved
    "train.step",  # the optimizer has moved, metrics are not written
    "save.begin",  # the checkpoint's folder exists and is empty
    "save.shards",  # this rank's shard is written and synced
    "save.digests",  # every rank's digests are known, there is no manifest
    "save.manifest",  # the manifest is written under a temporary name
    "save.whole",  # the manifest is in place, older checkpoints are still there
    "save.pruned",  # older checkpoints are gone
    "export.weights",  # weights and tokenizer are written to the temporary folder
    "export.renamed",  # weights are in place, config.json is not
)

_SPELLING = re.compile(
    r"(?P<name>[a-z.]+):(?P<nth>\d+)(?P<on>\+?):(?P<action>kill|term|int|hang|eio|enospc|nan)(@(?P<rank>\d+))?"
)
"""``save.manifest:2:kill``, or ``train.loss:10+:nan@1``."""

_SENT = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "hang": signal.SIGSTOP,
}
"""Actions that are a signal to the process itself."""


@dataclass
class _Armed:
    name: str
    left: int
    repeat: bool
    action: str
    rank: str | None


def _parse(setting: str | None) -> _Armed | None:
    if not setting:
        return None
    match = _SPELLING.fullmatch(setting)
    if match is None or match["name"] not in POINTS:
        raise ConfigError(
            f"WOOLMILL_FAILPOINT={setting!r}: expected NAME:NTH[+]:ACTION[@RANK], with a name of"
            f" {', '.join(POINTS)}"
        )
    return _Armed(
        match["name"], int(match["nth"]), match["on"] == "+", match["action"], match["rank"]
    )


_armed = _parse(os.environ.get("WOOLMILL_FAILPOINT"))


def arm(setting: str | None) -> None:
    """Arm what ``setting`` says, in the environment variable's spelling; None disarms."""
    global _armed
    _armed = _parse(setting)


def failpoint(name: str) -> bool:
    """Pass the point ``name``; True where its action is ``nan``. Raises OSError where armed to."""
    if _armed is None or _armed.name != name:
        return False
    if _armed.rank is not None and _armed.rank != os.environ.get("RANK", "0"):
        return False
    _armed.left -= 1
    if _armed.left > 0 or (_armed.left < 0 and not _armed.repeat):
        return False
    if _armed.action in _SENT:
        os.kill(os.getpid(), _SENT[_armed.action])
        return False
    if _armed.action == "nan":
        return True
    code = errno.EIO if _armed.action == "eio" else errno.ENOSPC
    raise OSError(code, f"{os.strerror(code)} (failpoint {name})")
