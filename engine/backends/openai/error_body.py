"""What the body of an error says, in the forms of all hosts: ``read_error`` gives an ``ErrorBody``.

OpenAI, Anthropic, vLLM and FastAPI have an object ``error`` or ``detail``; Mistral nests FastAPI's
list of fields; Gemini puts the object into a list; OpenRouter gives the status as a number within
an answer of status 200; Cloudflare has a list ``errors``, MiniMax an object ``base_resp`` of which
code 0 is none. A page in HTML is what a gateway in between says.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

__all__ = ["MAX_MESSAGE", "ErrorBody", "as_json", "clean", "is_error", "is_html", "read_error"]

MAX_MESSAGE = 300
"""Characters of a server's words that a person is shown: a few lines of a terminal."""
MAX_TEXT = 16_384
"""Characters of an error's message that are looked at."""
MAX_DEPTH = 6
"""How deep objects within an error's body are looked through."""
CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
"""Escape sequences (``ESC[31m``), control characters, and the marks that turn the direction of
text: with any of these a server could write over the screen or pass for something else."""
KEY = re.compile(r"(?:sk|pk|key|hf|gsk)[-_][A-Za-z0-9_-]{8,}|Bearer +\S+")
"""What looks like a secret: ``sk-…``, ``hf_…``, ``Bearer …``. Some hosts repeat the key in their
message."""
TITLE = re.compile(r"<title[^<>]{0,200}>([^<]{0,300})", re.IGNORECASE)
"""The title of a page in HTML, as of a gateway: ``<title>502 Bad Gateway</title>``. All repeats are
bounded: the page is a stranger's."""
NUMBER = r"(\d{1,9}(?:\.\d{1,9})?)"
"""A number in words for people, ``12`` or ``1.25``; bounded, as above."""
RETRY_IN = re.compile(
    r"(?:try again|retry|wait)(?: again)?(?: in| after| for)?:? ?"
    rf"(?:{NUMBER} ?h)?(?:{NUMBER} ?m(?:in(?:ute)?s?)?(?=\d|\b) ?)?"
    rf"(?:{NUMBER} ?(ms|milliseconds?|s|secs?|seconds?)\b)?",
    re.IGNORECASE,
)
"""OpenAI: "Please try again in 1.2s"; Groq "in 7m12.5s"; Moonshot "after 1 seconds"."""
MESSAGES = ("message", "detail", "msg", "status_msg", "error")
"""Where the message is, the likeliest first."""
CODES = ("code", "type", "status", "error_code", "error_type")
"""Where hosts name the kind of an error: ``{"type": "insufficient_quota"}``."""
STATUSES = ("code", "status", "http_status_code", "status_code")
"""Where hosts repeat, or first give, the HTTP status within the body."""
FLAT = ("message", "detail", "msg", "code")
"""What an error has that comes without an envelope."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBody:
    """An error as its host words it."""

    text: str
    """The message, as it came."""
    names: frozenset[str] = frozenset()
    """Its code, type and status, in lower case."""
    status: int | None = None
    """The HTTP status that it gives itself, 400 to 599."""
    parameters: tuple[str, ...] = ()
    """The fields of the request that it complains of, where it lists them."""
    moderated: bool = False
    """It says why this very prompt was flagged."""
    wait_s: float | None = None
    """How long to wait, by its own account."""


def clean(text: str) -> str:
    """A server's words for a terminal: one line, no escape sequences, no keys, not endless."""
    line = " ".join(CONTROL.sub(" ", text[: 4 * MAX_MESSAGE]).split())
    line = KEY.sub("…", line)
    return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 1] + "…"


def is_html(raw: bytes, content_type: str = "") -> bool:
    """Whether ``raw`` is a page for a browser."""
    return "html" in content_type.lower() or raw[:200].lstrip().startswith(b"<")


