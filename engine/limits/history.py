"""Why a limit is where it is: each change with the time, the old and the new number, who asked for
it and why. The live view shows the latest reason, the log and the run's store have the changes.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable
from enum import Enum
from typing import Any, NamedTuple

__all__ = ["KEPT", "Change", "History", "News", "Witness"]

log = logging.getLogger(__name__)

KEPT = 200
"""Changes that are remembered of each limit; a run that goes well makes a few dozen."""


class Witness(Enum):
    """Who asked for a change."""

    SETTINGS = "settings"
    START = "start"
    REFUSALS = "refusals"
    GOODPUT = "goodput"
    GAUGES = "gauges"


class Change(NamedTuple):
    """A limit became another number, for a reason."""

    at_s: float
    """Unix time."""
    old: int
    new: int
    who: Witness
    why: str
    """A short clause without an end, such as ``refused with 7 in flight``."""

    def plain(self, endpoint: str) -> dict[str, Any]:
        """As JSON values, for events and the store."""
        return {
            "endpoint": endpoint,
            "at_s": round(self.at_s, 3),
            "old": self.old,
            "new": self.new,
            "who": self.who.value,
            "why": self.why,
        }


class History:
    """The latest changes of one limit."""

    def __init__(self, who: Witness, why: str) -> None:
        self.name = ""
        """The endpoint's, for the log."""
        self.who = who
        self.why = why
        """The latest reason, whether or not it changed the number."""
        self.count = 0
        """Of all changes, those forgotten included."""
        self.changes: deque[Change] = deque(maxlen=KEPT)

    def note(self, old: float, new: float, who: Witness, why: str) -> None:
        """The limit is ``new`` because of ``why``. Where the whole number is the same, that is no
        change.
        """
        self.who, self.why = who, why
        if int(old) == int(new):
            return
        self.count += 1
        self.changes.append(Change(time.time(), int(old), int(new), who, why))
        log.debug(
            "%s: limit %d -> %d in flight (%s: %s)", self.name, old, new, who.value, why
        )  # fmt: skip

    def since(self, count: int) -> list[Change]:
        """Those after the first ``count``, as far as they are remembered."""
        new = min(self.count - count, len(self.changes))
        return list(self.changes)[len(self.changes) - new :] if new else []


class News:
    """What changed at some limits since it was last asked."""

    def __init__(self) -> None:
        self._seen: dict[History, int] = {}

    def of(self, histories: Iterable[History]) -> list[tuple[str, Change]]:
        """(endpoint, change) of each, in the order of time."""
        found = []
        for history in histories:
            if history.count != (seen := self._seen.get(history, 0)):
                self._seen[history] = history.count
                found += [(history.name, change) for change in history.since(seen)]
        return sorted(found, key=lambda pair: pair[1].at_s)
