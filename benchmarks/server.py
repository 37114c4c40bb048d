"""An OpenAI-shaped server on the loopback that can be as slow, narrow and toxic as one likes.

    python -m benchmarks.server --port 8000 --latency 0.5 --fault-rate 0.2

It answers Alpaca prompts with Alpaca records (a pure function of the prompt, so reruns agree), can
behave like vLLM (queue, knee, preemptions, ``/metrics``) or like a hosted API (429 beyond so many
in flight or a minute, with or without headers), goes wrong in every way of ``FAULTS``, and keeps a
ledger: what was asked, what was paid for, and how many generations were alive at once.

A fault is drawn from (seed, prompt, attempt), so a run can be repeated. A generation is *paid* when
its tokens were made, whether or not the answer then arrived.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import socket
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, cast

import httptools
import orjson
import uvloop

from benchmarks.capacity import Batching, Job, TokenBucket
from engine.backends.scripted import alpaca_text

__all__ = ["EARLY_FAULTS", "FAULTS", "LATE_FAULTS", "Behaviour", "Ledger", "Server"]

EARLY_FAULTS = (
    "429", "429_bare", "408", "500", "502", "503", "529", "reset", "hang", "garbage", "header_bomb",
)  # fmt: skip
"""Before anything is generated, so nothing is paid."""
LATE_FAULTS = (
    "cut", "reset_midway", "short_length", "truncated_json", "nan", "bad_utf8", "error_in_200",
    "error_event", "no_finish", "done_only", "abort", "stall",
)  # fmt: skip
"""After the tokens were made: paid for, and of no use."""
FAULTS = EARLY_FAULTS + LATE_FAULTS
QUICK_FAULTS = tuple(f for f in FAULTS if f not in ("hang", "stall"))
"""Those that show at once; the other two only after the client's own time-out."""


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What the server is like. Replace ``Server.behaviour`` to change it while it runs."""

    model: str = "toy"
    root: str = "toy"
    owned_by: str = "vllm"
    max_model_len: int | None = 4096
    tells_length: bool = True
    """Whether its list of models says so; if not, an overflow's message does."""
    api_key: str | None = None
    records: int = 3
    """Records in an answer."""
    text: str | None = None
    """One answer to everything, instead of records."""
    latency_s: float = 0.0
    """From question to answer, where ``batching`` does not decide it."""
    batching: Batching | None = None
    slots: int | None = None
    """429 beyond this many in flight."""
    requests_per_min: float | None = None
    tokens_per_min: float | None = None
    quota_headers: bool = True
    retry_after: str | None = "1"
    """The header of a 429, as it is written."""
    faults: tuple[str, ...] = QUICK_FAULTS
    fault_rate: float = 0.0
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields put over each answer, to build shapes that have no name here."""


class Ledger:
    """What the server saw. ``paid`` and ``asked`` count by prompt."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.faults: Counter[str] = Counter()
        self.live = 0
        self.peak_live = 0
        self.hung_up = 0
        """Generations whose client closed the connection before the answer."""
        self.overflows = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def summary(self) -> dict[str, Any]:
        return {
            "requests": self.asked.total(),
            "paid": self.paid.total(),
            "paid_twice": sum(n - 1 for n in self.paid.values()),
            "statuses": {str(k): v for k, v in self.statuses.items()},
            "faults": dict(self.faults),
            "live": self.live,
            "peak_live": self.peak_live,
            "hung_up": self.hung_up,
            "overflows": self.overflows,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }


