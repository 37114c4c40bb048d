"""One request and what comes back, whatever it is about: headers with their keys, bodies that are
whole and bounded, and a verdict on what goes wrong.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import orjson

from engine.backends.base import Failure, Verdict
from engine.backends.openai.access import Access
from engine.backends.openai.address import Address
from engine.backends.openai.reply import Unpacker, parsed
from engine.backends.openai.verdicts import Phase, classify

__all__ = ["Exchange", "pieces"]


class Exchange:
    """Requests to one host.

    Args:
        address: where it is.
        access: by what it lets one in.
        transport: what carries requests.
        connect_s: how long a connection may take; the rest of a call's time is its caller's.
        max_response_bytes: of one answer, unpacked.
    """

    def __init__(
        self,
        address: Address,
        access: Access,
        transport: httpx.AsyncBaseTransport,
        *,
        connect_s: float,
        max_response_bytes: int,
    ) -> None:
        self.name = address.name
        self.max_response_bytes = max_response_bytes
        self._transport = transport
        self._timeout = {"connect": connect_s, "read": None, "write": None, "pool": None}
        self._headers = httpx.Headers(
            {
                "Host": address.url.netloc.decode("ascii"),
                "Accept": "application/json, text/event-stream",
                "Accept-Encoding": "identity",
                "Content-Type": "application/json",
                "User-Agent": "woolmill",
            }
        )
        self._secret_headers = access.revealed(address)

    async def send(self, method: str, url: httpx.URL, body: bytes) -> httpx.Response:
        """The response as soon as its head is here; its reader closes it."""
        request = httpx.Request(  # a stream, since httpx takes ten times as long over ``content``
            method,
            url,
            headers=self._headers,
            stream=httpx.ByteStream(body),
            extensions={"timeout": self._timeout},
        )
        request.headers["Content-Length"] = str(len(body))
        for name, reveal in self._secret_headers.items():
            request.headers[name] = reveal()
        return await self._transport.handle_async_request(request)

    async def ask(
        self, method: str, url: httpx.URL, body: Any, phase: Phase, limit_s: float
    ) -> tuple[httpx.Response, bytes]:
        """A small question that costs nothing. Raises Failure."""
        content = orjson.dumps(body) if body else b""
        try:
            async with asyncio.timeout(limit_s):
                response = await self.send(method, url, content)
                try:
                    return response, await self.whole(response)
                finally:
                    await response.aclose()
        except TimeoutError as exc:
            silent = f"no answer to {method} {url.path} after {limit_s:.0f} s"
            raise Failure(replace(self.failure(exc, phase).verdict, message=silent)) from exc
        except Exception as exc:  # whatever fails while a server is read is a verdict
            raise self.failure(exc, phase) from exc

    async def json(
        self, method: str, url: httpx.URL, body: Any, phase: Phase, limit_s: float
    ) -> Any:
        """What a small question is answered with. Raises Failure."""
        response, raw = await self.ask(method, url, body, phase, limit_s)
        if response.status_code != 200:
            raise Failure(self.classified(response, raw))
        return parsed(raw, response, self.name)

    async def whole(self, response: httpx.Response) -> bytes:
        """The body to its end, unpacked."""
        unpack = self.unpacker(response)
        return b"".join([unpack(piece) async for piece in pieces(response)])

    def unpacker(self, response: httpx.Response) -> Unpacker:
        """What unpacks the pieces of a body, up to the bound."""
        encoding = response.headers.get("content-encoding", "identity")
        return Unpacker(encoding, self.max_response_bytes)

    def classified(self, response: httpx.Response, body: bytes) -> Verdict:
        """The verdict on a response that is no answer."""
        return classify(
            status=response.status_code, headers=response.headers, body=body, where=self.name
        )

    def failure(self, exc: Exception, phase: Phase) -> Failure:
        """The failure that an exception amounts to."""
        if isinstance(exc, Failure):
            return exc
        return Failure(classify(exception=exc, phase=phase, where=self.name))

    async def aclose(self) -> None:
        await self._transport.aclose()


def pieces(response: httpx.Response) -> httpx.AsyncByteStream:
    """The body as it comes."""
    assert isinstance(response.stream, httpx.AsyncByteStream)
    return response.stream
