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
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpx

from engine.backends.base import Verdict
from engine.backends.openai.error_body import ErrorBody, clean, read_error
from engine.errors import AuthError, ConfigError, StoppedError, WoolmillError

__all__ = ["Phase", "classify", "html_page", "retry_after_s"]

Phase = Literal["start", "probe", "generate"]
"""``start``: the first contact, where a wrong name is the user's mistake, not an outage."""

QUOTA_CODES = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "credit_balance_exhausted",
        "billing_error",
        "exceeded_current_quota_error",
        "arrearage",
        "accountoverdueerror",
    }
)
"""The account is out of money: OpenAI, Anthropic, Moonshot, Alibaba, Volcengine. No wait helps, so
the run stops, even though most of them say so with 429."""
QUOTA_TEXT = re.compile(
    r"credit balance is? ?too low|insufficient (?:quota|balance|credit)|balance is insufficient"
    r"|余额不足",
    re.I,
)
"""The same where a host has no code for it: "Your credit balance is too low" (Anthropic),
"Insufficient Balance" (DeepSeek)."""
KEY_CODES = frozenset({"invalid_api_key", "authentication_error", "no_db_connection"})
"""The last is LiteLLM's, without a database, for a key that is not its own."""
KEY_TEXT = re.compile(r"(?:incorrect|invalid) api key|api key not valid", re.I)
"""xAI and Gemini refuse a key with status 400."""
OVERFLOW_CODES = frozenset(
    {"context_length_exceeded", "string_above_max_length", "tokens_limit_reached"}
)
"""A prompt longer than the context. It is not sent again as it is, but shortened."""
OVERFLOW_TEXT = re.compile(
    r"maximum (?:context|input) length|context (?:length|window|size)|max_model_len"
    r"|prompt is too long|too large to process"
    r"|too many (?:input )?tokens|max_tokens must be at least 1"
    r"|longer than the maximum model length|exceeds? the (?:model's )?(?:maximum|available|max)"
    r"|reduce (?:the length of )?(?:your|the) (?:prompt|messages|input)"
    r"|input token count|request (?:body )?too large"
    r"|max_new_tokens`? must be <=|`inputs` must have less than",
    re.I,
)
"""The same where a host has no code for it, as OpenAI's "maximum context length is 8192 tokens",
vLLM's "longer than the maximum model length" and TGI's "``inputs`` must have less than 4096
tokens"."""
TOO_LARGE = re.compile(r"request too large for", re.I)
"""OpenAI's and Groq's 429 for a request that alone is beyond the tokens of a minute."""
DIGITS = r"(\d[\d,]{0,14})"
"""No longer: Python refuses to read a number of thousands of digits."""
LIMIT_NUMBER = re.compile(
    r"(?:maximum (?:context|model|input) length(?: is| of)?|max(?:imum)?(?:_model_len)?"
    r"|context (?:length|window|size)(?: is| of)?(?: only)?|max size|limit(?: of)?|must be <="
    r"|must have less than|>)"
    rf" {{0,9}}[:=(]? {{0,9}}{DIGITS}",
    re.I,
)
"""The host's limit, out of such a message: 8192 in "maximum context length is 8192 tokens". Later
prompts are then fitted to it before they are sent."""
PROMPT_NUMBER = re.compile(
    rf"{DIGITS} (?:tokens )?(?:in the messages|of text input|in (?:your|the) (?:prompt|input)"
    r"|input tokens|from the input)"
    rf"|prompt (?:contains|has)(?: at least)? {DIGITS}(?![\d,]| characters)|{DIGITS} tokens >"
    rf"|request \({DIGITS} tokens\)|resulted in {DIGITS} tokens|given: {DIGITS}"
    rf"|prompt \(length {DIGITS}\)",
    re.I,
)
"""How many tokens the host counted in the prompt: 9000 in "(9000 in the messages, 500 in the
completion)". It corrects our own estimate."""
COMPLETION_LIMIT = re.compile(
    rf"supports at most {DIGITS} completion tokens"
    rf"|max_(?:completion_)?tokens\b.{{0,80}}?(?:less than or equal to|at most|<=|maximum (?:of|is)"
    rf"|cannot exceed|exceeds? the (?:maximum|limit)[^\d]{{0,60}}|\[1, ?) ?`?{DIGITS}"
    rf"|max_tokens: {DIGITS} > (\d[\d,]{{0,14}})",
    re.I,
)
"""OpenAI, Groq, DeepSeek, Anthropic: the most that one answer may have. The last number counts."""
SLOW_DOWN = re.compile(r"overloaded|slow ?down|too many requests|rate.?limit|at capacity", re.I)
"""Words by which a fault of the server (502, 503, 504) asks for fewer requests: "Overloaded".
Without them the server counts as gone, and not as busy."""
THROTTLED = frozenset({"rate_limit_exceeded", "rate_limit_error", "resource_exhausted"})
"""Codes that mean too many requests under whatever status."""
CONTENT_POLICY = frozenset(
    {
        "content_policy_violation",
        "content_filter",
        "moderation_blocked",
        "responsibleaipolicyviolation",
        "data_inspection_failed",
    }
)
"""Codes of a filter that refused the prompt: OpenAI, Azure, Alibaba. Asking again gives the same.
"""
CONTENT_TEXT = re.compile(
    r"moderation|\bflagged\b|content[ _](?:policy|filter|management|exists risk)|guardrail"
    r"|inappropriate content|safety (?:system|filter|policy|reasons|settings)"
    r"|content[^.]{0,20}blocked|sensitive (?:content|information|words)|new_sensitive"
    r"|不安全|敏感内容",
    re.I,
)
"""How hosts say that a prompt was refused for what it is about."""


