"""One HTTP/1.1 connection: an ``asyncio.Protocol`` with httptools, Node's parser, for the bytes.

Strict about the end: a body shorter than its Content-Length, or a chunked body without its last
chunk, is an error, never a short answer. And bounded: whatever a server sends, no more is held than
the constants here allow.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Protocol, cast

import httptools
import httpx

__all__ = ["SOCKET_OPTIONS", "Body", "Connection", "Origin"]

MAX_HEAD_BYTES = 65_536
"""Status line and headers; no API sends more, and a server that does is broken or hostile."""
MOST_FRAMING = 16
"""Bytes received for each byte of the body, at most: chunks of a single byte take six."""
PAUSE_BYTES = 262_144
"""Unread body held for one response before the socket is left to wait."""
VANISHED_S, PROBED_AFTER_S, PROBED_EVERY_S = 15, 5, 3
"""A host that vanishes without a word (power, cable, a node that is taken away) closes nothing. The
kernel asks for a sign of life from the second on; after the first, a connection without one fails.
"""
SOCKET_OPTIONS = [
    (level, getattr(socket, name), value)
    for level, name, value in (
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", PROBED_AFTER_S),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", PROBED_EVERY_S),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", (VANISHED_S - PROBED_AFTER_S) // PROBED_EVERY_S),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", VANISHED_S * 1000),  # for what was just sent
    )
    if hasattr(socket, name)  # other systems lack some
]

Origin = tuple[str, str, int | None]
"""Scheme, host, port."""


class Keeper(Protocol):
    """Whoever opened connections, and keeps them between requests."""

    def opened(self, connection: Connection) -> None: ...

    def closed(self, connection: Connection) -> None:
        """It is not to be used any more. May be said twice."""

    def give_back(self, connection: Connection) -> None:
        """Its answer was read to the end; it can carry another request."""


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time. All calls come from the loop's thread."""

    def __init__(self, keeper: Keeper, origin: Origin) -> None:
        self.origin = origin
        self.idle_since = 0.0
        self.usable = False
        self._keeper = keeper
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reset()

    def _reset(self) -> None:
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._received_bytes = 0
        self._body_bytes = 0
        self._head_done = False
        # The body's end is marked: by a length or by chunks, not by the connection's end.
        self._framed = False
        self._chunks: list[bytes] = []
        self._held_bytes = 0
        self._paused = False
        self._complete = False
        self._keep = False
        self._error: Exception | None = None
        self._read_timeout_s: float | None = None
        self._heard_at = 0.0

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass
        wire = transport.get_extra_info("socket")
        for option in SOCKET_OPTIONS:
            wire.setsockopt(*option)
        self.usable = True
        self._keeper.opened(self)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        if not self._head_done:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            # What came after the fault may be anything: nothing of this connection is used again.
            self._fail(httpx.RemoteProtocolError(f"not HTTP: {exc}"))
            return
        # The parser bounds nothing by itself: a head without end would fill the memory, and so
        # would trailers behind the body.
        if not self._head_done and self._head_bytes > MAX_HEAD_BYTES:
            self._fail(httpx.RemoteProtocolError(f"headers larger than {MAX_HEAD_BYTES} bytes"))
            return
        self._received_bytes += len(data)
        if self._received_bytes > 2 * MAX_HEAD_BYTES + MOST_FRAMING * self._body_bytes:
            self._fail(httpx.RemoteProtocolError("more framing than body: endless trailers"))
            return
        # Nobody reads as fast as this is sent: TCP's own window slows the server down.
        if self._held_bytes > PAUSE_BYTES and not self._complete and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self.usable = False  # asyncio closes it then, and calls ``connection_lost``

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        self._keeper.closed(self)
        if self._error is None and not self._complete:
            if exc is not None:
                self._error = httpx.ReadError(str(exc) or type(exc).__name__)
            elif self._head_done and not self._framed:
                # As in HTTP/1.0: the end of the connection is the end of the body. Whether that was
                # cut short, only what stands in it can tell.
                self._complete = True
            else:
                self._error = httpx.RemoteProtocolError(
                    "the server closed the connection before the end"
                )
        self._end()

    # What httptools calls

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        if self._status < 200:  # 100 Continue, 103 Early Hints: the answer is still to come
            self._headers = []
            self._framed = False
        else:
            self._head_done = True
            self._keep = self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        self._chunks.append(data)
        self._held_bytes += len(data)
        self._body_bytes += len(data)

    def on_message_complete(self) -> None:
        if self._head_done:
            if self._complete:
                self._keep = False  # a second answer that nobody asked for
            self._complete = True
            self._end()

    # What the transport and the body call

    async def send(
        self, data: bytes, read_timeout_s: float | None
    ) -> tuple[int, list[tuple[bytes, bytes]]]:
        """Write one request; its status and headers when they are here."""
        assert self._transport is not None
        self._reset()
        self._heard_at = self._loop.time()
        self._read_timeout_s = read_timeout_s
        if read_timeout_s is not None:
            self._timer = self._loop.call_later(read_timeout_s, self._check_silence)
        self._transport.write(data)
        while not self._head_done and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error
        return self._status, self._headers

    async def read(self) -> bytes:
        """The next piece of the body; empty at its end."""
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._complete:
                return b""
            await self._wait()
        # All that has come: a stream's events are tens of bytes, and a wake-up for each costs more.
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._held_bytes = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    def finish(self) -> None:
        """The body is done with: keep the connection if it was read to its end, else close it
        now.
        """
        if self._complete and self._keep and self.usable and not self._chunks:
            self._keeper.give_back(self)
        else:
            self.abort()

    def abort(self) -> None:
        """Close at once, so that a server which watches its connections stops generating."""
        self.usable = False
        self._keeper.closed(self)
        self._end()
        if self._transport is not None:
            self._transport.abort()  # close() would first send what still waits to be sent

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()

    def _fail(self, error: Exception) -> None:
        self._error = error
        self.abort()

    def _check_silence(self) -> None:
        """Runs once a timeout, not once a chunk: looks how long ago the server was heard."""
        assert self._read_timeout_s is not None
        left_s = self._heard_at + self._read_timeout_s - self._loop.time()
        if self._paused:
            left_s = self._read_timeout_s  # the silence is ours
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._check_silence)
        else:
            self._timer = None
            self._fail(httpx.ReadTimeout(f"silent for {self._read_timeout_s:g} s"))


class Body(httpx.AsyncByteStream):
    """A response's body, in pieces as they come; closing it early closes the connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection: Connection | None = connection

    def __aiter__(self) -> AsyncIterator[bytes]:
        if self._connection is None:
            raise httpx.StreamClosed
        return self

    async def __anext__(self) -> bytes:
        data = b""
        if self._connection is not None:
            try:
                data = await self._connection.read()
            finally:
                if not data:
                    await self.aclose()
        if not data:
            raise StopAsyncIteration
        return data

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.finish()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self.aclose()
