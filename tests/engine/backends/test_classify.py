"""One table: what came back, and what must follow from it."""

from __future__ import annotations

import errno
import json
import socket
import ssl
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from engine.backends.openai.error_body import clean
from engine.backends.openai.verdicts import classify, retry_after_s
from engine.errors import AuthError, ConfigError, StoppedError


def body(message: str, *, code: str = "", type_: str = "") -> bytes:
    return json.dumps({"error": {"message": message, "code": code, "type": type_}}).encode()


ANSWERS = [
    ("fault_016", 307, {"location": "https://else.where/v1"}, b"",
     "settings", "redirect", ConfigError),
    ("fault_021", 429, {"retry-after": "7"}, body("slow", code="rate_limit_exceeded"),
     "throttled", "http_429", None),
    ("fault_023", 429, {}, b"", "throttled", "http_429", None),
    ("fault_024 OpenAI", 429, {}, body("You exceeded your quota", code="insufficient_quota"),
     "fatal", "quota", StoppedError),
    ("fault_024 Anthropic", 400, {}, body("Your credit balance is too low to access the API"),
     "fatal", "quota", StoppedError),
    ("fault_024 payment", 402, {}, body("pay"), "fatal", "quota", StoppedError),
    ("fault_026", 401, {}, body("Incorrect API key"), "settings", "http_401", AuthError),
    ("fault_056 vLLM", 401, {}, b'{"error":"Unauthorized"}', "settings", "http_401", AuthError),
    ("fault_028", 403, {}, body("Country not supported"), "settings", "http_403", AuthError),
    ("fault_029", 404, {}, body("The model `x` does not exist", code="model_not_found"),
     "settings", "http_404", ConfigError),
    ("fault_030", 404, {}, b'{"detail":"Not Found"}', "settings", "http_404", ConfigError),
    ("fault_031 OpenAI", 400, {}, body("This model's maximum context length is 4097 tokens, however"
     " you requested 5000 tokens (1928 in your prompt; 3072 for the completion). Please reduce your"
     " prompt; or completion length.", code="context_length_exceeded"),
     "overflow", "context_overflow", None),
    ("fault_031 proxy", 500, {}, body("the request exceeds the available context size"),
     "overflow", "context_overflow", None),
    ("fault_032", 400, {}, body("Unrecognized request argument: top_q"),
     "settings", "http_400", ConfigError),
    ("fault_033", 400, {}, body("rejected", code="content_policy_violation"),
     "dead", "content_filter", None),
    ("fault_034 408", 408, {}, b"", "ambiguous", "http_408", None),
    ("fault_034 409", 409, {}, b"", "ambiguous", "http_409", None),
    ("fault_034 425", 425, {}, b"", "ambiguous", "http_425", None),
    ("fault_035", 413, {}, b"too large", "dead", "http_413", None),
    ("fault_036", 422, {}, b'{"detail":[{"msg":"field required"}]}',
     "settings", "http_422", ConfigError),
    ("fault_037", 500, {}, body("oops"), "ambiguous", "http_500", None),
    ("fault_038 502", 502, {}, b"<html>bad gateway", "unavailable", "http_502", None),
    ("fault_038 503", 503, {}, b"", "unavailable", "http_503", None),
    ("fault_038 504", 504, {}, b"", "unavailable", "http_504", None),
    ("fault_038 overloaded", 529, {}, body("", type_="overloaded_error"),
     "throttled", "http_529", None),
    ("fault_038 Retry-After", 503, {"retry-after": "3"}, b"", "throttled", "http_503", None),
    ("fault_039 false", 500, {"x-should-retry": "false"}, b"", "dead", "http_500", None),
    ("fault_039 true", 418, {"x-should-retry": "true"}, b"", "ambiguous", "http_418", None),
    ("fault_040 quota", 200, {}, body("", code="insufficient_quota"),
     "fatal", "quota", StoppedError),
    ("fault_040 limit", 200, {}, body("", code="rate_limit_exceeded"),
     "throttled", "http_429", None),
    ("fault_040 other", 200, {}, body("engine died"), "ambiguous", "error_in_answer", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "headers", "content", "kind", "reason", "error"),
    [pytest.param(*row[1:], id=row[0]) for row in ANSWERS],
)
def test_answers(
    status: int,
    headers: Mapping[str, str],
    content: bytes,
    kind: str,
    reason: str,
    error: type[Exception] | None,
) -> None:
    """Status, headers and body alone decide, and a fatal verdict carries its error."""
    verdict = classify(status=status, headers=headers, body=content, where="http://there")
    assert (verdict.kind, verdict.reason) == (kind, reason)
    assert isinstance(verdict.error, error) if error else verdict.error is None
    if verdict.error is not None:
        assert "http://there" in str(verdict.error)
        assert "\n" not in str(verdict.error)


def caused(exc: Exception, cause: BaseException) -> Exception:
    exc.__cause__ = cause
    return exc


@pytest.mark.parametrize("said", ["bad prompt", ""])
def test_a_refused_request_is_told_apart_from_refused_settings(said: str) -> None:
    """Its row has the host's words; what to change is said where the run ends of it."""
    verdict = classify(status=400, headers={}, body=body(said) if said else b"", where="h")
    assert verdict.message == f"the host refuses this request: {said or 'it does not say why'}"
    assert f"h: refuses the request ({said}); check --model" in str(verdict.error)