def html_page(where: str, raw: bytes) -> Verdict:
    """A page for a browser in the place of an answer."""
    shown = clean(read_error(raw).text)
    error = ConfigError(
        f"{where}: not an OpenAI endpoint (got {shown}); check the base URL, and whether a proxy "
        "or a login stands in between"
    )
    return Verdict(kind="settings", reason="html", message=str(error), error=error)


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
    message = clean(str(exc)) or _unsaid(exc)
    for cause in causes:
        if isinstance(cause, ssl.SSLError):
            error = AuthError(
                f"{where}: its certificate cannot be trusted ({clean(str(cause))}); "
                "name its authority with --ca-file"
            )
            return Verdict(kind="settings", reason="certificate", message=str(error), error=error)
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
    if isinstance(exc, httpx.ProxyError):
        refused = ConfigError(f"{where}: the proxy refuses ({message}); see --proxy and NO_PROXY")
        return Verdict(kind="settings", reason="proxy", message=str(refused), error=refused)
    if isinstance(exc, httpx.UnsupportedProtocol | httpx.InvalidURL | httpx.LocalProtocolError):
        wrong = ConfigError(f"{where}: {message}")
        return Verdict(kind="fatal", reason="bad_request", message=str(wrong), error=wrong)
    if isinstance(exc, httpx.TimeoutException | TimeoutError):
        return Verdict(kind="ambiguous", reason="timeout", message=message)
    if isinstance(exc, httpx.TransportError | httpx.StreamError | OSError):
        return Verdict(kind="ambiguous", reason="cut_body", message=message)
    # Whatever else fails while a server's bytes are read: they can be such as nobody thought of.
    return Verdict(kind="ambiguous", reason="unreadable", message=message)


def _unsaid(exc: BaseException) -> str:
    """What an exception without words means."""
    if isinstance(exc, httpx.ConnectTimeout):
        what = "no connection in time"
    elif isinstance(exc, httpx.TimeoutException | TimeoutError):
        what = "no answer in time"
    elif isinstance(exc, httpx.TransportError | OSError):
        what = "the connection broke off"
    else:
        what = "the answer cannot be read"
    return f"{what} ({type(exc).__name__})"


