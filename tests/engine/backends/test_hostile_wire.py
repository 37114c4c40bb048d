"""A megabyte of each hostile kind through every parser of the wire: read in linear time."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from contextlib import suppress

import httpx
import orjson
import pytest

from engine.backends.base import Failure
from engine.backends.openai.dialect import Dialect
from engine.backends.openai.error_body import clean, read_error
from engine.backends.openai.gauges import read_gauges
from engine.backends.openai.reply import Events, Reply, Unpacker, parsed
from engine.backends.openai.served import find_model, listed, read_models
from engine.backends.openai.verdicts import classify, retry_after_s
from engine.records import Completion, Usage
from engine.thoughts import thoughts_apart
from tests.engine.wire import prompt
from tests.linear import in_linear_time

SIZE = 1_000_000
JSON = httpx.Response(200)


def filled(unit: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    return before + unit * (SIZE // len(unit)) + after


KINDS = {
    "newlines": filled(b"\n"),
    "blanks": filled(b" "),
    "digits": filled(b"9"),
    "zero bytes": filled(b"\0"),
    "no UTF-8": filled(b"\xff"),
    "escape sequences": filled(b"\x1b[31m"),
    "an escape without an end": filled(b"0;", b"\x1b["),
    "brackets": filled(b"["),
    "objects in objects": filled(b'{"error":'),
    "arrays that end": filled(b"[", after=b"]" * SIZE),
    "arrays as deep as can be read": b"[" * 1000 + filled(b" ") + b"]" * 1000,
    "tags": filled(b"<title"),
    "a page": filled(b"<", b"<html><title>"),
    "numbers and words": filled(b"1 tokens ", b'{"error":{"message":"', b'"}}'),
    "limits": filled(b"max_tokens limit of ", b'{"error":{"message":"', b'9"}}'),
    "waits": filled(b"try again in 1", b'{"error":{"message":"', b'"}}'),
    "digits of a wait": filled(b"1", b'{"error":{"message":"try again in ', b'"}}'),
    "names of fields": filled(b"seed stop ", b'{"error":{"message":"', b'"}}'),
    "errors": filled(b'{"loc":["body","seed"]},', b'{"detail":[', b"0]}"),
    "errors in errors": b'{"errors":[' * 500 + filled(b'{"code":1},') + b"0" + b"]}" * 500,
    "one number": filled(b"9", b'{"choices":[{"index":', b"}]}"),
    "models": filled(b'{"id":"m"},', b'{"data":[', b"0]}"),
    "one name": filled(b"m", b'{"data":[{"id":"', b'"}]}'),
    "choices": filled(b'{"index":0,"text":"a"},', b'{"choices":[', b"0]}"),
    "parts": filled(b'{"text":"a"},', b'{"choices":[{"message":{"content":[', b"0]}}]}"),
    "one part in another": b'{"choices":[{"message":{"content":'
    + b'[{"text":' * 400 + filled(b" ") + b'"a"' + b"}]" * 400 + b"}}]}",
    "a key many times": filled(b'"text":"a",', b'{"choices":[{', b'"index":0}]}'),
    "lines of an event": filled(b"data: 1\n", b"data: {\n"),
    "events": filled(b"data: {}\n\n"),
    "events of a choice": filled(
        b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
    ),
    "empty events": filled(b"data:\n\n"),
    "comments": filled(b": keep-alive\n\n"),
    "an event without an end": filled(b"data: {", b"data: {"),
    "thoughts": filled(b"<think>a</think>"),
    "thoughts without an end": filled(b"<think>"),
    "ends of thoughts": filled(b"a</think>"),
    "gauges": filled(b"vllm:num_requests_running{a} 1\n"),
    "one gauge": filled(b"}", b"vllm:num_requests_running{"),
}  # fmt: skip


def stream_in(pieces: int) -> Callable[[bytes], object]:
    def read(raw: bytes) -> object:
        reply = Reply(1)
        events = Events(reply, 2**20)
        with suppress(Failure):
            for at in range(0, len(raw), pieces):
                events.feed(raw[at : at + pieces])
            events.end()
            return reply.completions([prompt()], 0.0)
        return None

    return read


def whole(raw: bytes) -> object:
    with suppress(Failure):
        reply = Reply.of_whole(parsed(raw, JSON, "http://there"), 1)
        return reply.error or reply.completions([prompt()], 0.0)
    return None


def learn(raw: bytes) -> object:
    verdict, text = classify(status=400, headers={}, body=raw), read_error(raw).text
    return Dialect().learn(verdict, text, {"seed": 1, "model": "m"}, "chat")


def models(raw: bytes) -> object:
    with suppress(orjson.JSONDecodeError):
        served = read_models(orjson.loads(raw))
        return find_model(served, "other"), listed(served)
    return None


def header(raw: bytes) -> object:
    value = raw[:65_536].decode("latin-1")
    return retry_after_s({"retry-after": value, "date": value, "retry-after-ms": value})


def thoughts(raw: bytes) -> object:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    text = raw.decode("utf-8", "replace")
    return thoughts_apart(Completion(text=text, finish_reason="stop", usage=usage))


def packed(raw: bytes) -> object:
    with suppress(Failure):
        return Unpacker("gzip", 2 * SIZE)(gzip.compress(raw, 1))
    return None


PARSERS: dict[str, Callable[[bytes], object]] = {
    "error": read_error,
    "refusal": lambda raw: classify(status=400, headers={}, body=raw),
    "rate limit": lambda raw: classify(status=429, headers={}, body=raw),
    "error in 200": lambda raw: classify(status=200, headers={}, body=raw),
    "lesson": learn,
    "message": lambda raw: clean(raw.decode("latin-1")),
    "header": header,
    "answer": whole,
    "stream": stream_in(65_536),
    "stream in pieces": stream_in(64),
    "models": models,
    "thoughts": thoughts,
    "gauges": read_gauges,
    "packed": packed,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parser", PARSERS)
def test_a_megabyte_is_read_in_linear_time(parser: str, kind: str) -> None:
    """Half of these are errors; none is a traceback."""
    with in_linear_time():
        PARSERS[parser](KINDS[kind])
