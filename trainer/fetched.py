"""Models that ``woolmill models fetch`` has brought onto this machine, by their short names.

The trainer knows where they lie and nothing else of the program that put them there.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import ConfigError

__all__ = ["located"]

NAMES = ("smollm2",)
"""Short names that mean a fetched model, and no model of that name elsewhere."""


def located(model: str) -> str:
    """The folder of a fetched model; any other name as it is. Write ``./smollm2`` for a folder of
    that name here.

    Raises:
        ConfigError: the model was not fetched yet.
    """
    if model not in NAMES:
        return model
    for home in _homes():
        folder = home / "models" / model
        if (folder / "config.json").is_file():
            return str(folder)
    raise ConfigError(
        f"the model {model} is not here yet; get it with: woolmill models fetch {model}"
    )


def _homes() -> Iterator[Path]:
    """``$WOOLMILL_HOME`` alone where it is set, else the user's cache, then a folder among the
    temporary files, for users without a home.
    """
    if own := os.environ.get("WOOLMILL_HOME"):
        yield Path(own).expanduser()
        return
    shared = os.environ.get("XDG_CACHE_HOME", "")
    yield Path(shared if os.path.isabs(shared) else os.path.expanduser("~/.cache"), "woolmill")
    temporary = Path(tempfile.gettempdir(), f"woolmill-{os.geteuid()}")
    # Anybody may have put a folder of this name there.
    if temporary.is_dir() and not temporary.is_symlink():
        if temporary.stat().st_uid == os.geteuid() and not temporary.stat().st_mode & 0o022:
            yield temporary
