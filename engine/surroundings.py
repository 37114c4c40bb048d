"""What this process finds around itself: cores, a place for its caches, and how much it may open.

A container that runs as some number (``docker --user``) has no home and no name; a service may have
a home that it cannot write to. Neither is a reason to stop: there is a folder for temporary files.
"""

from __future__ import annotations

import os
import resource
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.errors import OutputError

__all__ = [
    "allow_open_files",
    "cache_homes",
    "cores",
    "is_private",
    "spelt_out",
    "writable_cache_home",
]


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_homes() -> Iterator[Path]:
    """Where woolmill looks for what it can get again, the first choice first: ``$WOOLMILL_HOME``
    alone where it is set, else ``$XDG_CACHE_HOME/woolmill`` or ``~/.cache/woolmill``, then a folder
    of this user's among the temporary files. They need not exist.
    """
    if own := os.environ.get("WOOLMILL_HOME"):
        yield Path(os.path.expanduser(own))
        return
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(shared):  # as its specification asks
        shared = os.path.expanduser("~/.cache")
    if os.path.isabs(shared):  # else there is no home
        yield Path(shared, "woolmill")
    temporary = Path(tempfile.gettempdir(), f"woolmill-{os.geteuid()}")
    if is_private(temporary):
        yield temporary


def writable_cache_home() -> Path:
    """The first of ``cache_homes`` that can be written to; it is made where it is not there.

    Raises OutputError where there is none.
    """
    tried = None
    for folder in cache_homes():
        tried = tried or folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if _can_write(folder):
            return folder
    raise OutputError(
        f"cannot write {tried or 'anywhere'}; set WOOLMILL_HOME to a folder with 1 GB free"
    )


MOST_OPEN_FILES = 65_536
"""Enough for any run, and few enough for programs that go through all there could be."""


def allow_open_files() -> None:
    """Raise this process's limit of open files as far as it may without being asked: the usual
    1,024 are fewer than the connections of a run on a few servers.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        with suppress(OSError, ValueError):  # as in some containers: then it is as it was
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def spelt_out(value: Any) -> Any:
    """``value`` with each byte of a file's name that is not UTF-8 spelt out as ``\\udcff``, in
    texts, lists and mappings: JSON has no form for it.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list | tuple):
        return [spelt_out(item) for item in value]
    if isinstance(value, Mapping):
        return {name: spelt_out(item) for name, item in value.items()}
    return value


def is_private(folder: Path) -> bool:
    """Whether ``folder`` is this user's and no other can write there; it is made where it is not
    there. No link in its place is followed.
    """
    try:
        if not os.path.lexists(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.geteuid()
        and not found.st_mode & 0o022
        and _can_write(folder)
    )


def _can_write(folder: Path) -> bool:
    """As the one who asks, also where that is not the user who started the program."""
    effective = os.access in os.supports_effective_ids
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=effective)
