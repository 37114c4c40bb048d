"""A host that vanishes without a word: its connections are given up soon, and not after minutes."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.server import Server
from engine.backends.base import Failure
from engine.backends.openai.backend import HttpBackend
from engine.backends.openai.wire import FastTransport
from tests.engine.backends.test_transport import get
from tests.engine.wire import prompt

pytestmark = pytest.mark.slow

IN_FLIGHT = 32
NOTICED_S = 20.0
OURS, THEIRS = "10.213.57.1", "10.213.57.2"
SILENT = """
import socket, threading
listener = socket.create_server(("0.0.0.0", 8000), backlog=256)
print("up", flush=True)
kept = []
while True:
    kept.append(listener.accept()[0])
"""
"""A server that takes every request and never answers."""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def other_host(name: str) -> Iterator[None]:
    """A network of its own at the other end of a cable, with the silent server in it."""
    ip("netns", "add", name)
    try:
        ip("link", "add", f"{name}-a", "type", "veth", "peer", "name", "b", "netns", name)
        ip("addr", "add", f"{OURS}/30", "dev", f"{name}-a")
        ip("link", "set", "dev", f"{name}-a", "up")
        ip("-n", name, "addr", "add", f"{THEIRS}/30", "dev", "b")
        ip("-n", name, "link", "set", "dev", "b", "up")
        command = ["ip", "netns", "exec", name, sys.executable, "-c", SILENT]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"up\n"
            try:
                yield
            finally:
                server.kill()
    finally:
        ip("netns", "del", name)


@pytest.mark.anyio
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip")
async def test_a_cut_link_is_noticed() -> None:
    """All calls in flight come to an end of which nobody knows whether it was paid."""
    name = f"wm{os.getpid() % 100000}"
    with other_host(name):
        backend = HttpBackend(f"http://{THEIRS}:8000/v1", "m")
        backend._checked = True  # nobody tells there which models there are
        calls = [asyncio.ensure_future(backend.complete([prompt()])) for _ in range(IN_FLIGHT)]
        await asyncio.sleep(0.5)
        began = time.monotonic()
        await asyncio.to_thread(ip, "-n", name, "link", "set", "dev", "b", "down")
        outcomes = await asyncio.wait_for(
            asyncio.gather(*calls, return_exceptions=True), timeout=NOTICED_S
        )
        assert time.monotonic() - began > 5, "it was no silence that ended them"
        await backend.aclose()
    assert {type(outcome) for outcome in outcomes} == {Failure}
    assert {o.verdict.kind for o in outcomes if isinstance(o, Failure)} == {"ambiguous"}


@pytest.mark.anyio
async def test_every_connection_is_watched_by_the_kernel() -> None:
    """Signs of life are asked for, and what is sent must be received in time."""
    transport = FastTransport()
    async with Server() as server:
        await get(transport, f"{server.url}/v1/models")
        (connection,) = transport._live
        assert connection._transport is not None
        wire = connection._transport.get_extra_info("socket")
        assert wire.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        asked = [socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT]
        idle_s, every_s, times = (wire.getsockopt(socket.IPPROTO_TCP, name) for name in asked)
        assert idle_s + every_s * times <= NOTICED_S
        sent_ms = wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert 0 < sent_ms <= NOTICED_S * 1000
        await transport.aclose()
