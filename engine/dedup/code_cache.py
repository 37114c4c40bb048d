"""Compiled machine code, kept from one process to the next and never older than its source.

Numba keeps a function's code for as long as the function's own file is unchanged. But the code has
the functions that it calls inlined, so that a change in their file must compile it again too. The
folder here is therefore named by the hash of every source file of this package. What numba keeps is
a pickle, so a folder that others could write to is not used; without a folder each process compiles
for itself, which takes some seconds.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator

from engine.surroundings import cache_homes, is_private

__all__ = ["compiled", "folder"]

log = logging.getLogger(__name__)

UNUSED_S = 30 * 86_400.0
"""A folder of other sources is removed when nothing has used it for so long."""

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """``function`` as machine code, made at its first call or read from the cache."""
    dispatcher = numba.njit(nogil=True)(function)
    if folder() is not None:
        dispatcher._cache = _Cache(function)  # as numba's own cache=True does
    return cast(Function, dispatcher)


@cache
def folder() -> Path | None:
    """Where this package's code is kept; None where there is no safe place."""
    sources = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    given = os.environ.get("NUMBA_CACHE_DIR")
    for parent in [Path(given)] if given else (home / "kernels" for home in cache_homes()):
        path = parent / f"woolmill-{sources.hexdigest()[:20]}"
        is_new = not path.exists()
        if is_private(path):
            if is_new:
                _remove_unused(parent)
            with suppress(OSError):
                os.utime(path)
            return path
        log.info("%s: not this user's alone to write; compiled code is not kept there", path)
    return None


@cache
def _say_compiling() -> None:
    """Once in a process: what would look like a hang."""
    kept = "and is kept for later runs" if folder() else "in every process"
    log.info("compiling the search for near-duplicates; this takes some seconds, %s", kept)


def _remove_unused(parent: Path) -> None:
    """Remove the code of sources that nobody has run for long."""
    for path in parent.glob("woolmill-*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > UNUSED_S:
                shutil.rmtree(path)


class _Locator(_CacheLocator):  # type: ignore[misc]
    """Tells numba where a function's code is, and of which source it is."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._line = function.__code__.co_firstlineno

    def get_cache_path(self) -> str:
        return str(folder())

    def get_source_stamp(self) -> str:
        return str(folder())

    def get_disambiguator(self) -> str:
        return str(self._line)

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> _Locator:
        return cls(py_func)


class _Kept(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Locator,)


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of one function; what goes wrong with a file costs time and nothing else."""

    _impl_class = _Kept

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
            if found is None:
                _say_compiling()
            return found
        except Exception as error:  # noqa: BLE001 - whatever unpickling a damaged file raises
            log.debug("%s cannot be used: %r", self.cache_path, error)
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            log.debug("compiled code is not kept: %s", error)
