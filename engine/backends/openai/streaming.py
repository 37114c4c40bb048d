"""Whether the next answer of a host is asked for as a stream or whole.

Whole answers cost far less CPU than streams (one event a token), but say nothing while they are
made. By default it is a matter of load: with few in flight all are streamed, which gives the time
to the first token and shows that the engine behind a healthy port still generates; beyond, all are
asked for whole. Where one of those never came, more are streamed for a while: a silence then costs
its slot the time-out of a stream, not that of a whole answer.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["Streaming"]

BELOW, BELOW_IN_DOUBT = 64, 256
"""Requests in flight below which answers are streamed; the second where a time-out makes the server
doubtful.
"""
IN_DOUBT = 1000
"""Answers after a time-out for which it is."""


class Streaming:
    """The choice for one host; ``choice`` is the user's, or ``"auto"``."""

    def __init__(self, choice: bool | Literal["auto"]) -> None:
        self._choice = choice
        self._in_doubt = 0

    def wanted(self, in_flight: int) -> bool:
        """Whether to stream the next answer, with so many in flight."""
        below = BELOW_IN_DOUBT if self._in_doubt else BELOW
        return self._choice is True or (self._choice == "auto" and in_flight < below)

    def answered(self) -> None:
        """An answer came."""
        self._in_doubt = max(self._in_doubt - 1, 0)

    def timed_out(self) -> None:
        """One never came."""
        self._in_doubt = IN_DOUBT
