"""Providers of batches on the loopback, with a ledger of what is paid; ``shapes`` has them.

A double is no kinder than its provider: it wants the key, knows its own routes and limits alone,
lists a new batch late, works on it between two looks, answers in any order, and books each line
that it answers.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlsplit

import orjson

from engine.backends.scripted import alpaca_text
from tests.engine.loopback import Loopback

__all__ = [
    "KEY",
    "Batch",
    "Line",
    "Provider",
    "Said",
    "Words",
    "answer_elsewhere",
    "chat_answer",
    "error",
]

KEY = "batch-key-91b4e7d02c6f4a58"
Words = Mapping[str, str]
Said = tuple[int, Any]
"""Status, and JSON, or bytes as they are."""


def error(message: str, code: str | None = None, kind: str = "invalid_request_error") -> Any:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def chat_answer(body: Mapping[str, Any]) -> dict[str, Any]:
    """The whole answer to a chat, live or in a batch: a function of what was asked."""
    asked = body["messages"][-1]["content"]
    text = alpaca_text(asked, seed=body.get("seed"))
    prompt, completion = len(asked) // 4, len(text) // 4
    return {
        "id": "x-1",
        "object": "chat.completion",
        "model": body["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
    }


def answer_elsewhere(requests: Path, answers: Path, lines: slice = slice(None)) -> None:
    """What a cluster makes of a file of requests, in another order; only these lines of it."""
    made = [
        {
            "id": "v",
            "custom_id": asked["custom_id"],
            "response": {"status_code": 200, "body": chat_answer(asked["body"])},
            "error": None,
        }
        for asked in map(orjson.loads, reversed(requests.read_bytes().splitlines()))
    ]
    answers.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in made[lines]))


@dataclass(slots=True)
class Line:
    """One request of a batch; ``body`` in OpenAI's words."""

    id: str
    body: dict[str, Any]
    kind: str = "waiting"
    """Then ``answered``, ``expired``, ``cancelled`` or ``failed``."""
    answer: Any = None
    status: int = 200

    @property
    def key(self) -> tuple[str, Any]:
        """What was asked, whatever it is called."""
        return self.body["messages"][-1]["content"], self.body.get("seed")


