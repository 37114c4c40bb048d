"""Small servers and prompts for the tests of the wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from engine.records import Api, Prompt, Sampling

Serve = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


def prompt(
    index: int = 0, text: str = "", *, api: Api = "completions", max_tokens: int = 64
) -> Prompt:
    text = text or f"Request {index}.\n###\n4. Instruction:"
    sampling = Sampling(max_tokens=max_tokens, stop=("\n20",), seed=index)
    return Prompt(index=index, text=text, api=api, sampling=sampling)


@asynccontextmanager
async def raw_server(serve: Serve) -> AsyncIterator[str]:
    """Calls ``serve`` with each request's bytes; what is written is the answer, byte for byte."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = 0
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                await serve(head + await reader.readexactly(length), writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def http(body: bytes, *, headers: str = "", status: int = 200, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status} X\r\ncontent-length: {size}\r\n{headers}\r\n".encode() + body
