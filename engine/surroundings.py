"""What this process finds around itself: a place for its caches, or none.

A container that runs as some number (``docker --user``) has no home and no name; a service may have
a home that it cannot write to. Neither is a reason to stop: only what must be kept needs a place.
"""

from __future__ import annotations

import os
from pathlib import Path

from engine.errors import ConfigError

__all__ = ["cache_home"]


def cache_home() -> Path:
    """Where woolmill keeps what it can get again: ``$WOOLMILL_HOME``, else
    ``$XDG_CACHE_HOME/woolmill``, else ``~/.cache/woolmill``. It need not exist.

    Raises ConfigError where this user has no home either.
    """
    try:
        if own := os.environ.get("WOOLMILL_HOME"):
            return Path(own).expanduser()
        shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if shared.is_absolute():  # as its specification asks
            return shared / "woolmill"
        return Path.home() / ".cache" / "woolmill"
    except RuntimeError as error:
        raise ConfigError(
            "this user has no home folder to keep models in; set WOOLMILL_HOME to a folder"
        ) from error