def as_json(value: Any) -> bytes:
    """``value``, which was JSON, as JSON again; what is nested too deeply to be written is said."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return b'"nested too deeply"'


def is_error(data: dict[str, Any], *, whole: bool) -> bool:
    """Whether an answer (``whole``), or one event of a stream, tells of an error."""
    base = data.get("base_resp")
    if data.get("error") or data.get("errors") or (isinstance(base, dict) and _failed(base)):
        return True
    if whole:
        return not data.get("choices") and bool(data.keys() & FLAT)
    return "choices" not in data and any(isinstance(data.get(name), str) for name in FLAT)


def _failed(base: dict[str, Any]) -> bool:
    return bool(base.get("status_code"))


def read_error(body: bytes) -> ErrorBody:
    """The error that ``body`` tells of; its text alone where it has no form that is known."""
    try:
        data: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ErrorBody(text=_page(body))
    error = _innermost(data)
    if not isinstance(error, dict):
        text = error if isinstance(error, str) else as_json(error).decode()
        return ErrorBody(text=text[:MAX_TEXT])
    objects = list(_objects(error))
    metadata = [o for o in objects if {"reasons", "flagged_input"} & o.keys()]
    statuses = (_status(error.get(name)) for name in STATUSES)
    return ErrorBody(
        text=_message(error)[:MAX_TEXT],
        names=frozenset(
            str(value).lower() for name in CODES if isinstance(value := error.get(name), str)
        ),
        status=next((status for status in statuses if status is not None), None),
        parameters=_parameters(error, objects),
        moderated=bool(metadata),
        wait_s=_wait_s(error, objects),
    )


def _page(body: bytes) -> str:
    text = body[:MAX_TEXT].decode("utf-8", "replace")
    if not is_html(body):
        return text
    title = TITLE.search(text)
    words = html.unescape(title[1]).strip() if title else ""
    return f"a page in HTML: {words!r}" if words else "a page in HTML"


def _innermost(data: Any) -> Any:
    """The object that holds message and code, or the plain text in its place."""
    for _ in range(MAX_DEPTH):
        if isinstance(data, list) and data:
            data = data[0]
        elif isinstance(data, dict) and (inner := data.get("error") or data.get("errors")):
            if isinstance(inner, str) and data.keys() & {"message", "detail", *CODES}:
                return data
            data = inner
        elif isinstance(data, dict) and isinstance(base := data.get("base_resp"), dict):
            return base if _failed(base) else data
        else:
            break
    return data


def _message(error: dict[str, Any]) -> str:
    for name in MESSAGES:
        if value := error.get(name):
            return value if isinstance(value, str) else as_json(value).decode()
    return as_json(error).decode() if error else ""


def _status(code: Any) -> int | None:
    if isinstance(code, str) and len(code) == 3 and code.isdecimal():
        code = int(code)
    return code if isinstance(code, int) and 400 <= code <= 599 else None


def _objects(value: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """``value`` and the objects below it."""
    if depth > MAX_DEPTH:
        return
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for below in value[:32]:
            yield from _objects(below, depth + 1)


def _parameters(error: dict[str, Any], objects: list[dict[str, Any]]) -> tuple[str, ...]:
    """OpenAI's ``param``; FastAPI's ``loc`` (``["body", NAME]``, or a model's name between)."""
    found = [error["param"]] if isinstance(error.get("param"), str) else []
    for below in objects:
        location = below.get("loc")
        if isinstance(location, list):
            found += [name for name in location[:MAX_DEPTH] if isinstance(name, str)]
    return tuple(dict.fromkeys(name.split(".")[0].split("[")[0] for name in found))


def _wait_s(error: dict[str, Any], objects: list[dict[str, Any]]) -> float | None:
    """Gemini's ``retryDelay`` ("34s"), a ``retry_after`` in seconds, or the message's own words."""
    for below in objects:
        for name in ("retryDelay", "retry_after", "retry_after_seconds"):
            value = below.get(name)
            if isinstance(value, str) and re.fullmatch(r"\d{1,9}(?:\.\d{1,9})?s?", value):
                return float(value.removesuffix("s"))
            if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
                return float(value) if value < 1e9 else None
    for found in RETRY_IN.finditer(_message(error)[: 4 * MAX_MESSAGE]):
        hours, minutes, seconds, unit = found.groups(default="")
        if hours or minutes or seconds:
            scale = 0.001 if unit.lower().startswith("m") else 1.0
            whole = float(hours or 0) * 3600 + float(minutes or 0) * 60
            return whole + float(seconds or 0) * scale
    return None
