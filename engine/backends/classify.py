"""One pure function from what came back to what follows: ``classify`` gives the ``Verdict``.

Everything that decides is a named condition: the status, the error's own code or type, a header,
or a phrase that a provider is known to use. What nobody named is ``dead`` for a 4xx (asking again
gives the same) and ``ambiguous`` for a fault on the way (it may have been paid).

Sources of the phrases: OpenAI's error codes, Anthropic's error types, vLLM's renderer and serving
code, and the messages of TGI, SGLang and llama.cpp's servers.
"""

from __future__ import annotations

import errno
import math
import re
import socket
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpx
import orjson

from engine.backends.base import Verdict
from engine.errors import AuthError, ConfigError, StoppedError, WoolmillError

__all__ = ["Phase", "classify", "clean", "error_body", "retry_after_s"]

Phase = Literal["start", "probe", "generate"]
"""``start``: the first contact, where a wrong name is the user's mistake, not an outage."""

MAX_MESSAGE = 300
QUOTA_CODES = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "credit_balance_exhausted",
        "billing_error",
    }
)
QUOTA_TEXT = re.compile(r"credit balance is? ?too low|insufficient (?:quota|balance|credit)", re.I)
OVERFLOW_CODES = frozenset({"context_length_exceeded", "string_above_max_length"})
OVERFLOW_TEXT = re.compile(
    r"maximum context length|context (?:length|window|size)|max_model_len|prompt is too long"
    r"|too many (?:input )?tokens|max_tokens must be at least 1"
    r"|longer than the maximum model length|exceeds? the (?:model's )?(?:maximum|available|max)"
    r"|reduce (?:the length of )?(?:your|the) (?:prompt|messages|input)",
    re.I,
)
LIMIT_NUMBER = re.compile(
    r"(?:maximum (?:context|model|input) length(?: is| of)?|max(?:imum)?(?:_model_len)?"
    r"|context (?:length|window|size)(?: is| of)?|limit(?: of)?|must be <=|>)"
    r" *[:=(]? *(\d[\d,]*)",
    re.I,
)
PROMPT_NUMBER = re.compile(
    r"(\d[\d,]*) (?:tokens )?(?:in the messages|of text input|in (?:your|the) (?:prompt|input)"
    r"|input tokens|from the input)"
    r"|prompt (?:contains|has)(?: at least)? (\d[\d,]*)(?![\d,]| characters)|(\d[\d,]*) tokens >"
    r"|request \((\d[\d,]*) tokens\)|resulted in (\d[\d,]*) tokens|given: (\d[\d,]*)"
    r"|prompt \(length (\d[\d,]*)\)",
    re.I,
)
SLOW_DOWN = re.compile(r"overloaded|slow ?down|too many requests|rate.?limit|at capacity", re.I)
CONTENT_POLICY = frozenset({"content_policy_violation", "content_filter", "moderation_blocked"})
CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
KEY = re.compile(r"(?:sk|pk|key|hf|gsk)[-_][A-Za-z0-9_-]{8,}|Bearer +\S+")


def clean(text: str) -> str:
    """A server's words for a terminal: one line, no escape sequences, no keys, not endless."""
    line = " ".join(CONTROL.sub(" ", text[: 4 * MAX_MESSAGE]).split())
    line = KEY.sub("…", line)
    return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 1] + "…"


def error_body(body: bytes) -> tuple[str, str, str]:
    """(message, code, type) of an error answer, in OpenAI's, Anthropic's, vLLM's or FastAPI's
    form.
    """
    try:
        data: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body[: 4 * MAX_MESSAGE].decode("utf-8", "replace"), "", ""
    error = data
    if isinstance(data, dict):
        error = data.get("error") or data
    if not isinstance(error, dict):
        return str(error), "", ""
    message = error.get("message") or error.get("detail") or error.get("error") or ""
    return str(message), str(error.get("code") or ""), str(error.get("type") or "")


def classify(
    *,
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    exception: BaseException | None = None,
    phase: Phase = "generate",
    where: str = "the server",
) -> Verdict:
    """What follows from one failed attempt: from ``exception`` where no answer came, else from the
    answer.

    ``where`` names the endpoint in the messages for the person.
    """
    if exception is not None:
        return _of_exception(exception, phase, where)
    assert status is not None
    return _of_answer(status, headers or {}, body, where)


