"""Which requests go in a batch, which go live, and when: batches for the bulk, live for the tail.

A batch takes hours, so it leaves only when it is known how large it must be: when every answer that
is here is decided, and what is wanted has not changed for a moment. The first batch is sized by the
most that an answer can hold, the next by the yield, so few answers are paid in vain. What is left
then, a few per cent, is not worth another day: it goes live where there is a host for it.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["SETTLE_S", "Route", "Way"]

SETTLE_S = 0.5
"""How long what is wanted must stay the same: a stage's input comes in pieces."""
TAIL = 0.05
"""Share of all requests that the run takes, as far as is known, up to which they go live."""
TAIL_AT_LEAST = 16
"""Requests that go live whatever their share: a batch of hours is not worth so few."""

Way = Literal["live", "batch", "wait"]


class Route:
    """Decides for one stage.

    Args:
        live: the tail may go to a host.
        scouts: the first request of all goes live and alone, so that what the host refuses of it is
            learnt before it stands in fifty thousand lines.
    """

    def __init__(self, *, live: bool, scouts: bool) -> None:
        self._live = live
        self._scout: Literal["due", "out", "back"] = "due" if live and scouts else "back"
        self._wanted = 0
        self._since_s = float("-inf")
        self._in_tail = False

    @property
    def scouting(self) -> bool:
        """No more than one request may go."""
        return self._scout == "due"

    def sent_live(self) -> None:
        """A request went live."""
        if self._scout == "due":
            self._scout = "out"

    def answered(self) -> None:
        """An answer is here."""
        self._scout = "back"

    def choose(self, wanted: int, expected: int, *, quiet: bool, now_s: float) -> Way:
        """The way of the next requests.

        Args:
            wanted: how many may go now.
            expected: requests that the run takes in all, as far as is known.
            quiet: nothing that is here waits to be decided.
        """
        if wanted != self._wanted:
            self._wanted, self._since_s = wanted, now_s
        if wanted <= 0 or self._scout == "out":
            return "wait"
        if self._scout == "due":
            return "live"
        few = self._live and wanted <= max(TAIL * expected, TAIL_AT_LEAST)
        if self._in_tail and few:
            return "live"
        self._in_tail = False
        if not quiet or now_s - self._since_s < SETTLE_S:
            return "wait"
        self._in_tail = few
        return "live" if few else "batch"
