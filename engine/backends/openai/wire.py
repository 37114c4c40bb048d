"""The wire: HTTP/1.1 over asyncio, behind httpx's transport interface.

httpx's own pool looks at every open connection for every request, so its price grows with the
number in flight (milliseconds at 1,024). This transport keeps httpx's types as the interface and
does the rest in the simplest way: one ``asyncio.Protocol`` a connection, httptools (Node's parser)
for the bytes, and a stack of idle connections per origin. How many are open is not its concern:
``engine.limits`` decides what is in flight, and a connection is opened whenever none is idle.

The price: HTTP/1.1 only, no proxies, no redirects, no cookies. Where a proxy is in use,
``make_transport`` takes httpx's own transport instead, at httpx's cost.

``connection`` has one connection, and what is an answer's end.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import ssl
from collections import deque
from pathlib import Path
from typing import Literal
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

import httpx

from engine.backends.openai.address import is_link_local, is_loopback
from engine.backends.openai.connection import SOCKET_OPTIONS, Body, Connection, Origin
from engine.errors import ConfigError

__all__ = ["FastTransport", "make_transport"]

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 4.0
"""Idle connections older than this are not used again: uvicorn, thus vLLM, closes them after 5
s.
"""
ADDRESS_TTL_S = 30.0
"""How long a resolved name is trusted, so that thousands of connections ask the resolver once."""
Address = tuple[socket.AddressFamily, str]


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
        self._idle: dict[Origin, deque[Connection]] = {}
        self._addresses: dict[str, tuple[float, list[Address]]] = {}
        self._live: set[Connection] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        timeout = request.extensions.get("timeout", {})
        stream = request.stream
        body = b"".join(stream) if isinstance(stream, httpx.ByteStream) else await request.aread()
        url = request.url
        origin = (url.scheme, url.host, url.port)
        connection = self._take(origin)
        if connection is None:
            connection = await self._connect(request, timeout.get("connect"), origin)
        # Head and body in one write: one system call, and one packet where they fit into it.
        try:
            status, headers = await connection.send(_head(request) + body, timeout.get("read"))
        except BaseException:  # raised again; cancelled or not, half an exchange is no connection
            connection.abort()
            raise
        return httpx.Response(status, headers=headers, stream=Body(connection), request=request)

    async def aclose(self) -> None:
        for connection in list(self._live):
            connection.abort()
        self._idle.clear()

    def _take(self, origin: Origin) -> Connection | None:
        idle = self._idle.get(origin)
        oldest = asyncio.get_running_loop().time() - self._keep_alive_s
        while idle:
            # The newest first: it is the one that the server is least likely to have closed, and
            # those that nobody needs any more grow old at the bottom.
            connection = idle.pop()
            if connection.idle_since >= oldest and connection.usable:
                return connection
            connection.abort()
        return None

    # What connections call (Keeper)

    def opened(self, connection: Connection) -> None:
        self._live.add(connection)

    def closed(self, connection: Connection) -> None:
        self._live.discard(connection)

    def give_back(self, connection: Connection) -> None:
        """Keep the newest on top; the oldest, at the bottom, go when their time is over."""
        idle = self._idle.setdefault(connection.origin, deque())
        connection.idle_since = now = asyncio.get_running_loop().time()
        idle.append(connection)
        while idle[0].idle_since < now - self._keep_alive_s:
            idle.popleft().abort()

    # Opening one

    async def _connect(
        self,
        request: httpx.Request,
        timeout_s: float | None,
        origin: Origin,
    ) -> Connection:
        url = request.url
        if url.scheme not in ("http", "https"):
            raise httpx.UnsupportedProtocol(f"{url.scheme}: only http and https", request=request)
        # httpx's own exceptions, so that verdicts do not depend on which transport it was.
        try:
            async with asyncio.timeout(timeout_s):
                return await self._open(url, origin)
        except TimeoutError as exc:
            raise httpx.ConnectTimeout(
                f"no connection within {timeout_s} s", request=request
            ) from exc
        except OSError as exc:  # refused, no route, no such name, bad certificate
            raise httpx.ConnectError(str(exc), request=request) from exc

    async def _open(self, url: httpx.URL, origin: Origin) -> Connection:
        loop = asyncio.get_running_loop()
        context: ssl.SSLContext | None = None
        if url.scheme == "https":
            context = self._ssl = self._ssl or _trust(self._ca_file)
        port = url.port or (443 if context else 80)
        error: OSError | None = None
        for family, host in await self._resolve(url.host):
            try:
                _, connection = await loop.create_connection(
                    lambda: Connection(self, origin),
                    host,
                    port,
                    family=family,
                    ssl=context,
                    server_hostname=url.host if context else None,
                )
            except OSError as exc:
                # The first is said: later addresses often fail only since a family has no route.
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
    # httpx takes any bytes for a value; a line break in one would begin a header of somebody's
    # choice, or a request.
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1:
        raise httpx.LocalProtocolError("a header holds a line break", request=request)
    return head + b"\r\n\r\n"
