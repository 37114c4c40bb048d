"""API keys: read from the environment or a private file, and never shown.

A key on the command line can be read in /proc by everyone on the machine, and a key in a URL ends
in logs, so neither is a way in. What comes out is a ``Secret``: printing, formatting, copying or
pickling it gives a mask. The price: whoever needs the key writes ``reveal()``, which a reader and
``grep`` can find.
"""

from __future__ import annotations

import base64
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

from engine.errors import ConfigError

__all__ = [
    "Secret",
    "keep_from_children",
    "looks_like_a_key",
    "read_key",
    "secret_field",
    "tells_a_key",
    "variable_name",
]

DEFAULT_VARIABLE = "OPENAI_API_KEY"
"""The one variable that may be absent without a word: many servers want no key."""
MAX_KEY_FILE_BYTES = 16_384
"""Read at most of a key's file; a longer one is none."""
_NO_NAME = (
    "this is the name of an environment variable that holds the key, and what is given is no such "
    f"name (it is not shown, as it may be the key); for example: export {DEFAULT_VARIABLE}=…"
)
"""Said where a key itself was given, which must not be repeated."""
LONG_CHARS, SHORT_CHARS = 16, 6
"""A key of fewer characters is looked for in texts only where it holds letters and digits; with
fewer than the second, never. "EMPTY", "ollama" and "none" are what people give to servers that want
no key, and a text may well hold such a word."""


KEY = re.compile(
    r"(?<![A-Za-z0-9])(?:sk|gsk|hf|xai|nvapi|pplx)[-_](?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{16,}"
    r"|\b(?:Bearer|Basic) +\S{8,}"
)
"""What hosts' keys look like, wherever they stand."""
SECRET_FIELD = re.compile(
    r"(?:^|[-_])(?:api-?_?key|(?:access|auth|bearer|refresh|session|api)[-_]?token|authorization"
    r"|secret(?:[-_]key)?|access[-_]key|private[-_]key|password|passwd|cookie|credentials?)$",
    re.IGNORECASE,
)
"""Fields of a request's body that hold secrets. Others are called ``max_tokens``,
``prompt_cache_key`` or ``stop_token_ids``, and hold none.
"""


_variables: set[str] = set()
_keys: set[Secret] = set()
"""What keys were read from, and the keys: for ``tells_a_key`` alone."""


class Secret:
    """A key that masks itself: ``str`` and ``repr`` show at most its last four characters."""

    __slots__ = ("_forms", "_value")

    def __init__(self, value: str, *, source: str = "key") -> None:
        """Raises ConfigError where ``value`` cannot be an HTTP header: empty, quoted, spaces, not
        ASCII.
        """
        if not value:
            raise ConfigError(f"{source}: the API key is empty; set it, or leave it out altogether")
        if not value.isascii() or not value.isprintable() or any(c in " \"'" for c in value):
            raise ConfigError(
                f"{source}: the API key holds spaces, quotes, line breaks or "
                "characters beyond ASCII; store the bare key"
            )
        self._value = value
        self._forms = tuple(dict.fromkeys(_forms(value)))

    def reveal(self) -> str:
        return self._value

    def mask(self, text: str) -> str:
        """``text`` with a mask wherever the key stands in it, also percent-encoded, escaped as in
        JSON, or in base64.
        """
        for form in self._forms:
            if form in text:
                text = text.replace(form, str(self))
        return text

    def occurs_in(self, data: bytes) -> bool:
        """Whether ``mask`` would change what these bytes say."""
        return any(form.encode() in data for form in self._forms)

    def __str__(self) -> str:
        shown = self._value[-4:] if len(self._value) >= 12 else ""
        prefix = "sk-" if self._value.startswith("sk-") else ""
        return f"{prefix}…{shown}"

    def __repr__(self) -> str:
        return f"Secret({str(self)!r})"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(("Secret", self._value))

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Secret:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is never pickled")


