"""What the tasks of a run wait for: a change, or their turn to make a call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import anyio

from engine.limits import Lease
from engine.records import Prompt

__all__ = ["Changed", "Turn"]


@dataclass(slots=True, eq=False)
class Turn:
    """What a call is made of, for the task that waits to make it."""

    recorded: asyncio.Future[None]
    prompts: Sequence[Prompt] = ()
    """None of them: there will be no other call."""
    lease: Lease | None = None
    alone: bool = False
    """A scout: no other call that goes alone may go before it has come to its end."""


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
