"""URLs, queries and headers as people write them."""

from __future__ import annotations

import pytest

from engine.backends.openai.address import (
    is_link_local,
    is_loopback,
    read_address,
    read_headers,
    read_query,
)
from engine.errors import ConfigError

ROOTS = [
    ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1/chat/completions"),
    ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1/chat/completions"),
    ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1/chat/completions"),
    (" https://api.openai.com/v1 ", "https://api.openai.com/v1/chat/completions"),
    ("https://api.openai.com/v1/chat/completions", "https://api.openai.com/v1/chat/completions"),
    ("https://api.openai.com/v1/models", "https://api.openai.com/v1/chat/completions"),
    ("https://api.mistral.ai", "https://api.mistral.ai/v1/chat/completions"),
    ("https://api.perplexity.ai", "https://api.perplexity.ai/chat/completions"),
    ("https://api.perplexity.ai/chat/completions", "https://api.perplexity.ai/chat/completions"),
    ("https://api.deepseek.com/chat/completions", "https://api.deepseek.com/chat/completions"),
    ("https://api.z.ai/api/paas/v4/", "https://api.z.ai/api/paas/v4/chat/completions"),
    ("https://h.openai.azure.com/openai/v1/", "https://h.openai.azure.com/openai/v1/chat/completions"),
    ("https://h.openai.azure.com/openai/deployments/my-gpt/chat/completions?api-version=2024-10-21",
     "https://h.openai.azure.com/openai/deployments/my-gpt/chat/completions?api-version=2024-10-21"),
    ("https://h.services.ai.azure.com/models?api-version=2024-05-01-preview",
     "https://h.services.ai.azure.com/models/chat/completions?api-version=2024-05-01-preview"),
    ("https://generativelanguage.googleapis.com/v1beta/openai/",
     "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions"),
    ("https://api.cloudflare.com/client/v4/accounts/ID/ai/v1",
     "https://api.cloudflare.com/client/v4/accounts/ID/ai/v1/chat/completions"),
    ("https://dbc-1.cloud.databricks.com/serving-endpoints",
     "https://dbc-1.cloud.databricks.com/serving-endpoints/chat/completions"),
    ("https://models.github.ai/inference", "https://models.github.ai/inference/chat/completions"),
    ("https://models.inference.ai.azure.com", "https://models.inference.ai.azure.com/chat/completions"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "url"), ROOTS)
def test_where_a_chat_goes(text: str, url: str) -> None:
    """Whether a person copies the base URL, a call's URL or the host alone."""
    address = read_address(text)
    assert str(address.at("/chat/completions")) == url
    assert not address.name.endswith(("/", "/v1", "completions"))
    assert "?" not in address.name


def test_what_stands_beside_the_api() -> None:
    address = read_address("http://127.0.0.1:8000/some/v1")
    assert str(address.at_root("/tokenize")) == "http://127.0.0.1:8000/some/tokenize"
    assert str(address.at("/models")) == "http://127.0.0.1:8000/some/v1/models"


CHATS = [
    ("https://api.openai.com/v1", True),
    ("https://NAME.openai.azure.com/openai/v1", True),
    ("https://API.Mistral.ai/v1", True),
    ("https://api.x.ai/v1", True),
    ("https://notapi.x.ai/v1", False),
    ("https://openrouter.ai/api/v1", False),
    ("http://127.0.0.1:8000/v1", False),
    ("http://127.0.0.1:8000/v1/completions", False),
    ("http://127.0.0.1:8000/v1/chat/completions", True),
]


@pytest.mark.parametrize(("text", "chat"), CHATS)
def test_the_url_tells_that_chats_are_asked(text: str, chat: bool) -> None:
    assert read_address(text).chat is chat
    assert read_address(text).api == ("chat" if chat else "completions")


def test_azure_s_classic_url_is_taken_apart() -> None:
    address = read_address(
        "https://h.openai.azure.com/openai/deployments/my-gpt?api-version=2024-10-21", ["a=b=c"]
    )
    assert address.deployment == "my-gpt"
    assert address.query == {"api-version": "2024-10-21", "a": "b=c"}
    assert str(address.at("/models")).endswith(
        "/openai/deployments/my-gpt/models?api-version=2024-10-21&a=b%3Dc"
    )
    assert read_address("https://h.openai.azure.com/openai/v1").deployment is None


REFUSED = [
    ("ftp://host/v1", "http"),
    ("host:8000", "http"),
    ("//host/v1", "http"),
    ("https://", "host"),
    ("", "http"),
    ("https://user:pw@host/v1", "credentials"),
    ("https://host/v1#x", "fragments"),
    ("https://host/v1?key=abc", "key"),
    ("https://host/v1?API_KEY=abc", "API_KEY"),
    ("https://host/v1?access_token=abc", "access_token"),
    ("https://host/v1?sig=abc", "sig"),
    ("https://host:port/v1", "URL"),
]


@pytest.mark.parametrize(("text", "word"), REFUSED)
def test_refused_urls(text: str, word: str) -> None:
    """One line that says why, and never the secret."""
    with pytest.raises(ConfigError, match=word) as refused:
        read_address(text)
    assert "abc" not in str(refused.value)
    assert "pw" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("pair", ["novalue", "=x", "", "token=abc", "X-Api-Key=abc"])
def test_refused_queries(pair: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_query([pair])
    assert "abc" not in str(refused.value)


def test_headers_of_both_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_KEY", " 0123456789abcdef \n")
    monkeypatch.setenv("LOGIN", "Basic dXNlcjpwYXNzd29yZA==")
    headers = read_headers(
        ["X-Title=my run", "api-key=env:AZURE_KEY", "Authorization=env:LOGIN", "X-Empty="]
    )
    assert headers["X-Title"].reveal() == "my run"
    assert headers["X-Empty"].reveal() == ""
    assert headers["api-key"].reveal() == "0123456789abcdef"
    assert headers["Authorization"].reveal() == "Basic dXNlcjpwYXNzd29yZA=="
    assert "0123456789abcdef" not in repr(headers)
    assert "dXNlcjpwYXNzd29yZA" not in repr(headers)


@pytest.mark.parametrize(
    ("pair", "word"),
    [
        ("X-Title", "NAME=VALUE"),
        ("X Title=a", "NAME=VALUE"),
        ("Host=a", "itself"),
        ("Content-Length=5", "itself"),
        ("api-key=abc", "env:"),
        ("Authorization=abc", "env:"),
        ("X-Auth-Token=abc", "env:"),
        ("Cookie=abc", "env:"),
        ("X-Title=a\r\nX-Evil: abc", "line breaks"),
        ("X-Title=\u00fcabc", "ASCII"),
        ("api-key=env:WOOLMILL_NOT_SET", "not set"),
    ],
)
def test_refused_headers(pair: str, word: str) -> None:
    """One line that never says a value."""
    with pytest.raises(ConfigError, match=word) as refused:
        read_headers([pair])
    assert "abc" not in str(refused.value)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("localhost", True), ("127.0.0.2", True), ("::1", True), ("localhost.example.com", False),
     ("10.0.0.1", False), ("0.0.0.0", False)],
)  # fmt: skip
def test_this_machine(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("address", "refused"),
    [("169.254.169.254", True), ("::ffff:169.254.169.254", True), ("fe80::1%eth0", True),
     ("fd00:ec2::254", True), ("2002:a9fe:a9fe::", True), ("127.0.0.1", False),
     ("192.168.1.1", False), ("2001:db8::1", False)],
)  # fmt: skip
def test_where_cloud_machines_keep_their_credentials(address: str, refused: bool) -> None:
    assert is_link_local(address) is refused
