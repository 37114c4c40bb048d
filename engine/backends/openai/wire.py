"""The wire: HTTP/1.1 over asyncio, behind httpx's transport interface.

httpx's own pool looks at every open connection for every request, so its price grows with the
number in flight (milliseconds at 1,024). This transport keeps httpx's types as the interface and
does the rest in the simplest way: one ``asyncio.Protocol`` a connection, httptools (Node's parser)
for the bytes, and a stack of idle connections per origin. How many are open is not its concern:
``engine.limits`` decides what is in flight, and a connection is opened whenever none is idle.

The price: HTTP/1.1 only, no proxies, no redirects, no cookies. Where a proxy is in use,
``make_transport`` takes httpx's own transport instead, at httpx's cost.

Strict about the end: a body shorter than its Content-Length, or a chunked body without its last
chunk, is an error, never a short answer.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

import httptools
import httpx

from engine.backends.openai.address import is_link_local, is_loopback
from engine.errors import ConfigError

__all__ = ["FastTransport", "make_transport"]

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 65_536
"""Status line and headers; no API sends more, and a server that does is broken or hostile."""
MOST_FRAMING = 16
"""Bytes received for each byte of the body, at most: chunks of a single byte take six."""
PAUSE_BYTES = 262_144
"""Unread body held for one response before the socket is left to wait."""
KEEP_ALIVE_S = 4.0
"""Idle connections older than this are not used again: uvicorn, thus vLLM, closes them after 5
s.
"""
ADDRESS_TTL_S = 30.0
"""How long a resolved name is trusted, so that thousands of connections ask the resolver once."""
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

Address = tuple[socket.AddressFamily, str]
Origin = tuple[str, str, int | None]
"""Scheme, host, port."""


class FastTransport(httpx.AsyncBaseTransport):
    """Connections to any number of origins, kept alive between requests.

    ``ca_file`` adds a certificate authority of the user's own; verification cannot be switched
    off. Of httpx's timeouts it obeys ``connect`` and ``read`` (the longest silence), from the
    request's extensions.
    Raises httpx's transport errors, and ConfigError for an address that must not be reached.
    """

    def __init__(
        self, *, ca_file: str | Path | None = None, keep_alive_s: float = KEEP_ALIVE_S
    ) -> None:
        self._ca_file = ca_file
        self._keep_alive_s = keep_alive_s
        self._ssl: ssl.SSLContext | None = None
        self._idle: dict[Origin, deque[_Connection]] = {}
        self._addresses: dict[str, tuple[float, list[Address]]] = {}
        self._live: set[_Connection] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        timeout = request.extensions.get("timeout", {})
        stream = request.stream
        body = b"".join(stream) if isinstance(stream, httpx.ByteStream) else await request.aread()
        url = request.url
        origin = (url.scheme, url.host, url.port)
        connection = self._take(origin)
        if connection is None:
            connection = await self._connect(request, timeout.get("connect"), origin)
        try:
            status, headers = await connection.send(_head(request) + body, timeout.get("read"))
        except BaseException:  # raised again; cancelled or not, half an exchange is no connection
            connection.abort()
            raise
        return httpx.Response(status, headers=headers, stream=_Body(connection), request=request)

    async def aclose(self) -> None:
        for connection in list(self._live):
            connection.abort()
        self._idle.clear()

    def _take(self, origin: Origin) -> _Connection | None:
        idle = self._idle.get(origin)
        oldest = asyncio.get_running_loop().time() - self._keep_alive_s
        while idle:
            connection = idle.pop()
            if connection.idle_since >= oldest and connection.usable:
                return connection
            connection.abort()
        return None

    def _give_back(self, connection: _Connection) -> None:
        """Keep the newest on top; the oldest, at the bottom, go when their time is over."""
        idle = self._idle.setdefault(connection.origin, deque())
        connection.idle_since = now = asyncio.get_running_loop().time()
        idle.append(connection)
        while idle[0].idle_since < now - self._keep_alive_s:
            idle.popleft().abort()

    async def _connect(
        self,
        request: httpx.Request,
        timeout_s: float | None,
        origin: Origin,
    ) -> _Connection:
        url = request.url
        if url.scheme not in ("http", "https"):
            raise httpx.UnsupportedProtocol(f"{url.scheme}: only http and https", request=request)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._open(url, origin)
        except TimeoutError as exc:
            raise httpx.ConnectTimeout(
                f"no connection within {timeout_s} s", request=request
            ) from exc
        except OSError as exc:  # refused, no route, no such name, bad certificate
            raise httpx.ConnectError(str(exc), request=request) from exc

    async def _open(self, url: httpx.URL, origin: Origin) -> _Connection:
        loop = asyncio.get_running_loop()
        context: ssl.SSLContext | None = None
        if url.scheme == "https":
            context = self._ssl = self._ssl or _trust(self._ca_file)
        port = url.port or (443 if context else 80)
        error: OSError | None = None
        for family, host in await self._resolve(url.host):
            try:
                _, connection = await loop.create_connection(
                    lambda: _Connection(self, origin),
                    host,
                    port,
                    family=family,
                    ssl=context,
                    server_hostname=url.host if context else None,
                )
            except OSError as exc:
                error = error or exc
            else:
                return connection
        raise error or OSError(f"{url.host} has no address")

    async def _resolve(self, host: str) -> list[Address]:
        """Addresses of ``host``; refuses those by which a cloud machine reaches its own
        credentials.

        The connection then goes to the address that was checked, so no second look-up can change
        it.
        """
        loop = asyncio.get_running_loop()
        known = self._addresses.get(host)
        if known is not None and known[0] > loop.time():
            return known[1]
        found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        addresses: list[Address] = list(dict.fromkeys((info[0], str(info[4][0])) for info in found))
        for _, text in addresses:
            if is_link_local(text):
                raise ConfigError(
                    f"{host}: {text} is a link-local or metadata address and is never contacted; "
                    "check the base URL"
                )
        self._addresses[host] = (loop.time() + ADDRESS_TTL_S, addresses)
        return addresses


def make_transport(
    url: httpx.URL,
    *,
    ca_file: str | Path | None = None,
    proxy: str | None = None,
    kind: Literal["fast", "httpx"] | None = None,
) -> httpx.AsyncBaseTransport:
    """What carries requests to ``url``.

    Args:
        proxy: its URL; None: as HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY say. This machine
            itself is never reached by a proxy of the environment.
        kind: ``fast`` or ``httpx``; None: httpx's only where there is a proxy.

    Raises ConfigError for a proxy that cannot be used.
    """
    if proxy is None and not is_loopback(url.host) and not proxy_bypass_environment(url.host):
        found = getproxies_environment()
        proxy = found.get(url.scheme) or found.get("all")
    if proxy is None and kind != "httpx":
        return FastTransport(ca_file=ca_file)
    if proxy is not None and kind == "fast":
        raise ConfigError("--transport fast: has no proxies; leave it out, or set NO_PROXY")
    try:
        place = httpx.URL(proxy) if proxy is not None else None
        transport = httpx.AsyncHTTPTransport(
            verify=_trust(ca_file),
            trust_env=False,
            proxy=proxy,
            socket_options=SOCKET_OPTIONS,
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=None,
                keepalive_expiry=KEEP_ALIVE_S,
            ),
        )
    except (ValueError, ImportError, httpx.InvalidURL) as exc:
        raise ConfigError(f"the proxy cannot be used: {exc}; see --proxy") from exc
    if place is not None:  # never its user and password
        _say_once(f"{url.host}: by the proxy {place.scheme}://{place.host}:{place.port or ''}")
    return transport


@functools.cache
def _say_once(message: str) -> None:
    log.warning("%s", message)


def _trust(ca_file: str | Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except OSError as exc:
            raise ConfigError(f"--ca-file {ca_file}: no certificates can be read ({exc})") from exc
    return context


def _head(request: httpx.Request) -> bytes:
    lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), request.url.raw_path)]
    lines += [b"%b: %b" % header for header in request.headers.raw]
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1:
        raise httpx.LocalProtocolError("a header holds a line break", request=request)
    return head + b"\r\n\r\n"


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time. All calls come from the loop's thread."""

    def __init__(self, owner: FastTransport, origin: Origin) -> None:
        self.origin = origin
        self.idle_since = 0.0
        self.usable = False
        self._owner = owner
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
        self._framed = (
            False  # the body's end is marked: by length or chunks, not by the connection's end
        )
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
        self._owner._live.add(self)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        if not self._head_done:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._fail(httpx.RemoteProtocolError(f"not HTTP: {exc}"))
            return
        if not self._head_done and self._head_bytes > MAX_HEAD_BYTES:
            self._fail(httpx.RemoteProtocolError(f"headers larger than {MAX_HEAD_BYTES} bytes"))
            return
        self._received_bytes += len(data)
        if self._received_bytes > 2 * MAX_HEAD_BYTES + MOST_FRAMING * self._body_bytes:
            self._fail(httpx.RemoteProtocolError("more framing than body: endless trailers"))
            return
        if self._held_bytes > PAUSE_BYTES and not self._complete and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self.usable = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        self._owner._live.discard(self)
        if self._error is None and not self._complete:
            if exc is not None:
                self._error = httpx.ReadError(str(exc) or type(exc).__name__)
            elif self._head_done and not self._framed:
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
            self._owner._give_back(self)
        else:
            self.abort()

    def abort(self) -> None:
        """Close at once, so that a server which watches its connections stops generating."""
        self.usable = False
        self._owner._live.discard(self)
        self._end()
        if self._transport is not None:
            self._transport.abort()

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


class _Body(httpx.AsyncByteStream):
    """A response's body, in pieces as they come; closing it early closes the connection."""

    def __init__(self, connection: _Connection) -> None:
        self._connection: _Connection | None = connection

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
