"""Fleets: servers that come and go while a run goes on, and a file that lists them.

A fleet says which servers there are now; ``engine.run.fleet`` keeps the pool as the fleet is. A
list and no events: whatever was missed meanwhile, the next look is right.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import anyio
from anyio import to_thread

from engine.backends.openai.address import read_address
from engine.errors import ConfigError, WoolmillError
from engine.secrets import Secret

__all__ = ["FileFleet", "Fleet", "listed"]

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
MAX_LIST_BYTES = 2**20


class Fleet(Protocol):
    """Servers of one model that come and go.

    Attributes:
        name: for people.
        starts_servers: it brings them up itself, so that the first one is waited for however long
            its model loads.
        ended: why none will ever come again; None while some may.
        on_change: called when ``urls`` or ``ended`` has changed.
    """

    name: str
    starts_servers: bool
    ended: WoolmillError | None
    on_change: Callable[[], None]

    @property
    def urls(self) -> Sequence[str]:
        """Of the servers that there are now, each a base URL."""

    @property
    def key(self) -> Secret | None:
        """What all of them ask for; None: the one of the settings."""

    async def run(self) -> None:
        """Follow the servers until cancelled."""

    async def aclose(self) -> None:
        """Release what ``run`` took; servers of its own end. Never raises."""


class FileFleet:
    """The servers that a file lists: a URL a line; what follows a ``#`` is not read.

    Looked at once a second. A change counts when two looks in a row have found the same, so that a
    file which is only half written is not believed. A file that is gone, or that holds what is no
    URL, changes nothing and is complained of once.

    Raises ConfigError where a line is no URL.
    """

    starts_servers = False
    key: Secret | None = None
    ended: WoolmillError | None = None

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.on_change: Callable[[], None] = lambda: None
        self._path = path
        self._taken = _read(path)
        self.urls: Sequence[str] = listed(path, self._taken or b"")

    async def run(self) -> None:
        """See ``Fleet``."""
        before = self._taken
        while True:
            await anyio.sleep(LOOK_EVERY_S)
            now = await to_thread.run_sync(_read, self._path)
            if now == before != self._taken:
                self._take(now)
            before = now

    async def aclose(self) -> None:
        """Nothing to release."""

    def _take(self, data: bytes | None) -> None:
        self._taken = data
        try:
            if data is None:
                raise ConfigError(f"{self.name}: cannot be read")
            self.urls = listed(self._path, data)
        except ConfigError as error:
            log.warning("%s; going on with the servers that it listed before", error)
        else:
            self.on_change()


def _read(path: Path) -> bytes | None:
    """What the file holds; None where it cannot be read, as before anybody has written it."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_LIST_BYTES + 1)
    except OSError:
        return None


def listed(path: Path, data: bytes) -> list[str]:
    """The servers of a list, each once. Raises ConfigError."""
    if len(data) > MAX_LIST_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_LIST_BYTES >> 20} MiB; is it a list of URLs?")
    found: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8-sig", "replace").splitlines(), 1):
        if url := line.partition("#")[0].strip():
            try:
                found.setdefault(read_address(url).name, url)
            except ConfigError as error:
                said = str(error).removeprefix("--base-url: ")
                raise ConfigError(f"{path}:{number}: {said}") from error
    return list(found.values())
