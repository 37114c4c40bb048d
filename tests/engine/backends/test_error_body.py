"""Errors as hosts word them, and what is understood."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from engine.backends.openai.error_body import ErrorBody, clean, read_error
from engine.backends.openai.verdicts import classify
from engine.errors import AuthError, StoppedError

VIOLATION = {"@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": [{}]}
RETRY = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34s"}
FIELD = {"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs", "input": 1}

BODIES: list[tuple[str, Any, dict[str, Any]]] = [
    ("OpenAI", {"error": {"message": "no", "type": "invalid_request_error", "param": "max_tokens",
                          "code": "unsupported_parameter"}},
     {"text": "no", "names": {"invalid_request_error", "unsupported_parameter"},
      "parameters": ("max_tokens",)}),
    ("OpenAI, within a field", {"error": {"message": "no", "param": "messages[0].content"}},
     {"text": "no", "parameters": ("messages",)}),
    ("Azure", {"error": {"code": "429", "message": "slow"}},
     {"text": "slow", "status": 429, "names": {"429"}}),
    ("Anthropic", {"type": "error", "error": {"type": "overloaded_error", "message": "slow"}},
     {"text": "slow", "names": {"overloaded_error"}}),
    ("Gemini", [{"error": {"code": 429, "message": "slow", "status": "RESOURCE_EXHAUSTED",
                           "details": [VIOLATION, RETRY]}}],
     {"text": "slow", "status": 429, "names": {"resource_exhausted"}, "wait_s": 34.0}),
    ("Mistral", {"object": "error", "message": {"detail": [FIELD]}, "type": "invalid_request_error",
                 "param": None, "code": None},
     {"text": orjson.dumps({"detail": [FIELD]}).decode(), "parameters": ("body", "seed"),
      "names": {"invalid_request_error"}}),
    ("FastAPI", {"detail": [FIELD]},
     {"text": orjson.dumps([FIELD]).decode(), "parameters": ("body", "seed")}),
    ("FastAPI, of a union", {"detail": [FIELD | {"loc": ["body", "ChatRequest", "seed"]}]},
     {"text": orjson.dumps([FIELD | {"loc": ["body", "ChatRequest", "seed"]}]).decode(),
      "parameters": ("body", "ChatRequest", "seed")}),
    ("FastAPI, a text", {"detail": "Not Found"}, {"text": "Not Found"}),
    ("OpenRouter", {"error": {"message": "flagged", "code": 403, "metadata": {
        "reasons": ["violence"], "flagged_input": "x", "provider_name": "OpenAI"}}},
     {"text": "flagged", "status": 403, "moderated": True}),
    ("Cloudflare", {"success": False, "errors": [{"code": 7003, "message": "No route"}],
                    "messages": [], "result": None}, {"text": "No route"}),
    ("xAI", {"code": "Client specified an invalid argument", "error": "No such model"},
     {"text": "No such model", "names": {"client specified an invalid argument"}}),
    ("TGI", {"error": "too long", "error_type": "validation"},
     {"text": "too long", "names": {"validation"}}),
    ("TGI, in a stream", {"error": {"message": "slow", "http_status_code": 429}},
     {"text": "slow", "status": 429}),
    ("Databricks", {"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "slow"},
     {"text": "slow", "names": {"request_limit_exceeded"}}),
    ("SiliconFlow", {"code": 20012, "message": "no model", "data": None}, {"text": "no model"}),
    ("Zhipu", {"error": {"code": "1302", "message": "slow"}}, {"text": "slow", "names": {"1302"}}),
    ("MiniMax", {"choices": None, "base_resp": {"status_code": 1002, "status_msg": "slow"}},
     {"text": "slow"}),
    ("LM Studio", {"error": "Unexpected endpoint"}, {"text": "Unexpected endpoint"}),
    ("LiteLLM", {"error": {"message": "no", "type": None, "param": None, "code": "400"}},
     {"text": "no", "status": 400, "names": {"400"}}),
    ("NVIDIA", {"type": "about:blank", "title": "Not Found", "status": 404, "detail": "no model"},
     {"text": "no model", "status": 404, "names": {"about:blank"}}),
    ("a text in JSON", "Invalid token", {"text": "Invalid token"}),
    ("nothing", {}, {"text": ""}),
    ("a status that is none", {"error": {"code": 7, "message": "no"}}, {"text": "no"}),
    ("200 is no error's status", {"error": {"code": 200, "message": "no"}}, {"text": "no"}),
]  # fmt: skip


@pytest.mark.parametrize(("data", "said"), [pytest.param(*row[1:], id=row[0]) for row in BODIES])
def test_bodies(data: Any, said: dict[str, Any]) -> None:
    names = frozenset(said.pop("names", ()))
    said = dict(said)
    assert read_error(orjson.dumps(data)) == ErrorBody(names=names, **said)


PAGES = [
    (b"<html><head><title>502 Bad Gateway</title></head>", "a page in HTML: '502 Bad Gateway'"),
    (b"\n <!DOCTYPE html><title lang=en>Just a moment&hellip;</title>",
     "a page in HTML: 'Just a moment…'"),
    (b"<html><body>no title</body>", "a page in HTML"),
    (b"upstream connect error", "upstream connect error"),
    (b"\xff\xfe", "\ufffd\ufffd"),
    (b"", ""),
]  # fmt: skip


@pytest.mark.parametrize(("page", "text"), PAGES)
def test_pages(page: bytes, text: str) -> None:
    """Of a page in HTML a person wants the title."""
    assert read_error(page).text == text


WAITS = [
    ("Rate limit reached for gpt-4o. Please try again in 1.2s. Visit", 1.2),
    ("Please try again in 120ms.", 0.12),
    ("Please try again in 6m0s.", 360.0),
    ("Please try again in 7m12.5s. Need more?", 432.5),
    ("Please try again in 1h2m3s", 3723.0),
    ("please try again after 1 seconds", 1.0),
    ("Retry after 20 sec", 20.0),
    ("wait 2 minutes", 120.0),
    ("Please retry in 34.07s.", 34.07),
    ("try again in 250 milliseconds", 0.25),
    ("please try again later; your limit is 20 s", None),
    ("please try again. Then wait 3 s", 3.0),
    ("try again in " + "9" * 400 + "s", None),
    ("retry", None),
]


@pytest.mark.parametrize(("message", "wait_s"), WAITS)
def test_waits_in_words(message: str, wait_s: float | None) -> None:
    assert read_error(orjson.dumps({"error": {"message": message}})).wait_s == wait_s


FIELDS = [
    ({"retry_after": 5}, 5.0),
    ({"retry_after": "7"}, 7.0),
    ({"metadata": {"retry_after_seconds": 2.5}}, 2.5),
    ({"details": [{"retryDelay": "0.5s"}]}, 0.5),
    ({"retry_after": 1e300}, None),
    ({"retry_after": -1}, None),
    ({"retry_after": True}, None),
    ({"retry_after": "soon"}, None),
]


@pytest.mark.parametrize(("fields", "wait_s"), FIELDS, ids=lambda value: repr(value))
def test_waits_in_fields(fields: dict[str, Any], wait_s: float | None) -> None:
    assert read_error(orjson.dumps({"error": {"message": "slow", **fields}})).wait_s == wait_s


def test_a_header_goes_before_words() -> None:
    body = orjson.dumps({"error": {"message": "try again in 9s"}})
    assert classify(status=429, headers={"retry-after": "2"}, body=body).retry_after_s == 2.0
    assert classify(status=429, headers={}, body=body).retry_after_s == 9.0


SAID: list[tuple[str, int, Any, str, str]] = [
    ("OpenRouter 429 in 200", 200, {"error": {"code": 429, "message": "x"}},
     "throttled", "http_429"),
    ("OpenRouter 502 in 200", 200, {"error": {"code": 502, "message": "x"}},
     "unavailable", "http_502"),
    ("OpenRouter 403, flagged", 403, BODIES[9][1], "dead", "content_filter"),
    ("OpenRouter 403, guardrail", 403, {"error": {"code": 403, "message": "blocked by guardrail"}},
     "dead", "content_filter"),
    ("OpenRouter 403, else", 403, {"error": {"code": 403, "message": "not in your country"}},
     "settings", "http_403"),
    ("Azure, filtered", 400, {"error": {"code": "content_filter", "message": "x", "status": 400}},
     "dead", "content_filter"),
    ("DeepSeek, risk", 400, {"error": {"message": "Content Exists Risk"}},
     "dead", "content_filter"),
    ("Zhipu, unsafe", 400, {"error": {"code": "1301", "message": "可能包含不安全或敏感内容"}},
     "dead", "content_filter"),
    ("DashScope, inspected in a stream", 200, {"error": {
        "code": "data_inspection_failed", "message": "Output data"}}, "dead", "content_filter"),
    ("Ark, sensitive", 400, {"error": {"code": "SensitiveContentDetected", "message":
        "the input text may contain sensitive information"}}, "dead", "content_filter"),
    ("MiniMax, sensitive", 200, {"base_resp": {"status_code": 1026, "status_msg":
        "input new_sensitive"}}, "dead", "content_filter"),
    ("Moonshot, high risk", 400, {"error": {"type": "content_filter", "message": "high risk"}},
     "dead", "content_filter"),
    ("Groq, beyond a minute", 413, {"error": {"message": "Request too large for model `x` on tokens"
        " per minute (TPM): Limit 6000, Requested 7000", "code": "rate_limit_exceeded"}},
     "overflow", "context_overflow"),
    ("OpenAI, beyond a minute", 429, {"error": {"message": "Request too large for gpt-4o on tokens"
        " per min (TPM): Limit 30000, Requested 40000", "code": "rate_limit_exceeded"}},
     "overflow", "context_overflow"),
    ("GitHub, too large", 413, {"error": {"code": "tokens_limit_reached", "message":
        "Request body too large for gpt-4o model. Max size: 8000 tokens."}},
     "overflow", "context_overflow"),
    ("nginx, too large", 413, "Request Entity Too Large", "dead", "http_413"),
    ("TGI, busy", 429, {"error": "Model is overloaded", "error_type": "overloaded"},
     "throttled", "http_429"),
    ("KoboldCpp, busy", 503, {"detail": {"msg": "Server is busy", "type": "service_unavailable"}},
     "unavailable", "http_503"),
    ("llama.cpp, loading", 503, {"error": {"code": 503, "message": "Loading model"}},
     "unavailable", "http_503"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "data", "kind", "reason"), [pytest.param(*row[1:], id=row[0]) for row in SAID]
)
def test_what_follows(status: int, data: Any, kind: str, reason: str) -> None:
    verdict = classify(status=status, headers={}, body=orjson.dumps(data), where="http://there")
    assert (verdict.kind, verdict.reason) == (kind, reason)


LIMITS = [
    ("Request too large for model `x` on tokens per minute (TPM): Limit 6,000, Requested 7000",
     6000, None),
    ("Request body too large for gpt-4o model. Max size: 8000 tokens.", 8000, None),
    ("the model is loaded with context length of only 4096 tokens, which is not enough",
     4096, None),
    ("request (5000 tokens) exceeds the available context size (4096 tokens), try increasing it",
     4096, 5000),
    ("`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens and 3072",
     4096, 5000),
    ("Input validation error: `inputs` must have less than 4096 tokens. Given: 5000", 4096, 5000),
    ("Input length (5000) exceeds model's maximum context length (4096).", 4096, None),
]  # fmt: skip


@pytest.mark.parametrize(("message", "length", "used"), LIMITS)
def test_numbers_of_overflows(message: str, length: int, used: int | None) -> None:
    body = orjson.dumps({"error": {"message": message, "code": 413}})
    verdict = classify(status=413, headers={}, body=body)
    assert verdict.kind == "overflow"
    assert (verdict.context_length, verdict.prompt_tokens) == (length, used)


CREDIT = [
    (402, {"error": {"message": "Insufficient Balance", "code": "invalid_request_error"}}),
    (402, {"error": {"code": 402, "message": "This request requires more credits"}}),
    (403, {"code": 30001, "message": "Sorry, your account balance is insufficient"}),
    (429, {"error": {"code": "1113", "message": "余额不足或无可用资源包"}}),
    (429, {"error": {"type": "exceeded_current_quota_error", "message": "check your plan"}}),
    (200, {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}),
    (400, {"error": {"code": "Arrearage", "message": "Access denied"}}),
]


@pytest.mark.parametrize(("status", "data"), CREDIT)
def test_no_credit_stops_the_run_resumable(status: int, data: Any) -> None:
    verdict = classify(status=status, headers={}, body=orjson.dumps(data))
    assert (verdict.kind, verdict.reason) == ("fatal", "quota")
    assert isinstance(verdict.error, StoppedError)


KEYS = [
    (401, {"error": {"message": "User not found.", "code": 401}}),
    (400, {"code": "Client specified an invalid argument",
           "error": "Incorrect API key provided: xx***."}),
    (400, [{"error": {"code": 400, "message": "API key not valid. Please pass a valid API key."}}]),
    (200, {"error": {"code": 401, "message": "No auth credentials found"}}),
]  # fmt: skip


@pytest.mark.parametrize(("status", "data"), KEYS)
def test_a_wrong_key_is_one_whatever_the_status(status: int, data: Any) -> None:
    verdict = classify(status=status, headers={}, body=orjson.dumps(data))
    assert (verdict.kind, verdict.reason) == ("settings", "http_401")
    assert isinstance(verdict.error, AuthError)


def test_words_of_a_server_are_made_harmless() -> None:
    """One line, no escape sequences, nothing that looks like a key, not endless."""
    said = clean("a\x1b[31mred\nb\u202ec sk-0123456789abcdef " + "x" * 999)
    assert said.startswith("a red b c … xxx")
    assert len(said) == 300
