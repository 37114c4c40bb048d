"""What those who start other processes need."""

from __future__ import annotations

import os
import re
import signal

__all__ = ["environment_without_keys", "how_it_ended"]

_SECRET = re.compile(r"KEY|SECRET|PASSWORD|CREDENTIAL|TOKEN(?!IZERS)", re.IGNORECASE)


def environment_without_keys() -> dict[str, str]:
    """The environment for a process that calls nobody but the hub that models come from."""
    return {
        name: value
        for name, value in os.environ.items()
        if name == "HF_TOKEN" or not _SECRET.search(name)
    }


def how_it_ended(status: int | None) -> str:
    """How a process ended, from its status as ``subprocess`` or a shell tells it."""
    if status is not None and status > 128:
        status = 128 - status
    if status is None or status >= 0:
        return f"with status {status}"
    try:
        return f"by {signal.Signals(-status).name}"
    except ValueError:
        return f"by signal {-status}"
