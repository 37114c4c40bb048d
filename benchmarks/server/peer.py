"""One connection of a client: routes, limits, and what fails before anything is generated."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import struct
from typing import TYPE_CHECKING, Any, cast

import httptools
import orjson

from benchmarks.server.behaviour import EARLY_FAULTS, ODD_FAULTS
from benchmarks.server.generation import Generation
from engine.backends.scripted import fitting_text

if TYPE_CHECKING:
    from benchmarks.server.server import Server

__all__ = ["Peer"]


class Peer(asyncio.Protocol):
    """One connection of a client."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpRequestParser(self)
        self._generation: Generation | None = None
        self._path = b""
        self._key = ""
        self._body: list[bytes] = []
        self.last = False
        """The client wants the connection closed behind the answer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass
        self._server.peers.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server.peers.discard(self)
        if self._generation is not None:
            self._generation.hang_up()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._path = url
        self._key = ""
        self._body = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"authorization":
            self._key = value.decode("latin-1").removeprefix("Bearer ")

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        self.last = not self._parser.should_keep_alive()
        self._route(self._path.decode("ascii"), b"".join(self._body))

    # Routes

    def _route(self, path: str, body: bytes) -> None:
        behaviour = self._server.behaviour
        self._server.paths[path] += 1
        if behaviour.api_key and path.startswith("/v1") and self._key != behaviour.api_key:
            self.error(401, "Incorrect API key provided", code="invalid_api_key")
        elif path in ("/v1/completions", "/v1/chat/completions"):
            self._generate(orjson.loads(body), chat="chat" in path)
        elif path == "/v1/models":
            card = {
                "id": behaviour.model,
                "object": "model",
                "owned_by": behaviour.owned_by,
                "root": behaviour.root,
            }
            if behaviour.max_model_len is not None and behaviour.tells_length:
                card["max_model_len"] = behaviour.max_model_len  # type: ignore[assignment]
            self.json(200, {"object": "list", "data": [card]})
        elif path == "/tokenize":
            count = len(orjson.loads(body)["prompt"]) // 4
            self.json(200, {"count": count, "max_model_len": behaviour.max_model_len})
        elif path == "/metrics":
            self.write(200, self._server.metrics(), content_type="text/plain")
        elif path == "/health":
            self.write(200, b"")
        elif path == "/ledger":
            self.json(200, self._server.ledger.summary())
        else:
            self.error(404, "Not Found")

    def _generate(self, asked: dict[str, Any], *, chat: bool) -> None:
        server, behaviour = self._server, self._server.behaviour
        ledger = server.ledger
        if chat and not asked["messages"]:
            self.error(400, "messages: must not be empty", type_="BadRequestError")
            return
        if chat:
            prompts = ["\n".join(_words(turn["content"]) for turn in asked["messages"])]
        else:
            prompts = [asked["prompt"]] if isinstance(asked["prompt"], str) else asked["prompt"]
        keys = [_key(prompt, asked.get("seed")) for prompt in prompts]
        ledger.asked.update(keys)
        model, prompt_tokens = asked["model"], sum(len(prompt) // 4 for prompt in prompts)
        if model != behaviour.model:
            self.error(404, f"The model `{model}` does not exist.", code="model_not_found")
            return
        longest, limit = max(len(prompt) // 4 for prompt in prompts), behaviour.max_model_len
        wanted = longest + asked.get("max_tokens", 16)
        if limit is not None and wanted > limit:
            ledger.overflows += 1
            self.error(
                400,
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{wanted} tokens ({longest} in the messages, {wanted - longest} in the completion)"
                ". Please reduce the length of the messages or completion.",
                type_="BadRequestError",
            )
            return
        if not self._admitted(prompt_tokens + asked.get("max_tokens", 16)):
            return
        fault = server.draw_fault(keys[0])
        if fault is not None:
            ledger.faults[fault] += 1
        if fault in (*EARLY_FAULTS, *ODD_FAULTS) and fault != "hang":
            self._fail_early(fault)
            return
        texts = [self._text(prompt, key, asked) for prompt, key in zip(prompts, keys, strict=True)]
        generation = Generation(self, server, asked, chat, keys, texts, prompt_tokens, fault)
        self._generation = generation
        generation.start()

    def _text(self, prompt: str, key: str, asked: dict[str, Any]) -> str:
        behaviour = self._server.behaviour
        if behaviour.answer is not None:
            return behaviour.answer(prompt, self._server.ledger.asked[key])
        if behaviour.text is not None:
            return behaviour.text
        return fitting_text(
            prompt,
            seed=asked.get("seed"),
            form=asked.get("response_format"),
            records=behaviour.records,
        )

    def _admitted(self, tokens: int) -> bool:
        server, behaviour = self._server, self._server.behaviour
        wait_s = 0.0
        if behaviour.slots is not None and server.ledger.live >= behaviour.slots:
            self.throttle(None)
            return False
        for bucket, units in ((server.requests, 1), (server.tokens, tokens)):
            if bucket is not None:
                wait_s = max(wait_s, bucket.wait_s(units))
        if wait_s > 0:
            self.throttle(wait_s)
            return False
        for bucket, units in ((server.requests, 1), (server.tokens, tokens)):
            if bucket is not None:
                bucket.take(units)
        return True

    def quota_headers(self) -> list[tuple[str, str]]:
        found = []
        if self._server.behaviour.quota_headers:
            for bucket, unit in (
                (self._server.requests, "requests"),
                (self._server.tokens, "tokens"),
            ):
                if bucket is not None:
                    full_s = (bucket.burst - bucket.level()) * 60 / bucket.per_min
                    found += [
                        (f"x-ratelimit-limit-{unit}", f"{bucket.per_min:.0f}"),
                        (f"x-ratelimit-remaining-{unit}", f"{int(bucket.level())}"),
                        (f"x-ratelimit-reset-{unit}", f"{full_s:.3f}s"),
                    ]
        return found

    def _fail_early(self, fault: str) -> None:
        if fault == "429":
            self.throttle(None)
        elif fault == "429_bare":
            self.error(429, "Too many requests")
        elif fault == "reset":
            self.reset()
        elif fault == "garbage":
            self.raw(b"\x00\x01\x02 this is not HTTP\r\n\r\n", close=True)
        elif fault == "html":
            page = b"<html><title>Just a moment...</title></html>"
            self.write(200, page, content_type="text/html")
        elif fault == "bad_gzip":
            self.write(200, b"\x1f\x8bno", headers=[("content-encoding", "gzip")])
        elif fault == "header_bomb":
            self.raw(b"HTTP/1.1 200 OK\r\nx-bomb: " + b"a" * 2**20, close=True)
        else:
            self.error(int(fault), "The server had an error")

    # Writing

    def throttle(self, wait_s: float | None) -> None:
        behaviour = self._server.behaviour
        retry_after = behaviour.retry_after if wait_s is None else f"{wait_s:.3f}"
        headers = self.quota_headers() if behaviour.quota_headers else []
        if retry_after is not None and (wait_s is None or behaviour.quota_headers):
            headers.append(("retry-after", retry_after))
        self.error(429, "Rate limit reached", code="rate_limit_exceeded", headers=headers)

    def error(
        self,
        status: int,
        message: str,
        *,
        code: str = "",
        type_: str = "error",
        headers: list[tuple[str, str]] | None = None,
    ) -> None:
        body = {"error": {"message": message, "type": type_, "code": code or status}}
        self.write(status, orjson.dumps(body), headers=headers)

    def json(self, status: int, body: Any) -> None:
        self.write(status, orjson.dumps(body), headers=self.quota_headers())

    def write(
        self,
        status: int,
        body: bytes,
        *,
        content_type: str = "application/json",
        headers: list[tuple[str, str]] | None = None,
        length: int | None = None,
    ) -> None:
        """A whole answer; ``length`` other than the body's makes it a lie."""
        self._server.ledger.statuses[status] += 1
        more = "".join(f"{k}: {v}\r\n" for k, v in headers or ())
        size = len(body) if length is None else length
        self.raw(
            f"HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\n{more}"
            f"content-length: {size}\r\n\r\n".encode()
            + body,
            close=self.last,
        )

    def raw(self, data: bytes, *, close: bool = False) -> None:
        if self._transport is not None:
            self._transport.write(data)
            if close:
                self._transport.close()

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        if self._transport is not None:
            sock: socket.socket = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()


def _words(content: str | list[dict[str, Any]]) -> str:
    """The text of a turn, which may come in parts."""
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content)


def _key(prompt: str, seed: int | None) -> str:
    return hashlib.blake2b(f"{seed}\n{prompt}".encode(), digest_size=8).hexdigest()