@dataclass(slots=True, eq=False)
class Batch:
    id: str
    tag: str
    file: str
    lines: list[Line]
    state: str = "validating"
    looks: int = 0
    listed_after: int = 0
    failure: Any = None
    deleted: bool = False
    files: dict[str, str] = field(default_factory=dict)
    number: int = 0

    @property
    def ended(self) -> bool:
        return self.state in ("completed", "failed", "expired", "cancelled")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a double is quiet."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self) -> None:
        provider: Provider = self.server.owner  # type: ignore[attr-defined]
        headers = {name.lower(): value for name, value in self.headers.items()}
        said = provider.respond(self.command, self.path, headers, self._body())
        status, body = said[:2]
        more: Any = said[2:]
        if status == 0:  # the connection breaks before the answer
            self.close_connection = True
            return
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, value in (more[0] if more else {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request of a client."""

    method: str
    path: str
    query: Mapping[str, str]
    raw: bytes
    headers: Mapping[str, str]


class Provider(Loopback):
    """One provider. Attributes say how it behaves; subclasses what it says.

    Use it as a context manager: it then listens at ``url``.
    """

    handler = _Handler
    name: ClassVar[str]
    takes_seed: ClassVar[bool] = True
    root: ClassVar[str] = "/v1"
    """Path of the base URL that a run is given."""

    def __init__(self, **behaviour: Any) -> None:
        self.looks = 2
        """Looks at a batch until it is done."""
        self.listed_late = 0
        """Lists in which a new batch is missing."""
        self.expires: float | None = None
        """The share of a batch's lines after which the next batch expires; once."""
        self.twice = 0
        """Lines that each file of answers has twice."""
        self.cut = 0
        """Downloads that are cut within a line, though they look whole."""
        self.quota = 0
        """Batches that are refused late, since too much is enqueued."""
        self.flag: int | None = None
        """Every so manieth line is refused for what it is about."""
        self.faults = 0
        """Every so manieth line fails by a fault of the provider's, once."""
        self.lost_creates = 0
        """Creates that succeed, and whose answer never arrives."""
        self.unknown_fields: set[str] = set()
        """Fields that it refuses in every line."""
        for name, value in behaviour.items():
            assert hasattr(self, name), name
            setattr(self, name, value)
        self.paid: Counter[tuple[str, Any]] = Counter()
        """How often each request was answered in a batch."""
        self.live: Counter[tuple[str, Any]] = Counter()
        """The same, of live ones."""
        self.files: dict[str, bytes] = {}
        self.names: dict[str, str] = {}
        self.batches: dict[str, Batch] = {}
        self.created = 0
        self.deleted: set[str] = set()
        self._faulted: set[Any] = set()
        self._lock = threading.RLock()
        self._draw = random.Random(7)

    # What all have

    def add_file(self, data: bytes, name: str) -> str:
        id = f"file-{len(self.names):04d}abc"
        self.files[id], self.names[id] = data, name
        return id

    def make(self, lines: list[Line], *, tag: str = "", file: str = "") -> Batch:
        self.created += 1
        batch = Batch(
            id=self.batch_id(self.created), tag=tag, file=file, lines=lines,
            listed_after=self.listed_late, number=self.created,
        )  # fmt: skip
        self.batches[batch.id] = batch
        return batch

    def batch_id(self, number: int) -> str:
        return f"batch_{number:04d}"

    def look(self, batch: Batch) -> None:
        """Work goes on between two looks."""
        batch.looks += 1
        if batch.ended:
            return
        batch.state = "cancelling" if batch.state == "cancelling" else "in_progress"
        if batch.looks < self.looks and batch.state != "cancelling":
            return
        if self.quota:
            self.quota -= 1
            batch.state = "failed"
            batch.failure = {
                "code": "token_limit_exceeded",
                "message": "Enqueued token limit reached for m in organization o.",
            }
            return
        end = len(batch.lines)
        if batch.state == "cancelling":
            end, batch.state = end // 3, "cancelled"
        elif self.expires is not None:
            end, self.expires, batch.state = int(end * self.expires), None, "expired"
        else:
            batch.state = "completed"
        for number, line in enumerate(batch.lines):
            if number >= end:
                line.kind = "expired" if batch.state == "expired" else "cancelled"
            else:
                self.work(line, number)
        self.finish(batch)

    def work(self, line: Line, number: int) -> None:
        """Answer one line, or refuse it, which costs nothing."""
        if unknown := self.unknown_fields & line.body.keys():
            name = min(unknown)
            line.kind, line.status = "failed", 400
            line.answer = {
                "error": {
                    "message": f"Unsupported parameter: '{name}' is not supported.",
                    "type": "invalid_request_error",
                    "param": name,
                    "code": "unsupported_parameter",
                }
            }
        elif self.flag is not None and number % self.flag == 0:
            line.kind, line.status = "failed", 400
            line.answer = error("flagged by the content policy", "content_policy_violation")
        elif self.faults and number % self.faults == 1 and line.key not in self._faulted:
            self._faulted.add(line.key)
            line.kind, line.status = "failed", 500
            line.answer = error("The server had an error", None, "server_error")
        else:
            line.kind, line.answer = "answered", chat_answer(line.body)
            self.paid[line.key] += 1

    def finish(self, batch: Batch) -> None:
        """Make the files of an ended batch."""

    def shuffled(self, lines: list[bytes]) -> bytes:
        """A file of these lines, in any order, some of them twice."""
        lines = [*lines, *lines[: self.twice]]
        self._draw.shuffle(lines)
        return b"".join(lines)

    def given(self, data: bytes) -> bytes:
        """What a download of a file gives."""
        if self.cut and data.count(b"\n") > 1:
            self.cut -= 1
            return data[: len(data) * 2 // 3]
        return data

    def list(self) -> list[Batch]:
        """Newest first; without those that are too new."""
        shown = []
        for batch in reversed(self.batches.values()):
            if batch.listed_after > 0:
                batch.listed_after -= 1
            elif not batch.deleted:
                shown.append(batch)
        return shown

    # What each says

    def key_of(self, headers: Mapping[str, str]) -> str:
        return headers.get("authorization", "").removeprefix("Bearer ")

    def route(self, asked: Asked) -> Said:
        raise NotImplementedError

    def respond(self, method: str, target: str, headers: Mapping[str, str], raw: bytes) -> Said:
        parts = urlsplit(target)
        if self.key_of(headers) != KEY:
            return 401, error("Incorrect API key provided", "invalid_api_key")
        with self._lock:
            if method == "GET" and parts.path == f"{self.root}/models":
                return 200, {"object": "list", "data": [{"id": "m", "object": "model"}]}
            if method == "POST" and parts.path == f"{self.root}/chat/completions":
                body = orjson.loads(raw)
                if not self.takes_seed:
                    body.pop("seed", None)
                self.live[body["messages"][-1]["content"], body.get("seed")] += 1
                return 200, chat_answer(body)
            query = dict(parse_qsl(parts.query))
            return self.route(
                Asked(method=method, path=parts.path, query=query, raw=raw, headers=headers)
            )

    @property
    def url(self) -> str:
        return self.origin + self.root


def form_of(raw: bytes, content_type: str) -> tuple[dict[str, str], bytes, str]:
    """Fields, file and its name of a multipart form."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + raw)
    fields, data, name = {}, b"", ""
    for part in message.iter_parts():
        payload = part.get_payload(decode=True)
        assert isinstance(payload, bytes)
        if part.get_filename():
            data, name = payload, str(part.get_filename())
        else:
            fields[str(part.get_param("name", header="content-disposition"))] = payload.decode()
    return fields, data, name
