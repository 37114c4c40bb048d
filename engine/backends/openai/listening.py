"""Streams while they come: how long each may be silent, and how far all of them are.

The end of a stream's body is its end. ``[DONE]`` is asked for only where the choices do not say by
themselves that they are finished.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

import httpx

from engine.backends.base import Failure, Verdict
from engine.backends.openai.deadlines import Deadlines
from engine.backends.openai.exchange import pieces
from engine.backends.openai.reply import Events, Reply, Unpacker

__all__ = ["Listening", "Timeouts"]

SILENCE_S = 60.0
"""No event from any of the streams in flight for so long: the engine hangs behind its port."""
MAX_EVENT_BYTES = 2**20
"""Of one event of a stream, which carries a token or a few."""
DONE_S = 1.0
"""How long a stream that says that it is done may take to end."""
FINISHED_S = 5.0
"""How long a stream may be silent once its choices are finished, for counts to come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long one attempt may take, in seconds."""

    connect_s: float = 5.0
    first_token_s: float = 120.0
    """Silence before a stream's first token; each event is a sign of life. Includes the server's
    own queue.
    """
    idle_s: float = 30.0
    """Silence within a stream, from the first token on."""
    total_s: float = 600.0
    """The whole attempt, however busy it looks."""


class Listening:
    """What is heard of one host's answers."""

    def __init__(self, timeouts: Timeouts) -> None:
        self.calls = Deadlines()
        """The calls under way."""
        self.heard_at_s = 0.0
        """Loop time when the host last sent anything for a generation."""
        self.hung_after_s = timeouts.total_s
        """Silence of everything in flight that means that its engine hangs. Whole answers are
        silent to their end, so this is known only once a stream has spoken."""
        self._timeouts = timeouts
        self._open: set[Reply] = set()
        """Streams that are not at their end."""

    @property
    def tokens(self) -> int:
        """Of the answers that are streamed; about one for each of their events."""
        return sum(reply.pieces for reply in self._open)

    async def read(
        self,
        response: httpx.Response,
        answer: Reply,
        unpack: Unpacker,
        began_s: float,
        call: asyncio.Timeout,
    ) -> Reply:
        """Read a stream into ``answer``, and move the end of ``call`` with each sign of life.
        Raises Failure where it has no end.
        """
        events = Events(answer, MAX_EVENT_BYTES)
        loop, end_s = asyncio.get_running_loop(), began_s + self._timeouts.total_s
        self._open.add(answer)
        try:
            coming = aiter(pieces(response))
            async for piece in coming:
                events.feed(unpack(piece))
                self.heard_at_s = now_s = loop.time()
                if answer.ttft_s is None and answer.started:
                    answer.ttft_s = now_s - began_s
                    self.hung_after_s = SILENCE_S
                if answer.done:
                    await _let_end(coming)
                    break
                self.calls.set(call, min(now_s + self._silence_s(answer), end_s))
        finally:
            self._open.discard(answer)
        events.end()
        if answer.error is None and not answer.done and None in answer.finish:
            message = "the stream has no end"
            raise Failure(Verdict(kind="ambiguous", reason="cut_body", message=message))
        return answer

    def _silence_s(self, answer: Reply) -> float:
        """How long the next event may take."""
        timeouts = self._timeouts
        silence_s = timeouts.first_token_s if answer.ttft_s is None else timeouts.idle_s
        # Counts may follow what is finished, and that is all.
        return min(silence_s, FINISHED_S) if answer.finished else silence_s


async def _let_end(coming: AsyncIterator[bytes]) -> None:
    """Wait a moment for the end of a stream that said ``[DONE]``, so that its connection can be
    kept. Nothing that comes now is of use.
    """
    with suppress(TimeoutError, httpx.TransportError):
        async with asyncio.timeout(DONE_S):
            async for _ in coming:
                pass
