"""A host on the loopback: what all doubles share. ``doubles.py`` has the hosts.

A double is no kinder than its host: it wants the key in the host's header, knows the host's routes
and fields alone, refuses in the host's words, and says of models, usage and limits what the host
says and no more.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlsplit

import orjson

from engine.backends.scripted import alpaca_text
from tests.engine.loopback import Loopback

__all__ = ["FIELDS", "KEY", "THOUGHT", "Answer", "Double", "Refusal", "openai_error"]

KEY = "host-key-5f0c9b7e21d84a36"
"""What a double takes as its key."""
THOUGHT = "The list goes on, so I write further tasks of different kinds."
FIELDS = frozenset(
    (
        *("model", "messages", "prompt", "max_tokens", "temperature", "top_p", "stop", "seed"),
        *("stream", "stream_options", "n", "logprobs", "presence_penalty", "frequency_penalty"),
    )
)
"""What most hosts know; those that are strict refuse the rest."""
Answer = dict[str, Any]
Refusal = tuple[int, Any]
"""Status and body: JSON, or bytes as they are."""


def openai_error(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: Any = None
) -> Answer:
    """An error as OpenAI words it, and most others after it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a double is quiet."""

    def _answer(self) -> None:
        double: Double = self.server.owner  # type: ignore[attr-defined]
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = double.respond(self.command, self.path, headers, raw)
        if len(answer) == 2:
            status, said = answer
            kind = "text/html" if isinstance(said, bytes) else "application/json"
            self._send(status, said if isinstance(said, bytes) else orjson.dumps(said), kind)
            return
        api, text, body = answer
        if body.get("stream"):
            self._stream(double, api, text, body)
            return
        whole = double.envelope(api, streamed=False)
        whole |= {"choices": [double.choice(api, text)], "usage": double.counts(body, text)}
        self._send(200, double.before_body() + orjson.dumps(whole), "application/json")

    def _send(self, status: int, raw: bytes, kind: str) -> None:
        self._head(status, kind, {"Content-Length": str(len(raw))})
        self.wfile.write(raw)

    def _head(self, status: int, kind: str, more: Mapping[str, str]) -> None:
        double: Double = self.server.owner  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in {**double.headers(), **more}.items():
            self.send_header(name, value)
        self.end_headers()

    def _stream(self, double: Double, api: str, text: str, body: Answer) -> None:
        self._head(200, "text/event-stream; charset=utf-8", {"Transfer-Encoding": "chunked"})
        if double.keeps_alive:
            self._chunk(double.keeps_alive.encode() + b"\n\n")
        if (first := double.first_event()) is not None:
            self._event(first)
        asked = (body.get("stream_options") or {}).get("include_usage", False)
        events = list(double.events(api, text))
        for at, choice in enumerate(events):
            event = {**double.envelope(api, streamed=True), "choices": [choice]}
            if double.always_counts and at == len(events) - 1:
                event["usage"] = double.counts(body, text)
            self._event(event)
        if asked and not double.always_counts:
            usage = double.counts(body, text)
            self._event({**double.envelope(api, streamed=True), "choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, event: Answer) -> None:
        self._chunk(b"data: " + orjson.dumps(event) + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))


class Double(Loopback):
    """One host. Attributes say what it is like; methods what it says.

    Use it as a context manager: it then listens at ``url``.
    """

    handler = _Handler
    row: ClassVar[str]
    """The host's name in docs/hosts.md."""
    root: ClassVar[str] = "/v1"
    """Path of the API."""
    model: ClassVar[str]
    completions: ClassVar[bool] = False
    """It has them, besides chats."""
    finish_of_completions: ClassVar[str] = "stop"
    keeps_alive: ClassVar[str] = ""
    """A comment in its streams before there is a token."""
    always_counts: ClassVar[bool] = False
    """A stream tells its usage unasked."""
    learnt: ClassVar[Mapping[str, Any]] = {}
    """What a run must have learnt about it."""
    told: ClassVar[frozenset[str]] = frozenset()
    """Of cached_tokens, reasoning_tokens and cost: what its usage tells."""
    context_length: ClassVar[int | None] = None
    """What its list of models tells."""
    flagged_as: ClassVar[str] = ""
    """Why a flagged prompt fails; empty: it flags none."""

    def __init__(self, *, flag: int | None = None) -> None:
        self.refused: Counter[str] = Counter()
        """Refusals, by what they complain of."""
        self.answered = 0
        self.flag = flag
        """The how-manieth of the different prompts is flagged."""
        self._prompts: list[str] = []
        self._lock = threading.Lock()

    # What a host says

    def models(self) -> Any:
        """The answer to ``GET /models``; a Refusal where there is none."""
        return {"object": "list", "data": [self.card(self.model)]}

    def card(self, name: str) -> Answer:
        return {"id": name, "object": "model", "created": 1700000000, "owned_by": "somebody"}

    def key_of(self, headers: Mapping[str, str]) -> str:
        """The key that came with a request, whose headers' names are in lower case."""
        return headers.get("authorization", "").removeprefix("Bearer ")

    def wrong_key(self) -> Refusal:
        return 401, openai_error("Incorrect API key provided: host****.", code="invalid_api_key")

    def no_route(self, path: str) -> Refusal:
        return 404, {"detail": "Not Found"}

    def refusal(self, body: Answer, query: Mapping[str, str]) -> tuple[str, Refusal] | None:
        """Of a request that it does not take: what it complains of, and how."""
        return None

    def flagged(self, prompt: str) -> Refusal:
        raise NotImplementedError

    def headers(self) -> Mapping[str, str]:
        """Further headers of answers: rate limits."""
        return {}

    def usage(self, prompt_tokens: int, completion_tokens: int) -> Answer:
        total = prompt_tokens + completion_tokens
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": total,
        }

    def envelope(self, api: str, *, streamed: bool) -> Answer:
        kind = {"chat": "chat.completion", "completions": "text_completion"}[api]
        kind += ".chunk" if streamed and api == "chat" else ""
        return {"id": "x-1", "object": kind, "created": 1700000000, "model": self.model}

    def message(self, text: str) -> Answer:
        """A chat's whole answer."""
        return {"role": "assistant", "content": text}

    def deltas(self, text: str) -> Iterator[Answer]:
        """A chat's answer in pieces."""
        yield {"role": "assistant", "content": ""}
        for at in range(0, len(text), 80):
            yield {"content": text[at : at + 80]}

    def choice(self, api: str, text: str) -> Answer:
        said = {"text": text} if api == "completions" else {"message": self.message(text)}
        return {"index": 0, **said, "logprobs": None, "finish_reason": self._finish(api)}

    def events(self, api: str, text: str) -> Iterator[Answer]:
        """A stream's events with choices."""
        pieces = (
            ({"delta": delta} for delta in self.deltas(text))
            if api == "chat"
            else ({"text": text[at : at + 80]} for at in range(0, len(text), 80))
        )
        for piece in pieces:
            yield {"index": 0, **piece, "finish_reason": None}
        last: Answer = {"delta": {}} if api == "chat" else {"text": ""}
        yield {"index": 0, **last, "finish_reason": self._finish(api)}

    def _finish(self, api: str) -> str:
        return "stop" if api == "chat" else self.finish_of_completions

    def first_event(self) -> Answer | None:
        """An event before the first token."""
        return None

    def before_body(self) -> bytes:
        """What comes before a whole answer's JSON."""
        return b""

    @property
    def url(self) -> str:
        return self.origin

    def respond(
        self, method: str, path: str, headers: Mapping[str, str], raw: bytes
    ) -> Refusal | tuple[str, str, Answer]:
        """A refusal, or (api, text, request) of what is to be answered."""
        parts = urlsplit(path)
        query = dict(parse_qsl(parts.query))
        if self.key_of(headers) != KEY:
            return self._refuse("key", self.wrong_key())
        if (method, parts.path) == ("GET", f"{self.root}/models"):
            found = self.models()
            return found if isinstance(found, tuple) else (200, found)
        routes = {f"{self.root}/chat/completions": "chat"}
        routes |= {f"{self.root}/completions": "completions"} if self.completions else {}
        if method != "POST" or parts.path not in routes:
            return self._refuse("route", self.no_route(parts.path))
        body = orjson.loads(raw)
        if complaint := self.refusal(body, query):
            return self._refuse(*complaint)
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        with self._lock:
            if prompt not in self._prompts:
                self._prompts.append(prompt)
            flagged = self.flag is not None and self._prompts.index(prompt) == self.flag
        if flagged:
            return self._refuse("prompt", self.flagged(prompt))
        with self._lock:
            self.answered += 1
        text = alpaca_text(prompt, seed=body.get("seed"))
        return routes[parts.path], text, body

    def _refuse(self, what: str, refusal: Refusal) -> Refusal:
        with self._lock:
            self.refused[what] += 1
        return refusal

    def counts(self, body: Answer, text: str) -> Answer:
        """The usage of a request and its answer."""
        asked = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        return self.usage(len(asked) // 4, len(text) // 4)
