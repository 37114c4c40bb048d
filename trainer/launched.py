"""A rank and the torchrun that launched it: the one does not outlive the other.

torchrun gives each rank a session of its own, and one that is killed outright forwards nothing. Its
ranks would train on, in a folder that whoever starts the run again cannot have, and could not even
save: they meet in torchrun's store.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

__all__ = ["end_with_torchrun"]

PR_SET_PDEATHSIG = 1


def end_with_torchrun() -> None:
    """Be killed when torchrun ends, however it ends; at once where it has. To be called first, as
    loading takes seconds.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # An orphan is the first process's child. In a container that process may be torchrun itself.
    if os.getppid() == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes():
        os._exit(75)