class Server:
    """``async with Server(Behaviour(…)) as server`` listens on a free loopback port at ``url``."""

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour or Behaviour()
        self.ledger = Ledger()
        self.requests: TokenBucket | None = None
        self.tokens: TokenBucket | None = None
        self.port = 0
        self.paths: Counter[str] = Counter()
        self.peers: set[_Peer] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, port: int = 0, *, ssl: Any = None) -> None:
        if self.behaviour.requests_per_min:
            self.requests = TokenBucket(self.behaviour.requests_per_min)
        if self.behaviour.tokens_per_min:
            self.tokens = TokenBucket(self.behaviour.tokens_per_min)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Peer(self), "127.0.0.1", port, backlog=8192, ssl=ssl
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the port and every connection, as a killed process does."""
        if self._server is not None:
            self._server.close()
        for peer in list(self.peers):
            peer.reset()

    async def __aenter__(self) -> Server:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    def draw_fault(self, key: str) -> str | None:
        behaviour = self.behaviour
        if not behaviour.fault_rate:
            return None
        rng = random.Random(f"{behaviour.seed} {key} {self.ledger.asked[key]}")
        return rng.choice(behaviour.faults) if rng.random() < behaviour.fault_rate else None

    def metrics(self) -> bytes:
        engine = self.behaviour.batching
        running = engine.running if engine else self.ledger.live
        waiting = engine.waiting if engine else 0
        preemptions = engine.preemptions if engine else 0.0
        label = f'{{engine="0",model_name="{self.behaviour.model}"}}'
        return (
            f"vllm:num_requests_running{label} {float(running)}\n"
            f"vllm:num_requests_waiting{label} {float(waiting)}\n"
            f"vllm:num_preemptions_total{label} {preemptions}\n"
        ).encode()


class _Peer(asyncio.Protocol):
    """One connection of a client."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpRequestParser(self)
        self._generation: _Generation | None = None
        self._path = b""
        self._key = ""
        self._body: list[bytes] = []

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
        if chat:
            prompts = [asked["messages"][-1]["content"]]
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
        if fault in EARLY_FAULTS and fault != "hang":
            self._fail_early(fault)
            return
        texts = [
            behaviour.text
            if behaviour.text is not None
            else alpaca_text(prompt, seed=asked.get("seed"), records=behaviour.records)
            for prompt in prompts
        ]
        generation = _Generation(self, server, asked, chat, keys, texts, prompt_tokens, fault)
        self._generation = generation
        generation.start()

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

    def _quota_headers(self) -> list[tuple[str, str]]:
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
        elif fault == "header_bomb":
            self.raw(b"HTTP/1.1 200 OK\r\nx-bomb: " + b"a" * 2**20, close=True)
        else:
            self.error(int(fault), "The server had an error")

    # Writing

    def throttle(self, wait_s: float | None) -> None:
        behaviour = self._server.behaviour
        retry_after = behaviour.retry_after if wait_s is None else f"{wait_s:.3f}"
        headers = self._quota_headers() if behaviour.quota_headers else []
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
        self.write(status, orjson.dumps(body), headers=self._quota_headers())

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
            + body
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


