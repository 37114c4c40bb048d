"""The transport against real sockets: reuse, strict ends, bounds, time-outs, TLS, addresses."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from benchmarks.server import Server
from engine.backends.openai import wire as transport_module
from engine.backends.openai.wire import KEEP_ALIVE_S, FastTransport, make_transport
from engine.errors import ConfigError
from tests.engine.wire import http, raw_server

pytestmark = pytest.mark.anyio


async def get(
    transport: httpx.AsyncBaseTransport, url: str, *, read_s: float | None = 5.0
) -> httpx.Response:
    request = httpx.Request("GET", url, extensions={"timeout": {"connect": 2.0, "read": read_s}})
    response = await transport.handle_async_request(request)
    await response.aread()
    return response


async def test_it_is_a_transport_for_any_httpx_client() -> None:
    """httpx.AsyncClient works on top of it: headers, JSON, keep-alive."""
    async with Server() as server, httpx.AsyncClient(transport=FastTransport()) as client:
        for _ in range(3):
            response = await client.get(f"{server.url}/v1/models")
            assert response.json()["data"][0]["id"] == "toy"
        assert len(server.peers) == 1


async def test_fault_013_connections_are_reused_and_never_shared() -> None:
    """A hundred requests at once open a hundred connections; later ones open none."""
    async with Server() as server:
        transport = FastTransport()
        for _ in range(3):
            answers = await asyncio.gather(
                *[get(transport, f"{server.url}/v1/models") for _ in range(100)]
            )
            assert {answer.status_code for answer in answers} == {200}
            assert len(server.peers) == 100
        await transport.aclose()


async def test_fault_012_a_stale_connection_is_not_used() -> None:
    """An idle connection that the server closed is left alone; nothing counts as sent."""
    asked = []

    async def serve(request: bytes, writer: asyncio.StreamWriter) -> None:
        asked.append(request)
        writer.write(http(b"ok"))
        await writer.drain()
        writer.close()

    async with raw_server(serve) as url:
        transport = FastTransport()
        for _ in range(3):
            assert (await get(transport, url)).content == b"ok"
            await asyncio.sleep(0.01)  # the server's FIN arrives
        assert len(asked) == 3
        await transport.aclose()


async def test_fault_012_old_connections_are_closed() -> None:
    """What has been idle for longer than the keep-alive is closed when another comes back."""
    async with Server() as server:
        transport = FastTransport(keep_alive_s=0.0)
        await get(transport, f"{server.url}/v1/models")
        await asyncio.sleep(0.01)
        await get(transport, f"{server.url}/v1/models")
        await asyncio.sleep(0.01)
        assert len(server.peers) <= 1
        assert KEEP_ALIVE_S < 5  # uvicorn's own
        await transport.aclose()


ENDS = [
    ("fault_004 reset", b"", True),
    ("fault_005 reset midway", http(b"half", length=8), True),
    ("fault_006 FIN midway", http(b"half", length=8), False),
    ("fault_006 no last chunk",
     b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n", False),
    ("fault_007 no answer", b"", False),
    ("not HTTP", b"\x00\x01\x02\x03 hello\r\n\r\n", False),
    ("fault_019 header bomb", b"HTTP/1.1 200 OK\r\nx: " + b"a" * 2**20, False),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "reset"), [pytest.param(*row[1:], id=row[0]) for row in ENDS])
async def test_an_answer_without_its_end_is_an_error(sent: bytes, reset: bool) -> None:
    """A cut body never passes for a short one, whatever cut it; the connection is given up."""

    async def serve(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await asyncio.sleep(0.01)
        if reset:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
            )
            writer.transport.abort()
        else:
            writer.close()

    async with raw_server(serve) as url:
        transport = FastTransport()
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            await get(transport, url)
        await transport.aclose()


async def test_a_body_that_ends_with_the_connection_is_whole() -> None:
    """Without length and chunks the connection's end is the body's, as HTTP says."""

    async def serve(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nwhole")
        await writer.drain()
        writer.close()

    async with raw_server(serve) as url:
        transport = FastTransport()
        assert (await get(transport, url)).content == b"whole"
        await transport.aclose()


async def test_hints_before_the_answer_are_passed_over() -> None:
    """100 Continue and 103 Early Hints are not the answer."""

    async def serve(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" + http(b"ok"))

    async with raw_server(serve) as url:
        transport = FastTransport()
        response = await get(transport, url)
        assert (response.status_code, response.content) == (200, b"ok")
        assert "link" not in response.headers
        await transport.aclose()


async def test_fault_002_refused() -> None:
    """Nobody listens: an error of connecting, so nothing was sent."""
    with pytest.raises(httpx.ConnectError):
        await get(FastTransport(), "http://127.0.0.1:1/")


async def test_fault_003_black_hole() -> None:
    """A connection that is never accepted ends with the connect time-out."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
            fillers.append(filler)
        request = httpx.Request(
            "GET", f"http://127.0.0.1:{port}/", extensions={"timeout": {"connect": 0.05}}
        )
        with pytest.raises(httpx.ConnectTimeout):
            await FastTransport().handle_async_request(request)
        for filler in fillers:
            filler.close()


