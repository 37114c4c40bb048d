"""The ``Jobs`` of each provider, by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from engine.backends.batch.anthropic import VERSION, AnthropicJobs
from engine.backends.batch.client import Client
from engine.backends.batch.gemini import GeminiJobs
from engine.backends.batch.jobs import Jobs
from engine.backends.batch.local import CarriedJobs, VllmJobs
from engine.backends.batch.mistral import MistralJobs
from engine.backends.batch.openai import AzureJobs, OpenAIJobs
from engine.backends.batch.settings import Provider
from engine.backends.batch.together import TogetherJobs
from engine.backends.openai.address import Address, Header, read_address
from engine.backends.openai.wire import make_transport
from engine.errors import ConfigError
from engine.secrets import Secret

__all__ = ["LOCAL", "make_jobs"]

LOCAL = frozenset[Provider](("vllm", "file"))
"""Those that need no network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hosted:
    """Where a provider is, and how it is told the key."""

    make: Callable[[Client], Jobs]
    url: str = ""
    key_header: str = "Authorization"
    key_prefix: str = "Bearer "
    headers: Mapping[str, str] = field(default_factory=dict)


HOSTED: Mapping[str, _Hosted] = {
    "openai": _Hosted(make=OpenAIJobs, url="https://api.openai.com/v1"),
    "azure": _Hosted(make=AzureJobs, key_header="api-key", key_prefix=""),
    "together": _Hosted(make=TogetherJobs, url="https://api.together.xyz/v1"),
    "mistral": _Hosted(make=MistralJobs, url="https://api.mistral.ai/v1"),
    "anthropic": _Hosted(
        make=AnthropicJobs,
        url="https://api.anthropic.com/v1",
        key_header="x-api-key",
        key_prefix="",
        headers={"anthropic-version": VERSION},
    ),
    "gemini": _Hosted(
        make=GeminiJobs,
        url="https://generativelanguage.googleapis.com/v1beta/openai",
        key_header="x-goog-api-key",
        key_prefix="",
    ),
}
"""What is special about each provider. One without a ``url`` has an address for each customer, so
``--base-url`` must give it."""
GEMINI_ROOTS = ("/openai", "/v1beta")
"""What is taken off the end of a base URL: Gemini's own API begins at the host's root."""


def make_jobs(
    provider: Provider,
    *,
    folder: Path,
    model: str,
    base_url: str | None = None,
    query: tuple[str, ...] = (),
    key: Secret | None = None,
    headers: Mapping[str, Header] | None = None,
    ca_file: str | None = None,
    proxy: str | None = None,
    insecure_http: bool = False,
    vllm_python: Path | None = None,
    vllm_args: Mapping[str, str] | None = None,
) -> Jobs:
    """The batch API of ``provider``, at ``base_url`` or where it is known to be.

    Args:
        folder: the run's batches, for those that are local.
        key: unused by them.

    Raises ConfigError.
    """
    if provider == "vllm":
        return VllmJobs(folder, model, python=vllm_python, args=vllm_args)
    if provider == "file":
        return CarriedJobs(folder)
    hosted = HOSTED[provider]
    if not (base_url or hosted.url):
        raise ConfigError(
            f"--provider {provider} needs --base-url, as https://NAME.openai.azure.com/openai/v1"
        )
    address = read_address(base_url or hosted.url, query)
    if provider == "gemini":
        address = _root_of_gemini(address)
    further = {name: header.reveal for name, header in (headers or {}).items()}
    fixed = {name: _always(value) for name, value in hosted.headers.items()}
    client = Client(
        address,
        name=provider,
        key=key,
        key_header=hosted.key_header,
        key_prefix=hosted.key_prefix,
        headers={**fixed, **further},
        transport=make_transport(address.url, ca_file=ca_file, proxy=proxy, kind="httpx"),
        insecure_http=insecure_http,
    )
    return hosted.make(client)


def _always(value: str) -> Callable[[], str]:
    return lambda: value


def _root_of_gemini(address: Address) -> Address:
    path = address.url.path.rstrip("/")
    for suffix in GEMINI_ROOTS:
        path = path.removesuffix(suffix)
    url: httpx.URL = address.url.copy_with(path=path or "/")
    return Address(url=url, query=address.query, chat=True)
