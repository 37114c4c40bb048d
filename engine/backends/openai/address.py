"""Where requests go and what goes with each: base URL, query, headers.

A URL never holds a secret here, since URLs end in logs; a header may, and then comes from the
environment.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import httpx

from engine.backends.openai.error_body import clean
from engine.errors import ConfigError
from engine.records import Api
from engine.secrets import Secret, keep_from_children, looks_like_a_key

__all__ = [
    "Address",
    "Header",
    "is_link_local",
    "is_loopback",
    "read_address",
    "read_headers",
    "read_query",
]

SECRET_NAME = re.compile(
    r"auth|key|token|secret|password|passwd|cookie|credential|signature|^sig$|^code$", re.IGNORECASE
)
"""Names of headers and of a query's fields whose values are secrets."""
HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
OURS = frozenset(
    ("host", "content-length", "transfer-encoding", "connection", "accept-encoding", "content-type")
)
"""Headers on which the framing of a request or its meaning depends. A second value, given by the
user, would contradict the engine's own."""
DEPLOYMENT = re.compile(r"/openai/deployments/([^/]+)$")
"""Azure's classic URL; the key then goes in a header ``api-key``."""
CHAT_HOSTS = (
    "api.openai.com",
    "api.anthropic.com",
    "generativelanguage.googleapis.com",
    "api.mistral.ai",
    "api.groq.com",
    "api.perplexity.ai",
    "api.deepseek.com",
    "api.x.ai",
    "api.cohere.ai",
    "api.cohere.com",
    "api.moonshot.ai",
    "api.moonshot.cn",
    "dashscope.aliyuncs.com",
    "dashscope-intl.aliyuncs.com",
    "open.bigmodel.cn",
    "models.github.ai",
    "openai.azure.com",
)
"""Hosts whose models of today are asked by chat alone."""
ROOT_APIS = ("api.perplexity.ai", "models.inference.ai.azure.com")
"""Hosts whose API has no /v1 and no other path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """One endpoint's place."""

    url: httpx.URL
    """The API's root, without a trailing slash and without a query."""
    query: Mapping[str, str] = field(default_factory=dict)
    """Added to every request."""
    chat: bool = False
    """The URL, or the host, tells that chats are what it takes."""
    deployment: str | None = None
    """Azure's name for the model, from its classic URL."""

    @property
    def name(self) -> str:
        """For people and the store."""
        return str(self.url).rstrip("/").removesuffix("/v1")

    @property
    def api(self) -> Api:
        return "chat" if self.chat else "completions"

    def at(self, path: str) -> httpx.URL:
        """The URL of ``path`` below the API's root."""
        return self._with_query(self.url.copy_with(path=self.url.path.rstrip("/") + path))

    def at_root(self, path: str) -> httpx.URL:
        """The URL of ``path`` beside the API: ``/tokenize``, ``/metrics``."""
        root = self.url.path.removesuffix("/v1").rstrip("/")
        return self._with_query(self.url.copy_with(path=root + path))

    def _with_query(self, url: httpx.URL) -> httpx.URL:
        return url.copy_merge_params(dict(self.query)) if self.query else url


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A header of every request: ``plain``, and behind it the secret, if there is one."""

    plain: str = ""
    secret: Secret | None = None

    def reveal(self) -> str:
        return self.plain + (self.secret.reveal() if self.secret is not None else "")


def read_address(text: str, query: Sequence[str] = ()) -> Address:
    """``http://host:8000`` becomes ``http://host:8000/v1``; the path of a call is taken off, and
    what is left is the root.

    Args:
        text: as a person has it from a host's page.
        query: further ``NAME=VALUE`` for every request.

    Raises ConfigError for other schemes and for anything in the URL that is a secret.
    """
    try:
        url = httpx.URL(text.strip())
    except httpx.InvalidURL as exc:
        raise ConfigError(f"--base-url: not a URL ({clean(str(exc))})") from exc
    if url.userinfo or url.fragment:
        raise ConfigError(
            "--base-url: credentials and fragments are not taken from a URL; "
            "give the key by environment or file"
        )
    fields = dict(url.params.multi_items())
    secrets = (n for n, v in fields.items() if SECRET_NAME.search(n) or looks_like_a_key(v))
    if (secret := next(secrets, None)) is not None:
        raise ConfigError(
            f"--base-url: {clean(secret)} in a query ends in logs; give the key by environment or "
            "file"
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"--base-url: {clean(text)} needs http:// or https:// and a host")
    if url.port is not None and not 0 < url.port < 65_536:
        raise ConfigError(f"--base-url: {url.port} is no port")
    path = url.path.rstrip("/")
    chat = path.endswith("/chat/completions")
    root = path
    for suffix in ("/chat/completions", "/completions"):
        root = root.removesuffix(suffix)
    root = root.removesuffix("/models") or root  # Azure's "/models" is an API's root
    whole = root != path or url.host.lower() in ROOT_APIS
    path = root
    deployment = DEPLOYMENT.search(path)
    host = url.host.lower()
    return Address(
        url=url.copy_with(path=path or ("/" if whole else "/v1"), query=None),
        query=fields | read_query(query),
        chat=chat or any(host == known or host.endswith(f".{known}") for known in CHAT_HOSTS),
        deployment=deployment[1] if deployment else None,
    )


def read_query(pairs: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` pairs of ``--query``. Raises ConfigError."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--query {clean(pair)}: write NAME=VALUE")
        if SECRET_NAME.search(name) or looks_like_a_key(value):
            raise ConfigError(
                f"--query {clean(name)}: a secret in a URL ends in logs; use --header NAME=env:VAR"
            )
        found[name] = value
    return found


def read_headers(pairs: Sequence[str]) -> dict[str, Header]:
    """``NAME=VALUE`` and ``NAME=env:VAR`` pairs of ``--header``; from the environment come secrets.

    Raises ConfigError, which never says a value.
    """
    found: dict[str, Header] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not HEADER_NAME.fullmatch(name):
            raise ConfigError("--header: write NAME=VALUE or NAME=env:VARIABLE")
        if name.lower() in OURS:
            raise ConfigError(f"--header {name}: is made by the engine itself")
        if value.startswith("env:"):
            variable = value.removeprefix("env:")
            keep_from_children(variable)
            kept = os.environ.get(variable)
            if kept is None:
                raise ConfigError(f"--header {name}: the environment variable is not set")
            scheme, _, rest = kept.strip().rpartition(" ")  # "Bearer KEY" is a header's value too
            secret = Secret(rest, source=f"--header {name}")
            keep_from_children(variable, secret)
            found[name] = Header(plain=f"{scheme} " if scheme else "", secret=secret)
        elif SECRET_NAME.search(name) or looks_like_a_key(value):
            raise ConfigError(
                f"--header {name}: a secret on the command line can be read by others and ends in "
                f"the run's settings; use --header {name}=env:VARIABLE"
            )
        elif not value.isprintable() or not value.isascii():
            raise ConfigError(f"--header {name}: the value holds line breaks or is not ASCII")
        else:
            found[name] = Header(plain=value)
    return found


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_link_local(text: str) -> bool:
    """Whether an address is one by which a cloud machine reaches its own credentials."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address == ipaddress.IPv6Address("fd00:ec2::254"):  # the IPv6 metadata address of AWS
            return True
        mapped = address.ipv4_mapped or address.sixtofour
        if mapped is not None:
            return mapped.is_link_local
    return address.is_link_local
