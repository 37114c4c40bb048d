"""How many requests one endpoint may have in flight: what the pool asks and tells, and the keeper
of a number that is given. ``engine.limits.finder.finder`` finds one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from engine.limits.finder.chance import Chance
from engine.limits.history import History, Witness

__all__ = ["Controller", "Fixed", "Ticket", "concerns_all"]

PAUSE_S, MAX_PAUSE_S = 0.25, 30.0
"""Without Retry-After: the silence after a refusal, doubled by each episode in a row."""
OBEYED_S = 2.0
"""A server that asks for a longer wait is left alone by all, whether it was chance or not."""


@dataclass(slots=True)
class Ticket:
    """What an admitted request carries until its end."""

    at_s: float
    area: float
    in_flight: int
    """Itself included."""
    number: int = 0
    """Which one it is of all that went out, counted from one."""
    refused: int = 0
    """How many had been refused by then."""


class Controller(Protocol):
    """The limit of one endpoint. All times are seconds of one monotonic clock.

    ``admit`` is called when a request goes out, and exactly one of ``complete``, ``refuse`` and
    ``fail`` when it ends.
    """

    history: History
    """How the limit came to be what it is."""

    @property
    def paused_until_s(self) -> float:
        """The server wants silence until then."""

    def limit(self, now_s: float) -> float:
        """How many may be in flight."""

    def has_room(self, now_s: float) -> bool:
        """Whether one more may go out now."""

    def next_change_s(self, now_s: float) -> float | None:
        """When there may be room by the passing of time alone; None: only when something ends."""

    def admit(self, now_s: float) -> Ticket:
        """One more is in flight."""

    def fail(self, now_s: float) -> None:
        """It ended by a fault, which says nothing about the limit."""

    def complete(self, ticket: Ticket, now_s: float, tokens: int) -> None:
        """It ended with an answer of ``tokens``."""

    def refuse(self, ticket: Ticket, now_s: float, retry_after_s: float | None) -> None:
        """It ended with 429 or the like."""

    def observe(self, now_s: float, running: float, waiting: float, preemptions: float) -> None:
        """The server's own gauges, about once a second."""


def concerns_all(others: int, retry_after_s: float | None) -> bool:
    """Whether a refusal that may be chance holds back more than its own request: the wait is long,
    or no others are in flight that may show that the server answers them.
    """
    return not others or (retry_after_s or 0.0) > OBEYED_S


class Fixed:
    """The controller of a number that is given: that many, but for the pauses that refusals ask
    for.
    """

    def __init__(self, most: int) -> None:
        self.paused_until_s = 0.0
        self.history = History(Witness.SETTINGS, "")
        self._most = most
        self._in_flight = self._sent = 0
        self._chance = Chance()
        self._paused_s: float | None = None
        self._answered = True
        self._streak = 0

    def limit(self, now_s: float) -> float:
        return self._most

    def has_room(self, now_s: float) -> bool:
        return now_s >= self.paused_until_s and self._in_flight < self._most

    def next_change_s(self, now_s: float) -> float | None:
        return self.paused_until_s if now_s < self.paused_until_s else None

    def admit(self, now_s: float) -> Ticket:
        self._in_flight += 1
        self._sent += 1
        return Ticket(now_s, 0.0, self._in_flight, self._sent)

    def fail(self, now_s: float) -> None:
        self._in_flight -= 1

    def complete(self, ticket: Ticket, now_s: float, tokens: int) -> None:
        self.fail(now_s)
        if self._paused_s is None or ticket.at_s >= self._paused_s:
            self._answered = True

    def refuse(self, ticket: Ticket, now_s: float, retry_after_s: float | None) -> None:
        self.fail(now_s)
        proof = self._chance.refused(ticket.number)
        self._chance.excuse(proof)  # the number is not ours to lower
        if not proof and not concerns_all(self._in_flight, retry_after_s):
            return
        if self._paused_s is None or ticket.at_s >= self._paused_s:  # not of the same wave
            self._streak = 0 if self._answered else min(self._streak + 1, 16)
            self._paused_s, self._answered = now_s, False
        pause_s = min(PAUSE_S * 2.0**self._streak, MAX_PAUSE_S)
        if retry_after_s is not None:
            pause_s = retry_after_s
        self.paused_until_s = max(self.paused_until_s, now_s + pause_s)

    def observe(self, now_s: float, running: float, waiting: float, preemptions: float) -> None:
        """What is given is not changed."""
