"""Where a key may go: base URLs that are taken and refused, plain http, and no trace of it."""

from __future__ import annotations

import logging

import httpx
import pytest

from engine.backends.openai.access import Access
from engine.backends.openai.address import read_address
from engine.backends.openai.backend import HttpBackend
from engine.errors import AuthError, ConfigError, UnavailableError
from engine.secrets import Secret
from tests.engine.backends.talk import verdict_of

pytestmark = pytest.mark.anyio

URLS = [
    ("http://localhost:8000", "http://localhost:8000/v1"),
    ("http://localhost:8000/", "http://localhost:8000/v1"),
    ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
    ("https://api.openai.com/v1/chat/completions", "https://api.openai.com/v1"),
    ("https://host/api/v3", "https://host/api/v3"),
    ("https://[::1]:8000/v1/completions", "https://[::1]:8000/v1"),
]


@pytest.mark.parametrize(("given", "base"), URLS)
def test_fault_118_base_urls_are_normalised(given: str, base: str) -> None:
    """With or without /v1, a slash, or the whole path of an endpoint."""
    assert str(read_address(given).url) == base


@pytest.mark.parametrize(
    "given",
    ["localhost:8000", "ftp://host/v1", "https://user:pw@host/v1", "https://host/v1?key=sk-1234",
     "https://sk-1234@host", "file:///etc/passwd", "http://", "", "http://[::1", "//host"],
)  # fmt: skip
def test_fault_118_and_security_4_base_urls_that_are_refused(given: str) -> None:
    """Other schemes and anything that may be a credential; which is not repeated in the message."""
    with pytest.raises(ConfigError) as caught:
        read_address(given)
    assert "sk-1234" not in str(caught.value)
    assert "pw" not in str(caught.value)


def test_security_9_a_key_over_plain_http() -> None:
    """Refused, except to this machine or where the user says that the network is theirs."""
    key = Secret("sk-0123456789abcdef")
    with pytest.raises(ConfigError, match="https"):
        HttpBackend("http://example.com", access=Access(key=key))
    for url in (
        "http://localhost:8000",
        "http://127.0.0.1",
        "http://[::1]:1",
        "https://example.com",
    ):
        HttpBackend(url, access=Access(key=key))
    HttpBackend("http://example.com", access=Access(key=key, insecure_http=True))


@pytest.mark.slow
async def test_security_2_and_3_the_key_appears_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    """Not in logs at any level, not in the failures' texts, not in the backend's own repr."""
    caplog.set_level(logging.DEBUG)
    key = Secret("sk-CANARY0123456789wxyz")
    shown = []
    for status in (400, 401, 429, 500):

        def echo(request: httpx.Request, status: int = status) -> httpx.Response:
            return httpx.Response(
                status, text=f"your key {request.headers['authorization']} is odd"
            )

        backend = HttpBackend(
            "http://localhost", "m", access=Access(key=key), transport=httpx.MockTransport(echo)
        )
        await backend.start()
        shown += [repr(await verdict_of(backend)), str(vars(backend))]
        unnamed = HttpBackend(
            "http://localhost", access=Access(key=key), transport=httpx.MockTransport(echo)
        )
        with pytest.raises((AuthError, ConfigError, UnavailableError)) as caught:
            await unnamed.start()
        shown += [str(caught.value), repr(caught.value.__cause__), str(vars(unnamed))]
    assert "CANARY" not in "".join(shown) + caplog.text