EXCEPTIONS = [
    ("fault_001 at start", caused(httpx.ConnectError("x"), socket.gaierror(-2, "unknown")),
     "start", "fatal", "dns"),
    ("fault_001 later", caused(httpx.ConnectError("x"), socket.gaierror(-2, "unknown")),
     "generate", "unavailable", "dns"),
    ("fault_002", httpx.ConnectError("refused"), "generate", "unavailable", "connect_refused"),
    ("fault_003", httpx.ConnectTimeout("5 s"), "generate", "unavailable", "connect_timeout"),
    ("fault_004", httpx.ReadError("reset"), "generate", "ambiguous", "cut_body"),
    ("fault_006", httpx.RemoteProtocolError("closed"), "generate", "ambiguous", "cut_body"),
    ("fault_008", TimeoutError(), "generate", "ambiguous", "timeout"),
    ("fault_009", httpx.ReadTimeout("silent"), "generate", "ambiguous", "timeout"),
    ("fault_014", caused(httpx.ConnectError("x"), ssl.SSLCertVerificationError("self-signed")),
     "generate", "settings", "certificate"),
    ("fault_087", caused(httpx.ConnectError("x"), OSError(errno.EMFILE, "too many")), "generate",
     "unavailable", "too_many_files"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("exception", "phase", "kind", "reason"),
    [pytest.param(*row[1:], id=row[0]) for row in EXCEPTIONS],
)
def test_exceptions(exception: Exception, phase: Any, kind: str, reason: str) -> None:
    """What never answered is told apart from what may have been paid."""
    verdict = classify(exception=exception, phase=phase)
    assert (verdict.kind, verdict.reason) == (kind, reason)


def test_fault_014_names_the_way_out() -> None:
    """A certificate that cannot be trusted calls for --ca-file, never for going on without."""
    exc = caused(httpx.ConnectError("x"), ssl.SSLCertVerificationError("self-signed"))
    verdict = classify(exception=exc)
    assert isinstance(verdict.error, AuthError)
    assert "--ca-file" in str(verdict.error)


@pytest.mark.parametrize("exception", [UnicodeDecodeError("ascii", b"", 0, 1, "x"), KeyError("x")])
def test_whatever_fails_while_bytes_are_read_is_a_verdict(exception: Exception) -> None:
    """A server can send what nobody thought of; that costs its own request, not the run."""
    verdict = classify(exception=exception)
    assert (verdict.kind, verdict.reason) == ("ambiguous", "unreadable")


OVERFLOWS = [
    ("This model's maximum context length is 4097 tokens, however you requested 5000 tokens"
     " (1928 in your prompt; 3072 for the completion).", 4097, 1928),
    ("This model's maximum context length is 4096 tokens. However, you requested 4596 tokens (4196"
     " in the messages, 400 in the completion).", 4096, 4196),
    ("This model's maximum context length is 2048 tokens. However, your prompt contains at least"
     " 2049 input tokens, which exceeds this limit even without any output tokens.", 2048, 2049),
    ("This model's maximum context length is 2048 tokens. However, your prompt contains 90000"
     " characters (more than 81920 characters, which is the upper bound", 2048, None),
    ("The decoder prompt (length 2100) is longer than the maximum model length of 2048.",
     2048, 2100),
    ("prompt is too long: 210000 tokens > 200000 maximum", 200000, 210000),
    ("the request exceeds the available context size. try increasing it", None, None),
    ("max_tokens must be at least 1, got -52.", None, None),
    ("Please reduce your prompt; or completion length.", None, None),
    ("This model's maximum context length is 256 tokens. However, you requested 600 tokens in the"
     " input for embedding generation. Please reduce the length of the input.", 256, 600),
    ("Invalid 'input[0]': maximum input length is 8192 tokens.", 8192, None),
    ("input (600 tokens) is too large to process. increase the physical batch size", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "limit", "prompt"), OVERFLOWS)
def test_fault_031_numbers_of_an_overflow(text: str, limit: int | None, prompt: int | None) -> None:
    """The limit and the prompt's length are read from each provider's sentence, or left open."""
    verdict = classify(status=400, headers={}, body=body(text))
    assert verdict.kind == "overflow"
    assert (verdict.context_length, verdict.prompt_tokens) == (limit, prompt)


NOW = "Wed, 21 Oct 2026 07:28:00 GMT"
WAITS = [
    ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
    ({"retry-after": "7"}, 7.0),
    ({"retry-after": "0.5"}, 0.5),
    ({"retry-after": "6m0s"}, 360.0),
    ({"retry-after": "1h2m3.5s"}, 3723.5),
    ({"retry-after": "20ms"}, 0.02),
    ({"retry-after": "1e9"}, 1e9),
    ({"retry-after": "Wed, 21 Oct 2026 07:28:10 GMT", "date": NOW}, 10.0),
    ({"retry-after": "2026-10-21T07:28:05+00:00", "date": NOW}, 5.0),
    ({"retry-after": "Wed, 21 Oct 2026 07:27:00 GMT", "date": NOW}, 0.0),
    ({"retry-after": "soon"}, None),
    ({"retry-after": "-3"}, None),
    ({"retry-after": "nan"}, None),
    ({"retry-after": "inf"}, None),
    ({"retry-after": ""}, None),
    ({}, None),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "seconds"), WAITS)
def test_fault_022_and_fault_106_how_long_to_wait(
    headers: dict[str, str], seconds: float | None
) -> None:
    """Each form is understood, dates against the server's own clock, and garbage is nothing."""
    assert retry_after_s(headers) == seconds


def test_security_14_server_text_is_harmless_on_a_terminal() -> None:
    """Escape sequences, line breaks, direction marks and keys do not reach the person."""
    shown = clean("\x1b[31mred\x1b[0m\r\nnext \u202eevil sk-abcdefghijkl1234 \x9b2J" + "x" * 999)
    assert shown.isprintable()
    assert "sk-abc" not in shown
    assert len(shown) <= 300
    assert shown.startswith("red next evil …")
