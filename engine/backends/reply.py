"""What a server sends for one call, whole or in events, and whether that is an answer.

Each prompt needs its choice and each choice its ``finish_reason``; an error, wherever it comes,
outweighs the rest. What a batch is billed for is one sum, so its shares are estimates that add up
to it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import httpx
import orjson

from engine.backends.base import Failure, Verdict
from engine.backends.classify import clean
from engine.errors import ConfigError
from engine.records import Completion, Prompt, Usage

__all__ = ["Reply", "Unpacker", "parsed"]

TELLING = (b'"message"', b'"content"', b'"text"', b'"finish_reason"', b'"delta"')
"""Keys of which a choice has one each. Within a text, quotes are escaped."""


class Reply:
    """What one call's events add up to, whole or streamed. Choices are told apart by ``index``."""

    def __init__(self, count: int) -> None:
        self.texts: list[list[str]] = [[] for _ in range(count)]
        self.finish: list[str | None] = [None] * count
        self.refused = [False] * count
        self.usage: Any = None
        self.model = ""
        self.error: bytes | None = None
        self.started = False
        self.done = False
        self.ttft_s: float | None = None

    @classmethod
    def whole(cls, data: Any, count: int) -> Reply:
        answer = cls(count)
        answer.add(data, "message")
        return answer

    def event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        try:
            event = _json(data, len(self.texts))
        except (ValueError, RecursionError) as exc:
            message = f"an event is not JSON: {clean(str(exc))}"
            raise Failure(Verdict(kind="ambiguous", reason="bad_stream", message=message)) from exc
        self.add(event, "delta")

    def add(self, data: Any, part: str) -> None:
        if not isinstance(data, dict):
            raise Failure(Verdict(kind="ambiguous", reason="bad_json", message="not a JSON object"))
        if data.get("error"):
            self.error = orjson.dumps({"error": data["error"]})
            return
        if isinstance(data.get("model"), str):
            self.model = data["model"]
        if data.get("usage"):
            self.usage = data["usage"]
        choices = data.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            self._add_choice(choice, part)

    def _add_choice(self, choice: Any, part: str) -> None:
        index = choice.get("index", 0) if isinstance(choice, dict) else None
        if not isinstance(index, int) or not 0 <= index < len(self.texts):
            raise Failure(
                Verdict(kind="ambiguous", reason="bad_json", message="a choice out of range")
            )
        message = choice.get(part)
        text = choice.get("text") if message is None else None
        if isinstance(message, dict):
            text = message.get("content")
            self.refused[index] |= bool(message.get("refusal"))
        if isinstance(text, str):
            self.texts[index].append(text)
            self.started = True
        if choice.get("finish_reason") is not None:
            self.finish[index] = str(choice["finish_reason"])

    def completions(
        self, prompts: Sequence[Prompt], latency_s: float
    ) -> list[Completion | BaseException]:
        usages = self._usages(prompts)
        return [
            self._completion(i, usage, latency_s)
            for i, usage in zip(range(len(prompts)), usages, strict=True)
        ]

    def _completion(self, i: int, usage: Usage, latency_s: float) -> Completion | Failure:
        finish = self.finish[i]
        if finish is None:
            if not self.texts[i] and self.model and not self.done:
                return Failure(
                    Verdict(kind="dead", reason="no_choices", message="no choice for the prompt")
                )
            return Failure(Verdict(kind="ambiguous", reason="cut_body", message="no finish_reason"))
        if finish in ("abort", "error"):
            return Failure(
                Verdict(
                    kind="ambiguous", reason=f"finish_{finish}", message="given up by the server"
                )
            )
        if self.refused[i]:
            finish = "refusal"
        elif not self.texts[i] and finish in ("stop", "length"):
            return Failure(Verdict(kind="dead", reason="no_content", message="the content is null"))
        return Completion(
            text="".join(self.texts[i]),
            finish_reason=finish,
            usage=usage,
            model=self.model,
            latency_s=latency_s,
            ttft_s=self.ttft_s,
        )

    def _usages(self, prompts: Sequence[Prompt]) -> list[Usage]:
        """Each prompt's share. A batch is billed as one sum, so its shares are estimates."""
        usage = self.usage if isinstance(self.usage, dict) else {}
        p, c = usage.get("prompt_tokens"), usage.get("completion_tokens")
        told = (p, c) if isinstance(p, int) and isinstance(c, int) and min(p, c) >= 0 else None
        if told and len(prompts) == 1:
            return [Usage(prompt_tokens=told[0], completion_tokens=told[1])]
        read = [q.tokens or max(len(q.text.encode()) // 4, 1) for q in prompts]
        written = [max(sum(map(len, parts)) // 4, 1) if parts else 0 for parts in self.texts]
        if told:
            read, written = _shares(told[0], read), _shares(told[1], written)
        return [
            Usage(prompt_tokens=r, completion_tokens=w, estimated=True)
            for r, w in zip(read, written, strict=True)
        ]


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to ``weights`` whose sum is ``total``."""
    scale = sum(weights) or 1
    ends = [0]
    for weight in weights:
        ends.append(ends[-1] + weight)
    cuts = [total * end // scale for end in ends[:-1]] + [total]
    return [b - a for a, b in pairwise(cuts)]


def parsed(raw: bytes, response: httpx.Response, where: str, choices: int = 1) -> Any:
    """A whole answer's JSON, with at most so many ``choices``. Raises Failure."""
    try:
        return _json(raw, choices)
    except (ValueError, RecursionError) as exc:
        if "html" in response.headers.get("content-type", "") or raw[:200].lstrip().startswith(
            b"<"
        ):
            error = ConfigError(f"{where}: not an OpenAI endpoint (got HTML); check the base URL")
            raise Failure(
                Verdict(kind="fatal", reason="html", message=str(error), error=error)
            ) from exc
        raise Failure(
            Verdict(kind="ambiguous", reason="bad_json", message=clean(str(exc)))
        ) from exc


def _json(raw: bytes, choices: int) -> Any:
    """Raises ValueError also where an object has a key twice: of two answers under one key nobody
    knows which was meant.
    """
    data = orjson.loads(raw)
    if raw.count(b'"choices"') > 1 or any(raw.count(key) > choices for key in TELLING):
        json.loads(raw, object_pairs_hook=_each_key_once)
    return data


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError(f"a key comes twice in one object, among {', '.join(data)}")
    return data


class Unpacker:
    """Takes an answer's pieces as they come and gives them back unpacked: we ask for no packing,
    but some proxies pack all the same.

    Raises Failure where the answer grows beyond ``limit`` bytes.
    """

    def __init__(self, encoding: str, limit: int) -> None:
        self._left = limit
        self._limit = limit
        self._decompressor: Any = None
        if encoding in ("gzip", "deflate"):
            self._decompressor = zlib.decompressobj(zlib.MAX_WBITS | 32)
        elif encoding not in ("identity", ""):
            message = f"packed as {clean(encoding)}, unasked"
            raise Failure(Verdict(kind="dead", reason="encoding", message=message))

    def __call__(self, piece: bytes) -> bytes:
        if self._decompressor is not None:
            piece = self._decompressor.decompress(piece, self._left + 1)
        self._left -= len(piece)
        if self._left < 0:
            message = f"an answer of more than {self._limit} bytes"
            raise Failure(Verdict(kind="dead", reason="too_large", message=message))
        return piece
