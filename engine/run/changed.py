"""What the tasks of a run wait for: that something has changed."""

from __future__ import annotations

from collections.abc import Callable

import anyio

__all__ = ["Changed"]


class Changed:
    """Wakes whoever waits for something to change; costs nothing while nobody does."""

    def __init__(self) -> None:
        self._event: anyio.Event | None = None

    def set(self) -> None:
        if self._event is not None:
            self._event.set()
            self._event = None

    async def wait(self) -> None:
        if self._event is None:
            self._event = anyio.Event()
        await self._event.wait()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.wait()
