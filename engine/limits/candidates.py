"""Which endpoint is next, at a price that does not grow with their number.

An endpoint that was found without room is put aside until a time that it names, or until something
ends there; so whoever looks for room meets it once and not at each request. Among those that may
have room, up to sixteen are all compared and of more a few drawn by chance: the fullest of many is
then hardly ever chosen, which is all that a balance needs.
"""

from __future__ import annotations

import heapq
import math
import random

from engine.backends.base import Backend
from engine.limits.endpoint import Endpoint

__all__ = ["Candidates"]

FEW = 16
DRAWN = 4
"""Of more than that. Two are enough for a balance; more find the best sooner while few are free."""
AVOIDED = 1e6
"""What is added to the load of an endpoint that is to be taken last."""


class Candidates:
    """The endpoints that work may be given to."""

    def __init__(self) -> None:
        self._ready: list[Endpoint] = []
        """They may have room."""
        self._places: dict[Endpoint, int] = {}
        """Where in that list."""
        self._aside: dict[Endpoint, float] = {}
        """They had none; when that may change by itself."""
        self._returns: list[tuple[float, int, Endpoint]] = []
        """The same, the soonest first. An entry that no longer holds is dropped when it is met."""
        self._entries = 0

    def add(self, endpoint: Endpoint) -> None:
        """It may have room: it is new, or something has changed there."""
        if endpoint not in self._places:
            self._aside.pop(endpoint, None)
            self._places[endpoint] = len(self._ready)
            self._ready.append(endpoint)

    def remove(self, endpoint: Endpoint) -> None:
        self._aside.pop(endpoint, None)
        if (place := self._places.pop(endpoint, None)) is not None:
            last = self._ready.pop()
            if last is not endpoint:
                self._ready[place] = last
                self._places[last] = place

    def next(self, now_s: float, tokens: int, avoid: Backend | None) -> Endpoint | None:
        """The least loaded that has room for ``tokens``, or of many one as good; None: none has."""
        self._take_back(now_s)
        while self._ready:
            all_of_them = len(self._ready) <= FEW
            best = self._least(self._some(), now_s, tokens, avoid)
            if best is not None and (all_of_them or best.backend is not avoid):
                return best
        return None

    def next_change_s(self) -> float:
        """When one that is put aside may have room again by the passing of time; infinity: none."""
        while self._returns and not self._holds(self._returns[0]):
            heapq.heappop(self._returns)
        return self._returns[0][0] if self._returns else math.inf

    def _some(self) -> list[Endpoint]:
        ready = self._ready
        if len(ready) <= FEW:
            return list(ready)
        return [ready[int(random.random() * len(ready))] for _ in range(DRAWN)]

    def _least(
        self, some: list[Endpoint], now_s: float, tokens: int, avoid: Backend | None
    ) -> Endpoint | None:
        best, least = None, math.inf
        for endpoint in some:
            room_at_s = endpoint.blocked(now_s, tokens)
            if room_at_s is not None:
                self._put_aside(endpoint, room_at_s)
                continue
            load = endpoint.load(now_s) + (AVOIDED if endpoint.backend is avoid else 0.0)
            if load < least:
                best, least = endpoint, load
        return best

    def _put_aside(self, endpoint: Endpoint, until_s: float) -> None:
        self.remove(endpoint)
        self._aside[endpoint] = until_s
        if until_s < math.inf:
            self._entries += 1
            heapq.heappush(self._returns, (until_s, self._entries, endpoint))

    def _take_back(self, now_s: float) -> None:
        while self.next_change_s() <= now_s:
            self.add(heapq.heappop(self._returns)[2])

    def _holds(self, entry: tuple[float, int, Endpoint]) -> bool:
        return self._aside.get(entry[2]) == entry[0]