def _chain(exc: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    current: BaseException | None = exc
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def _of_answer(status: int, headers: Mapping[str, str], body: bytes, where: str) -> Verdict:
    said = read_error(body)
    if 200 <= status < 300 and said.status is not None:
        status = said.status  # OpenRouter and others: the status of whoever stands behind them
    wait_s = retry_after_s(headers)
    verdict = _of_error(status, headers, said, where)
    return replace(verdict, retry_after_s=said.wait_s if wait_s is None else wait_s)


def _of_error(status: int, headers: Mapping[str, str], said: ErrorBody, where: str) -> Verdict:
    text, names, message = said.text, said.names, clean(said.text)

    def verdict(kind: Any, reason: str, error: WoolmillError | None = None) -> Verdict:
        return Verdict(
            kind=kind, reason=reason, message=str(error) if error else message, error=error
        )

    def wrong(reason: str, error: WoolmillError) -> Verdict:
        return verdict("settings", reason, error)

    asks_to_wait = said.wait_s is not None or retry_after_s(headers) is not None
    if names & QUOTA_CODES or QUOTA_TEXT.search(text) or (status == 402 and not asks_to_wait):
        credit = f"{where}: the account is out of credit; add credit, then resume ({message})"
        return verdict("fatal", "quota", StoppedError(credit))
    if status in (200, 400, 403, 422, 451) and (
        names & CONTENT_POLICY or said.moderated or CONTENT_TEXT.search(text)
    ):
        return verdict("dead", "content_filter")
    if (settings := _settings(status, headers, said, where)) is not None:
        return wrong(*settings)
    if (too_long := _overflow(status, said)) is not None:
        return too_long
    asked = headers.get("x-should-retry", "").lower()
    if status == 429 or names & THROTTLED or status == 402:
        return verdict("dead" if asked == "false" else "throttled", "http_429")
    if asked == "false":
        return verdict("dead", f"http_{status}")
    if status in (502, 503, 504, 529):
        slow = asks_to_wait or SLOW_DOWN.search(text) or "overloaded_error" in names
        return verdict("throttled" if slow else "unavailable", f"http_{status}")
    if status in (408, 409, 425, 500) or status > 504 or asked == "true":
        return verdict("ambiguous", f"http_{status}")
    if 200 <= status < 300:
        return verdict("ambiguous", "error_in_answer")
    if status in (400, 422):
        refused = ConfigError(
            f"{where}: refuses the request ({message}); check --model, --api and the sampling "
            "settings, or leave a field out with --without NAME"
        )
        told = f"the host refuses this request: {message or 'it does not say why'}"
        found = wrong(f"http_{status}", refused)  # its error is about the run, its words the row's
        return replace(found, message=told, parameters=said.parameters)
    return verdict("dead", f"http_{status}")


def _settings(
    status: int, headers: Mapping[str, str], said: ErrorBody, where: str
) -> tuple[str, WoolmillError] | None:
    """The reason and the error where the key or the address is wrong."""
    text, message = said.text, clean(said.text)
    if status == 401 or said.names & KEY_CODES or (status == 400 and KEY_TEXT.search(text)):
        return "http_401", AuthError(f"{where}: the key was refused ({message})")
    if status == 403:
        return "http_403", AuthError(f"{where}: not permitted ({message})")
    if 300 <= status < 400:
        target = clean(headers.get("location", "?"))
        return "redirect", ConfigError(
            f"{where}: redirects to {target}; use that as the base URL if you trust it"
        )
    if status in (404, 405, 501):
        return f"http_{status}", ConfigError(
            f"{where}: not found ({message}); {_hint(where, text, status)}"
        )
    return None


def _overflow(status: int, said: ErrorBody) -> Verdict | None:
    """That the prompt, or what may be answered, is longer than the host takes; with its numbers."""
    text, message = said.text, clean(said.text)
    if status in (400, 422) and (limit := COMPLETION_LIMIT.search(text)):
        most = int([group for group in limit.groups() if group][-1].replace(",", ""))
        return Verdict(
            kind="overflow", reason="completion_too_long", message=message, completion_limit=most
        )
    if (
        said.names & OVERFLOW_CODES
        or (status in (400, 413, 422, 500) and OVERFLOW_TEXT.search(text))
        or (status == 429 and TOO_LARGE.search(text))
    ):
        return Verdict(
            kind="overflow",
            reason="context_overflow",
            message=message,
            context_length=_number(LIMIT_NUMBER, text),
            prompt_tokens=_number(PROMPT_NUMBER, text),
        )
    return None


def _hint(where: str, text: str, status: int) -> str:
    """What a person who meets a 404 should look at."""
    if "azure" in where.lower():
        return (
            "Azure takes https://NAME.openai.azure.com/openai/v1 with the deployment as --model, "
            "or a deployment's own URL with its ?api-version="
        )
    if "model" in text.lower() and status == 404:
        return "check --model"
    return (
        "check the base URL, which usually ends in /v1, and --api (chat or completions: a host may "
        "have one alone)"
    )


def _number(pattern: re.Pattern[str], text: str) -> int | None:
    for found in pattern.finditer(text):
        for group in found.groups():
            if group:
                return int(group.replace(",", ""))
    return None


DURATION = re.compile(
    r"^(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?$"
)
"""How Go's servers write a time to wait: ``6m0s``, ``1h2m``, ``250ms``. The ``m`` of ``ms`` is no
minute."""


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
        return _finite(str(d * 86_400 + h * 3_600 + m * 60 + s + ms_ / 1000))
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
        except (ValueError, TypeError, IndexError, OverflowError):
            continue
        return when if when.tzinfo else when.replace(tzinfo=UTC)
    return None
