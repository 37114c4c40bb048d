"""A pool that is kept as a fleet is: servers join when they answer, and leave when they are gone.

Each server that the fleet lists has a task here from then on: it asks until the server answers,
lets it join, and lets it leave when the list no longer has it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress

import anyio
import anyio.abc

from engine.backends.base import Backend
from engine.backends.fleet import FileFleet, Fleet
from engine.errors import (
    ConfigError,
    InternalError,
    UnavailableError,
    WoolmillError,
    first_known,
)
from engine.limits import Pool
from engine.run.changed import Changed
from engine.settings import EMBEDDED_MODEL, RunConfig

__all__ = ["Keeper", "make_fleet"]

ASKED_EVERY_S = 2.0
"""How often a server that does not answer yet, or may not join, is asked again."""


def make_fleet(config: RunConfig, note: Callable[[str], None]) -> Fleet | None:
    """The fleet that the settings name; None: the servers are given once and for all.

    Raises ConfigError.
    """
    if config.endpoints_file is not None:
        return FileFleet(config.endpoints_file)
    if config.ray is not None:
        from engine.backends.vllm.ray_fleet import RayFleet

        return RayFleet(
            config.ray,
            config.model or EMBEDDED_MODEL,
            python=config.vllm_python,
            replicas=config.replicas,
            args=config.vllm_arg,
            log_file=config.out / "ray.log",
            note=note,
        )
    return None


class Keeper:
    """Keeps a pool as its fleet is, in a task of its own from ``begin`` to ``aclose``.

    Args:
        fleet: which servers there are.
        pool: empty; gets them.
        make: the backend of a server by its URL and the model's name, where that is known.
        note: tells the person.
    """

    def __init__(
        self,
        fleet: Fleet,
        pool: Pool,
        make: Callable[[str, str | None], Backend],
        note: Callable[[str], None],
    ) -> None:
        self._fleet = fleet
        self._pool = pool
        self._make = make
        self._note = note
        self.prepare: Callable[[Backend], None] = lambda _backend: None
        """Called with each server when it joins, before it is asked anything."""
        self._model: str | None = None
        """Of the first that joined."""
        self._listed: dict[str, anyio.Event] = {}
        """Set when the server is no longer listed."""
        self._failures: dict[str, WoolmillError] = {}
        """Why those that are listed have not joined."""
        self._ended: WoolmillError | None = None
        """Why no server will ever join again."""
        self._changed = Changed()
        self._task: asyncio.Task[None] | None = None
        fleet.on_change = self._changed.set

    async def begin(self, wait_s: float) -> None:
        """Return as soon as one server has joined; others join later.

        Raises ConfigError or UnavailableError where none has within ``wait_s`` seconds, or without
        a limit of time where the fleet starts its servers and none will come.
        """
        self._task = asyncio.create_task(self._run(), name="woolmill-fleet")
        patience_s = math.inf if self._fleet.starts_servers else wait_s
        if wait_s and not self._fleet.urls and not self._fleet.starts_servers:
            self._note(f"{self._fleet.name} lists no server yet; waiting up to {wait_s:g} s")
        with anyio.move_on_after(patience_s):
            await self._changed.until(self._is_settled)
        await self._changed.until(lambda: self._is_settled() or self._all_failed())
        if self._pool.backends:
            return
        refused = [e for e in self._failures.values() if isinstance(e, ConfigError)]
        raise next(
            (e for e in (self._ended, *refused, *self._failures.values()) if e is not None),
            UnavailableError(
                f"{self._fleet.name}: lists no server, or is not there; start some, or let the run "
                "wait for them with --wait-for-server"
            ),
        )

    async def aclose(self) -> None:
        """Follow the fleet no longer; its own servers end."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self._fleet.aclose()

    def _is_settled(self) -> bool:
        return bool(self._pool.backends) or self._ended is not None

    def _all_failed(self) -> bool:
        return self._failures.keys() >= set(self._fleet.urls)

    async def _run(self) -> None:
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._fleet.run)
                while True:
                    self._follow(tasks)
                    await self._changed.wait()
        except* Exception as errors:  # noqa: BLE001 - whatever it is, the run ends by it
            self._end(first_known(errors) or InternalError.of(errors.exceptions[0]))

    def _follow(self, tasks: anyio.abc.TaskGroup) -> None:
        urls = set(self._fleet.urls)
        for url in self._listed.keys() - urls:
            self._listed.pop(url).set()
        for url in urls - self._listed.keys():
            gone = self._listed[url] = anyio.Event()
            tasks.start_soon(self._look_after, url, gone)
        if self._fleet.ended is not None and self._ended is None:
            self._end(self._fleet.ended)

    def _end(self, error: WoolmillError) -> None:
        self._ended = error
        self._pool.end(error)
        self._changed.set()

    async def _look_after(self, url: str, gone: anyio.Event) -> None:
        """One server, from when it is listed until it is not."""
        backend = None
        while backend is None and not gone.is_set():
            try:
                backend = await self._joined(url)
            except WoolmillError as error:
                self._say(url, error)
                self._changed.set()
                with anyio.move_on_after(ASKED_EVERY_S):
                    await gone.wait()
        self._failures.pop(url, None)
        self._changed.set()
        if backend is not None:
            await gone.wait()
            self._note(f"{backend.name} has left; what was in flight there is asked elsewhere")
            await self._pool.leave(backend)

    async def _joined(self, url: str) -> Backend:
        """The server's backend, at work. Raises what ``Pool.join`` does."""
        backend = self._make(url, self._model)
        others = len(self._pool.backends)
        await self._pool.join(backend)
        self.prepare(backend)
        self._model = self._model or backend.model
        if others:
            self._note(f"{backend.name} has joined")
        return backend

    def _say(self, url: str, error: WoolmillError) -> None:
        """Tell once that a server may not join; that one does not answer yet is no news."""
        known = self._failures.get(url)
        self._failures[url] = error
        if self._pool.backends and isinstance(error, ConfigError) and str(error) != str(known):
            self._note(f"{error}; it gets no work")
