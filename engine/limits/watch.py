"""Watching servers while they work: whether they have gone silent, and what their gauges say."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping

from engine.backends.base import Backend
from engine.limits.endpoint import Endpoint

__all__ = ["watch"]

LOOK_EVERY_S = 1.0
FEW, TURNS = 16, 5
"""Of more servers than the first, each is asked for its gauges only once in so many looks: a page
of them is up to 100 kB."""


async def watch(endpoints: Mapping[Backend, Endpoint]) -> AsyncIterator[list[Endpoint]]:
    """Look at those that can be watched once a second, for ever; gives them after each look.

    Their gauges are to be had only by asking: all at the same time, so that none waits for one that
    hangs.
    """
    for look in itertools.count():
        await asyncio.sleep(LOOK_EVERY_S)
        watched = [each for each in endpoints.values() if each.server is not None]
        for endpoint in watched:
            endpoint.look()
        turns = 1 if len(watched) <= FEW else TURNS
        await asyncio.gather(*[each.read_gauges() for each in watched[look % turns :: turns]])
        yield watched