def _of_exception(exc: BaseException, phase: Phase, where: str) -> Verdict:
    if isinstance(exc, WoolmillError):
        return Verdict(kind="fatal", reason="refused", message=str(exc), error=exc)
    causes = list(_chain(exc))
    message = clean(str(exc) or type(exc).__name__)
    for cause in causes:
        if isinstance(cause, ssl.SSLError):
            error = AuthError(
                f"{where}: its certificate cannot be trusted ({clean(str(cause))}); "
                "name its authority with --ca-file"
            )
            return Verdict(kind="fatal", reason="certificate", message=str(error), error=error)
        if isinstance(cause, socket.gaierror):
            if phase == "start":
                unknown = ConfigError(
                    f"{where}: the host name cannot be resolved; check the base URL"
                )
                return Verdict(kind="fatal", reason="dns", message=str(unknown), error=unknown)
            return Verdict(kind="unavailable", reason="dns", message=message)
        if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
            return Verdict(
                kind="unavailable",
                reason="too_many_files",
                message="no file descriptors left; raise `ulimit -n` or lower --max-in-flight",
            )
    if isinstance(exc, httpx.ConnectTimeout):
        return Verdict(kind="unavailable", reason="connect_timeout", message=message)
    if isinstance(exc, httpx.ConnectError):
        return Verdict(kind="unavailable", reason="connect_refused", message=message)
    if isinstance(exc, httpx.UnsupportedProtocol | httpx.InvalidURL | httpx.LocalProtocolError):
        wrong = ConfigError(f"{where}: {message}")
        return Verdict(kind="fatal", reason="bad_request", message=str(wrong), error=wrong)
    if isinstance(exc, httpx.TimeoutException | TimeoutError):
        return Verdict(kind="ambiguous", reason="timeout", message=message)
    if isinstance(exc, httpx.TransportError | httpx.StreamError | OSError):
        return Verdict(kind="ambiguous", reason="cut_body", message=message)
    raise exc  # a bug of ours is not a failure of the wire


def _chain(exc: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    current: BaseException | None = exc
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def _of_answer(status: int, headers: Mapping[str, str], body: bytes, where: str) -> Verdict:
    text, code, type_ = error_body(body)
    message = clean(text)
    names = {code.lower(), type_.lower()}
    wait_s = retry_after_s(headers)

    def verdict(kind: Any, reason: str, error: WoolmillError | None = None) -> Verdict:
        return Verdict(
            kind=kind,
            reason=reason,
            message=str(error) if error else message,
            retry_after_s=wait_s,
            error=error,
        )

    if names & QUOTA_CODES or status == 402 or QUOTA_TEXT.search(text):
        return verdict(
            "fatal",
            "quota",
            StoppedError(
                f"{where}: the account is out of credit; add credit, then resume ({message})"
            ),
        )
    if status == 401 or "invalid_api_key" in names or "authentication_error" in names:
        return verdict("fatal", "http_401", AuthError(f"{where}: the key was refused ({message})"))
    if status == 403:
        return verdict("fatal", "http_403", AuthError(f"{where}: not permitted ({message})"))
    if 300 <= status < 400:
        target = clean(headers.get("location", "?"))
        return verdict(
            "fatal",
            "redirect",
            ConfigError(
                f"{where}: redirects to {target}; use that as the base URL if you trust it"
            ),
        )
    if status == 404:
        hint = "check --model" if "model" in text.lower() else "a base URL usually ends in /v1"
        return verdict("fatal", "http_404", ConfigError(f"{where}: not found ({message}); {hint}"))
    if names & OVERFLOW_CODES or (status in (400, 413, 422, 500) and OVERFLOW_TEXT.search(text)):
        return Verdict(
            kind="overflow",
            reason="context_overflow",
            message=message,
            context_length=_number(LIMIT_NUMBER, text),
            prompt_tokens=_number(PROMPT_NUMBER, text),
        )
    if names & CONTENT_POLICY:
        return verdict("dead", "content_filter")
    asked = headers.get("x-should-retry", "").lower()
    if status == 429 or "rate_limit_exceeded" in names or "rate_limit_error" in names:
        return verdict("throttled", "http_429") if asked != "false" else verdict("dead", "http_429")
    if asked == "false":
        return verdict("dead", f"http_{status}")
    if status in (502, 503, 504, 529):
        slow = wait_s is not None or SLOW_DOWN.search(text) or "overloaded_error" in names
        return verdict("throttled" if slow else "unavailable", f"http_{status}")
    if status in (408, 409, 425, 500) or status > 504 or asked == "true":
        return verdict("ambiguous", f"http_{status}")
    if 200 <= status < 300:
        return verdict("ambiguous", "error_in_answer")
    return verdict("dead", f"http_{status}")


def _number(pattern: re.Pattern[str], text: str) -> int | None:
    for found in pattern.finditer(text):
        for group in found.groups():
            if group:
                return int(group.replace(",", ""))
    return None


DURATION = re.compile(
    r"^(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?$"
)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait; None where it says nothing that can be understood.

    Read in this order: ``retry-after-ms``, ``retry-after`` as a number, as an HTTP date (against
    the server's own ``date`` header, so that a wrong clock here does not matter), as ``6m0s``, as
    an ISO date.
    """
    if (ms := _finite(headers.get("retry-after-ms", ""))) is not None:
        return ms / 1000
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    if (seconds := _finite(value)) is not None:
        return seconds
    if (match := DURATION.match(value)) and any(match.groups()):
        d, h, m, s, ms_ = (float(g or 0) for g in match.groups())
        return d * 86_400 + h * 3_600 + m * 60 + s + ms_ / 1000
    until = _date(value)
    if until is None:
        return None
    now = _date(headers.get("date", "")) or datetime.now(UTC)
    return max((until - now).total_seconds(), 0.0)


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _date(text: str) -> datetime | None:
    for parse in (parsedate_to_datetime, datetime.fromisoformat):
        try:
            when = parse(text)
        except (ValueError, TypeError, IndexError):
            continue
        return when if when.tzinfo else when.replace(tzinfo=UTC)
    return None