async def test_fault_009_silence_within_an_answer() -> None:
    """The read time-out counts silence, not the whole answer: slow but steady is let through."""

    async def serve(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(http(b"", length=8))
        for byte in b"slowness"[: 8 if b"/slow" in request else 4]:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.03)
        await asyncio.sleep(0.2)

    async with raw_server(serve) as url:
        transport = FastTransport()
        assert (await get(transport, f"{url}/slow", read_s=0.1)).content == b"slowness"
        with pytest.raises(httpx.ReadTimeout):
            await get(transport, f"{url}/silent", read_s=0.1)
        await transport.aclose()


async def test_fault_017_localhost_on_one_family_only() -> None:
    """localhost has two addresses and the server one of them; the other's refusal is no failure."""
    async with Server() as server:
        transport = FastTransport()
        response = await get(transport, f"http://localhost:{server.port}/v1/models")
        assert response.status_code == 200
        await transport.aclose()


@pytest.mark.parametrize(
    "host",
    ["169.254.169.254", "[fd00:ec2::254]", "[::ffff:169.254.169.254]", "[fe80::1]", "2852039166",
     "0xa9fea9fe", "169.254.43518"],
)  # fmt: skip
async def test_security_10_metadata_addresses_are_never_contacted(host: str) -> None:
    """In every spelling, by the address that would be connected to."""
    with pytest.raises((ConfigError, httpx.InvalidURL)):
        await get(FastTransport(), f"http://{host}/latest")


async def test_headers_cannot_be_smuggled() -> None:
    """A line break in a header's value is refused before a byte is sent."""
    async with Server() as server:
        request = httpx.Request("GET", f"{server.url}/", headers={"x": "a\r\nevil: 1"})
        transport = FastTransport()
        with pytest.raises(httpx.LocalProtocolError):
            await transport.handle_async_request(request)
        await transport.aclose()


async def test_fault_055_cancelling_closes_the_connection() -> None:
    """Whoever gives up an answer hangs up, so that the server can stop generating."""
    closed = asyncio.Event()

    async def serve(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(http(b"begun", length=1000))
        await writer.drain()
        while not writer.is_closing():
            await asyncio.sleep(0.01)
            try:
                writer.write(b".")
                await writer.drain()
            except ConnectionError:
                break
        closed.set()

    async with raw_server(serve) as url:
        transport = FastTransport()
        task = asyncio.ensure_future(get(transport, url))
        await asyncio.sleep(0.03)
        task.cancel()
        async with asyncio.timeout(5):
            await closed.wait()
        await transport.aclose()


async def test_fault_011_an_unread_body_waits_in_the_socket() -> None:
    """What is not read is not piled up in memory either: the transport stops listening."""

    async def serve(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(http(b"x" * 2**23))

    async with raw_server(serve) as url:
        transport = FastTransport()
        request = httpx.Request("GET", url)
        response = await transport.handle_async_request(request)
        await asyncio.sleep(0.1)
        (connection,) = transport._live
        assert connection._held_bytes < 2**20
        assert len(await response.aread()) == 2**23
        await transport.aclose()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate with its key, in one file."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


async def test_fault_014_tls(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown authority is refused, trusted by --ca-file; no variable changes that."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    server = Server()
    await server.start(ssl=context)
    url = f"https://localhost:{server.port}/v1/models"
    monkeypatch.setenv("PYTHONHTTPSVERIFY", "0")
    monkeypatch.setenv("CURL_CA_BUNDLE", "")
    with pytest.raises(httpx.ConnectError) as caught:
        await get(FastTransport(), url)
    assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
    trusting = FastTransport(ca_file=certificate / "cert.pem")
    assert (await get(trusting, url)).status_code == 200
    await trusting.aclose()
    with pytest.raises(ConfigError, match="--ca-file"):
        await get(FastTransport(ca_file=certificate / "none.pem"), url)
    await server.stop()


@pytest.mark.parametrize("how", ["environment", "flag"])
async def test_fault_015_proxies_carry_requests(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """HTTP_PROXY and --proxy are obeyed, which is said once and without the proxy's password."""
    seen = []

    async def serve(request: bytes, writer: asyncio.StreamWriter) -> None:
        seen.append(request.split(b"\r\n")[0])
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    transport_module._say_once.cache_clear()
    async with raw_server(serve) as url:
        proxy = url.replace("http://", "http://me:secret@")
        there = httpx.URL("http://model.invalid/v1/models")
        if how == "environment":
            monkeypatch.setenv("http_proxy", proxy)
        for _ in range(2):
            transport = make_transport(there, proxy=proxy if how == "flag" else None)
            assert (await get(transport, str(there))).status_code == 200
            await transport.aclose()
    assert seen == [b"GET http://model.invalid/v1/models HTTP/1.1"] * 2
    (said,) = [record.getMessage() for record in caplog.records]
    assert "by the proxy http://127.0.0.1" in said
    assert "secret" not in said


def test_fault_015_where_no_proxy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for this machine, nor for what NO_PROXY names; what cannot be used is refused."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "inside.example")
    for url in ("https://localhost/v1", "https://127.0.0.1/v1", "https://inside.example/v1"):
        assert isinstance(make_transport(httpx.URL(url)), FastTransport)
    there = httpx.URL("https://outside.example/v1")
    assert isinstance(make_transport(there), httpx.AsyncHTTPTransport)
    with pytest.raises(ConfigError, match="--transport fast"):
        make_transport(there, kind="fast")
    with pytest.raises(ConfigError, match="--proxy"):
        make_transport(there, proxy="ftp://127.0.0.1")
    monkeypatch.delenv("https_proxy")
    assert isinstance(make_transport(there, kind="httpx"), httpx.AsyncHTTPTransport)
