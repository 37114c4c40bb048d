"""Run a command that dies with whoever started this: ``python tether.py COMMAND…``.

Stdin is the tether: when its other end closes, however that came about, the whole process group is
killed. For programs that do not look after this themselves, as vLLM's server does not. Its exit
status is the command's.

Two processes hold it. The one that was started knows the command's status, and who cleans up after
the starter may kill it first, as Ray kills the children of its workers; so there is a second one,
which is nobody's child and is not found in that way.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import NoReturn


def hold() -> NoReturn:
    """Wait for the other end to close."""
    while os.read(0, 4096):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)
    raise SystemExit  # not reached


def leave_a_second() -> None:
    """Leave behind a process of this group that holds the tether too."""
    if child := os.fork():
        os.waitpid(child, 0)
        return
    if os.fork():
        os._exit(0)  # so the next one has no parent here
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # who reads what the command prints must see the end of it
    os.dup2(nowhere, 2)
    hold()


def main() -> NoReturn:
    """Start the command in this process group and wait for it."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # what is killed must not be somebody else's
    # A SIGTERM to the group is for the command, which ends in order; then so do we.
    signal.signal(signal.SIGTERM, lambda *_: None)
    leave_a_second()
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=hold, daemon=True).start()
    code = command.wait()
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