def _forms(key: str) -> Iterator[str]:
    """How a text may say ``key``; nothing for what cannot be told from a word."""
    mixed = any(c.isdigit() for c in key) and any(c.isalpha() for c in key)
    if len(key) < (SHORT_CHARS if mixed else LONG_CHARS):
        return
    yield key
    yield quote(key, safe="")
    yield quote(key)
    yield (escaped := json.dumps(key)[1:-1])
    yield escaped.replace("/", "\\/")
    for before in range(3):  # bytes before the key in its group of three
        encoded = base64.b64encode(bytes(before) + key.encode()).decode().rstrip("=")
        known = encoded[(0, 2, 3)[before] : len(encoded) - bool((before + len(key)) % 3)]
        yield known
        yield known.replace("+", "-").replace("/", "_")


def read_key(*, env: str | None = None, file: str | Path | None = None) -> Secret | None:
    """The key in environment variable ``env``, else in ``file``; None where ``env`` is the default
    and not set, and there is no file.

    The file holds the key and nothing else, belongs to this user, and nobody else may read it
    (mode 0600).
    Raises ConfigError.
    """
    key = None
    if env:
        keep_from_children(env)
        if (value := os.environ.get(env)) is not None:
            key = Secret(value.strip(), source=f"${env}")
    if key is None and file is not None:
        key = _from_file(Path(file))
    if key is not None:
        _keys.add(key)
    elif env and env != DEFAULT_VARIABLE:
        raise ConfigError(
            f"key_env: the environment variable {env} is not set; set it to the key (export "
            f"{env}=…), or leave --key-env out where the server wants none"
        )
    return key


def variable_name(value: str) -> str:
    """``value``, which must be the name of an environment variable. Raises ValueError, without
    saying what may be the key itself.
    """
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", value):
        raise ValueError(_NO_NAME)
    return value


def _may_be_a_key(value: str) -> bool:
    """Whether a name is rather a key: long, with small letters and digits, as no variable is."""
    long = len(value) >= LONG_CHARS
    return long and any(c.islower() for c in value) and any(c.isdigit() for c in value)


def keep_from_children(variable: str, holds: Secret | None = None) -> None:
    """No child process may see this variable of the environment, whether a key is read from it or
    not, nor what else ``holds`` that key. Raises ConfigError where it is rather a key than a name.
    """
    if variable not in os.environ and _may_be_a_key(variable):
        raise ConfigError(f"key_env: {_NO_NAME}")
    _variables.add(variable)
    if holds is not None:
        _keys.add(holds)


def looks_like_a_key(text: str) -> bool:
    """Whether ``text`` holds what looks like a host's key."""
    return KEY.search(text) is not None


def secret_field(value: Any) -> str | None:
    """The first field, however deep in this JSON value, that holds a secret by its name or looks;
    None where none does.
    """
    todo: list[tuple[str, Any]] = [("", value)]
    while todo:
        name, inner = todo.pop()
        if isinstance(inner, dict):
            todo += inner.items()
        elif isinstance(inner, list | tuple):
            todo += [(name, each) for each in inner]
        elif isinstance(inner, str) and inner:
            if SECRET_FIELD.search(name) or looks_like_a_key(inner):
                return name
    return None


def tells_a_key(variable: str, value: str) -> bool:
    """Whether a process that is given this variable would know a key that was read here."""
    data = os.fsencode(value)
    return variable in _variables or any(key.occurs_in(data) for key in _keys)


def _from_file(path: Path) -> Secret:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    except OSError as exc:
        name = str(path)
        bare = os.sep not in name or name.startswith("sk-")
        shown = "key_file" if bare and _may_be_a_key(name) else name
        raise ConfigError(
            f"{shown}: the key file cannot be read ({exc.strerror}); name another"
        ) from exc
    with os.fdopen(fd, "rb") as opened:
        info = os.fstat(opened.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise ConfigError(f"{path}: the key file is not a regular file")
        if info.st_mode & 0o077:
            raise ConfigError(f"{path}: others can read the key file; run: chmod 600 {path}")
        raw = opened.read(MAX_KEY_FILE_BYTES)
    try:
        text = raw.decode("ascii").strip()
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: the key file holds characters beyond ASCII") from exc
    return Secret(text, source=str(path))
