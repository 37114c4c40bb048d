"""One answer in the making, whole or streamed, and all that can go wrong with it."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import orjson

from benchmarks.capacity import Job

if TYPE_CHECKING:
    from benchmarks.server.peer import Peer
    from benchmarks.server.server import Server

__all__ = ["Generation"]


class Generation:
    """One answer in the making: alive in the ledger from ``start`` until its end or a hang-up."""

    def __init__(
        self,
        peer: Peer,
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
            spread = behaviour.latency_spread
            latency_s = behaviour.latency_s * random.uniform(1 - spread, 1 + spread)
            self._timer = loop.call_later(latency_s, self._finish)
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
            peer.write(200, body, headers=peer.quota_headers())

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
        self._server.ledger.statuses[200] += 1
        body = b"".join(b"data: %b\n\n" % event for event in (events[:1] if cut else events))
        more = "".join(f"{k}: {v}\r\n" for k, v in peer.quota_headers())
        head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{more}"
        peer.raw(
            f"{head}transfer-encoding: chunked\r\n\r\n".encode()
            + (b"%x\r\n%b\r\n" % (len(body), body))
            + (b"" if cut else b"0\r\n\r\n"),
            close=peer.last or (cut and fault != "reset_midway"),
        )
        if fault == "reset_midway":
            peer.reset()
