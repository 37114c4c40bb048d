"""A double of a server for embeddings, no kinder than real ones.

Vectors are of words, so that texts with the same ones are close. Each answer moves them by a little
and in another direction, as batches of another shape and other machines do.
"""

from __future__ import annotations

import base64
import json
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any
from zlib import crc32

import numpy as np

from tests.engine.loopback import Loopback

__all__ = ["EmbeddingHost", "Trouble", "count", "cut", "status"]

DIMENSION = 64
Trouble = Callable[["_Handler", dict[str, Any]], bool]
"""What becomes of one request in the place of an answer; False: it is answered after all."""


def vector_of(text: str, dimension: int = DIMENSION) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The bag of a text's words, each in a direction of its own."""
    total = np.zeros(dimension)
    for word in text.lower().split():
        total += np.random.default_rng(crc32(word.encode())).normal(size=dimension)
    return total / (np.linalg.norm(total) or 1)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    @property
    def owner(self) -> EmbeddingHost:
        return self.server.owner  # type: ignore[attr-defined, no-any-return]

    def do_GET(self) -> None:
        if self.owner.loading:
            self.owner.loading -= 1
            self.reply({"error": {"message": "loading"}}, 503)
            return
        cards = [{"id": name, "owned_by": self.owner.owner_name} for name in self.owner.models]
        self.reply({"object": "list", "data": cards})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(raw)
        owner = self.owner
        trouble = owner.note(self.path, body, self.headers.get("Authorization"))
        if self.path != "/v1/embeddings":
            self.reply({"detail": "Not Found"}, 404)
            return
        if trouble is not None and trouble(self, body):
            return
        if owner.key is not None and self.headers.get("Authorization") != f"Bearer {owner.key}":
            self.reply({"error": {"message": "bad key", "code": "invalid_api_key"}}, 401)
            return
        longest = max(len(text.split()) for text in body["input"])
        if owner.context and longest > owner.context and "truncate_prompt_tokens" not in body:
            message = (
                f"This model's maximum context length is {owner.context} tokens. However, you "
                f"requested {longest} tokens in the input for embedding generation. Please reduce "
                "the length of the input."
            )
            self.reply({"error": {"message": message, "type": "BadRequestError"}}, 400)
            return
        if "truncate_prompt_tokens" in body and owner.owner_name != "vllm":
            self.reply({"error": {"message": "Unrecognized request argument supplied"}}, 400)
            return
        if any("POISON" in text for text in body["input"]):
            self.reply({"error": {"message": "cannot do that one"}}, 500)
            return
        self.reply(owner.shaped({"object": "list", "data": owner.embedded(body), "model": "m",
                    "usage": {"prompt_tokens": 5, "total_tokens": 5}}))  # fmt: skip

    def reply(self, body: Any, status: int = 200, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)


class EmbeddingHost(Loopback):
    """Serves ``models``.

    Attributes:
        troubles: what becomes of the next requests for embeddings, in order; None: answered.
        asked: every text that an embedding was asked of, with how often.
        requests: bodies of all requests for embeddings.
        shape: what is done to each answer's body.
    """

    handler = _Handler

    def __init__(self, *models: str, owner: str = "somebody") -> None:
        self.models = list(models or ["words"])
        self.owner_name = owner
        self.troubles: list[Trouble | None] = []
        self.always: Trouble | None = None
        self.asked: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.key: str | None = None
        self.context = 0
        self.loading = 0
        """Times that it says so in the place of its models."""
        self.dimension = DIMENSION
        self.turned = False
        """Another model stands behind the same name."""
        self.noise = 1e-4
        """How far each number of a vector is off, anew each time."""
        self.as_base64 = False
        self.shape: Callable[[dict[str, Any]], Any] = lambda body: body
        self._lock = threading.Lock()
        self._random = np.random.default_rng()

    @property
    def url(self) -> str:
        return f"{self.origin}/v1"

    def note(self, path: str, body: dict[str, Any], key: str | None) -> Trouble | None:
        with self._lock:
            if path == "/v1/embeddings":
                self.asked.update(body["input"])
                self.requests.append(body)
                self.keys.add(key)
            return self.troubles.pop(0) if self.troubles else self.always

    def embedded(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The answer's items, in any order."""
        items = []
        for index, text in enumerate(body["input"]):
            vector = vector_of(text[::-1] if self.turned else text, self.dimension)
            with self._lock:
                vector = vector + self._random.normal(size=self.dimension) * self.noise
            given: Any = [float(number) for number in vector]
            if self.as_base64:
                given = base64.b64encode(struct.pack(f"<{len(given)}f", *given)).decode()
            items.append({"object": "embedding", "index": index, "embedding": given})
        random.shuffle(items)
        return items

    def shaped(self, body: dict[str, Any]) -> Any:
        return self.shape(body)


def status(code: int, message: str = "no", **headers: str) -> Trouble:
    """Answers with a status."""

    def trouble(handler: _Handler, _body: dict[str, Any]) -> bool:
        handler.reply({"error": {"message": message}}, code, **headers)
        return True

    return trouble


def cut(handler: _Handler, _body: dict[str, Any]) -> bool:
    """Hangs up in the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(b'{"data": [')
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


def count(handler: _Handler, body: dict[str, Any]) -> bool:
    """Leaves one text out."""
    items = handler.owner.embedded(body)[:-1]
    handler.reply({"object": "list", "data": items})
    return True