class _Generation:
    """One answer in the making: alive in the ledger from ``start`` until its end or a hang-up."""

    def __init__(
        self,
        peer: _Peer,
        server: Server,
        asked: dict[str, Any],
        chat: bool,
        keys: list[str],
        texts: list[str],
        prompt_tokens: int,
        fault: str | None,
    ) -> None:
        self._peer = peer
        self._server = server
        self._asked = asked
        self._chat = chat
        self._keys = keys
        self._texts = texts
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = sum(max(len(text) // 4, 1) for text in texts)
        self._fault = fault
        self._live = False
        self._job: Job | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        behaviour, ledger = self._server.behaviour, self._server.ledger
        self._live = True
        ledger.live += 1
        ledger.peak_live = max(ledger.peak_live, ledger.live)
        if self._fault == "hang":
            return
        if behaviour.batching is not None:
            self._job = behaviour.batching.submit(
                self._completion_tokens, self._prompt_tokens, self._finish
            )
        elif behaviour.latency_s:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(behaviour.latency_s, self._finish)
        else:
            self._finish()

    def hang_up(self) -> None:
        """The client is gone: stop generating, as vLLM does."""
        if self._live:
            self._end()
            self._server.ledger.hung_up += 1
            if self._job is not None and self._server.behaviour.batching is not None:
                self._server.behaviour.batching.cancel(self._job)
            if self._timer is not None:
                self._timer.cancel()

    def _end(self) -> None:
        self._live = False
        self._server.ledger.live -= 1

    def _finish(self) -> None:
        ledger = self._server.ledger
        ledger.paid.update(self._keys)
        ledger.prompt_tokens += self._prompt_tokens
        ledger.completion_tokens += self._completion_tokens
        if self._fault == "stall":  # half an answer, and then nothing: still alive
            self._peer.raw(b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n{")
            return
        self._end()
        if self._asked.get("stream"):
            self._write_stream()
        else:
            self._write_whole()

    def _choices(self, part: str, finish: str | None) -> list[dict[str, Any]]:
        return [
            {
                "index": i,
                "finish_reason": finish,
                **(
                    {part: {"role": "assistant", "content": text}} if self._chat else {"text": text}
                ),
            }
            for i, text in enumerate(self._texts)
        ]

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
        }

    def _write_whole(self) -> None:
        fault, behaviour, peer = self._fault, self._server.behaviour, self._peer
        finish = {"no_finish": None, "done_only": None, "abort": "abort"}.get(fault or "", "stop")
        answer = {
            "id": "cmpl-0",
            "object": "text_completion",
            "model": behaviour.model,
            "choices": self._choices("message", finish),
            "usage": self._usage(),
            **behaviour.extra,
        }
        if fault in ("error_in_200", "error_event"):
            answer = {"error": {"message": "the engine died", "type": "InternalServerError"}}
        body = orjson.dumps(answer)
        half = len(body) // 2
        if fault in ("cut", "short_length"):
            peer.write(200, body[:half], length=len(body))
            peer.raw(b"", close=True)
        elif fault == "reset_midway":
            peer.write(200, body[:half], length=len(body))
            peer.reset()
        elif fault == "truncated_json":
            peer.write(200, body[:half])
        elif fault == "nan":
            peer.write(200, b'{"choices":[{"index":0,"text":"x","logprob":NaN}]}')
        elif fault == "bad_utf8":
            peer.write(200, body.replace(b'"text"', b'"te\xff\xfext"', 1)[:-1] + b"\xc3}")
        else:
            peer.write(200, body, headers=peer._quota_headers())

    def _write_stream(self) -> None:
        fault, behaviour, peer = self._fault, self._server.behaviour, self._peer
        events: list[bytes] = []
        for finish, texts in ((None, self._texts), ("stop", [""] * len(self._texts))):
            whole, self._texts = self._texts, texts
            event = {"id": "cmpl-0", "model": behaviour.model, **behaviour.extra}
            event["choices"] = self._choices("delta", finish)
            events.append(orjson.dumps(event))
            self._texts = whole
        events.append(
            orjson.dumps({"model": behaviour.model, "choices": [], "usage": self._usage()})
        )
        events.append(b"[DONE]")
        died = b'{"error":{"message":"the engine died","type":"InternalServerError","code":500}}'
        if fault in ("error_in_200", "error_event"):
            events = [events[0], died, b"[DONE]"]
        elif fault in ("no_finish", "done_only"):
            events = [events[0], b"[DONE]"]
        elif fault == "abort":
            events[1] = events[1].replace(b'"stop"', b'"abort"')
        elif fault in ("truncated_json", "nan", "bad_utf8"):
            events[0] = events[0][: len(events[0]) // 2] + (b"\xff" if fault == "bad_utf8" else b"")
        cut = fault in ("cut", "short_length", "reset_midway")
        peer._server.ledger.statuses[200] += 1
        body = b"".join(b"data: %b\n\n" % event for event in (events[:1] if cut else events))
        more = "".join(f"{k}: {v}\r\n" for k, v in peer._quota_headers())
        head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{more}"
        peer.raw(
            f"{head}transfer-encoding: chunked\r\n\r\n".encode()
            + (b"%x\r\n%b\r\n" % (len(body), body))
            + (b"" if cut else b"0\r\n\r\n"),
            close=cut and fault != "reset_midway",
        )
        if fault == "reset_midway":
            peer.reset()


def _key(prompt: str, seed: int | None) -> str:
    return hashlib.blake2b(f"{seed}\n{prompt}".encode(), digest_size=8).hexdigest()


async def serve(behaviour: Behaviour, port: int) -> None:
    server = Server(behaviour)
    await server.start(port)
    print(f"listening on {server.url}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", default="toy")
    parser.add_argument("--records", type=int, default=3, help="records in an answer")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds to an answer")
    parser.add_argument("--slots", type=int, help="429 beyond this many in flight")
    parser.add_argument("--requests-per-min", type=float)
    parser.add_argument("--tokens-per-min", type=float)
    parser.add_argument(
        "--max-num-seqs", type=int, help="behave like vLLM with this many sequences"
    )
    parser.add_argument("--kv-tokens", type=int, help="with --max-num-seqs: room in its cache")
    parser.add_argument("--fault-rate", type=float, default=0.0, help="share of requests that fail")
    parser.add_argument("--faults", default=",".join(QUICK_FAULTS), help="comma-separated kinds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    batching = None
    if args.max_num_seqs:
        batching = Batching(max_num_seqs=args.max_num_seqs, kv_tokens=args.kv_tokens)
    behaviour = Behaviour(
        model=args.model,
        root=args.model,
        owned_by="vllm" if batching else "toy",
        records=args.records,
        latency_s=args.latency,
        batching=batching,
        slots=args.slots,
        requests_per_min=args.requests_per_min,
        tokens_per_min=args.tokens_per_min,
        fault_rate=args.fault_rate,
        faults=tuple(args.faults.split(",")),
        seed=args.seed,
    )
    uvloop.run(serve(behaviour, args.port))


if __name__ == "__main__":
    main()
