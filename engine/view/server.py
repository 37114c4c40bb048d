"""The server: Starlette's application under uvicorn, with a clock on every connection.

uvicorn has no time limit on a request's headers or on a client that does not read. Each connection
gets ``HEADERS_S`` to ask something and ``LIFE_S`` in all, and there are ``CONNECTIONS`` at most;
a browser opens a new one without anybody noticing. So slow and idle clients hold a bounded number
of sockets for a bounded time.
"""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.errors import OutputError

__all__ = ["bind", "make_server"]

CONNECTIONS = 64
"""At most, at once. A browser opens six to a host, so this is ten people's."""
HEADERS_S = 5.0
"""Within which a new connection must ask something."""
LIFE_S = 60.0
"""Of a connection, whatever it does; pages are made in milliseconds."""
MAX_HEADER_BYTES = 16_384
"""Of a request's head; browsers send one or two KiB."""
PORTS_TRIED = 20
"""From the one asked for on, where others are taken by an earlier view."""


class _Timed(H11Protocol):
    """A connection that is ended when it asks nothing, or lives too long."""

    _timers: tuple[asyncio.TimerHandle, ...] = ()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
            return
        loop = asyncio.get_running_loop()
        self._timers = (
            loop.call_later(HEADERS_S, self._end_if_silent),
            loop.call_later(LIFE_S, transport.abort),
        )

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self._timers:
            timer.cancel()
        super().connection_lost(exc)

    def _end_if_silent(self) -> None:
        if self.cycle is None:  # no request has come whole
            self.transport.abort()


def bind(host: str, port: int) -> tuple[socket.socket, bool]:
    """A listening socket at ``port`` or the next free one; whether it is another than asked for.

    Raises OutputError where no port can be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in range(port, port + PORTS_TRIED) if port else (0,):
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen(CONNECTIONS)
        except OSError as exc:
            listener.close()
            problem = exc
            continue
        return listener, bool(port) and candidate != port
    raise OutputError(f"{host}:{port}: cannot be listened on: {problem.strerror}; choose --port")


def make_server(app: ASGIApp) -> uvicorn.Server:
    """A server without logs, lifespan or websockets; run it with ``serve(sockets=[…])``."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=_Timed,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=2,
        )
    )
