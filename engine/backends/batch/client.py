"""Small questions and large files over HTTP, for all providers' batch APIs.

Bodies of files never lie in memory as a whole: they are sent from the disk and fetched onto it. A
key goes with requests to the provider's own origin alone; what answers are fetched from elsewhere
(a signed URL of a file store) goes without.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson

from engine.backends.base import Failure, Verdict
from engine.backends.masking import Masking
from engine.backends.openai.access import Access
from engine.backends.openai.address import Address, is_loopback
from engine.backends.openai.verdicts import classify
from engine.secrets import Secret

__all__ = ["Client", "refused"]

CONNECT_S = 10.0
"""A provider that takes no connection within this time is unreachable; silence later may be work.
"""
SILENCE_S = 120.0
"""The longest silence of a provider while it takes or gives a file."""
MOST_JSON_BYTES = 16 * 2**20
"""An answer to a small question that is larger is a fault. It would be held in memory as a whole;
only files, which go straight onto the disk, may be of any size."""
PIECE_BYTES = 2**16
"""How much of a file lies in memory while it is fetched or sent."""


class Client:
    """One provider's API.

    Args:
        address: its root.
        key: sent as ``key_header``, behind ``key_prefix``.
        headers: further headers of every request.
        transport: what carries requests; httpx's own, which streams what it sends.
    """

    def __init__(
        self,
        address: Address,
        *,
        name: str,
        key: Secret | None,
        key_header: str = "Authorization",
        key_prefix: str = "Bearer ",
        headers: Mapping[str, Callable[[], str]] | None = None,
        transport: httpx.AsyncBaseTransport,
        insecure_http: bool = False,
    ) -> None:
        self.address = address
        self.name = name
        access = Access(key=key, insecure_http=insecure_http)
        access.check(address.url)
        self._masking = access.masking
        self._key = key
        self._key_header, self._key_prefix = key_header, key_prefix
        self._headers = headers or {}
        self._http = httpx.AsyncClient(
            transport=transport,
            timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S),
            headers={"User-Agent": "woolmill", "Accept-Encoding": "identity"},
            trust_env=False,
        )

    async def json(
        self, method: str, path: str, body: Any = None, params: Mapping[str, Any] | None = None
    ) -> Any:
        """The JSON object (or list) that the provider answers with."""
        content = None if body is None else orjson.dumps(body)
        return await self.send(method, path, content=content, params=params)

    async def send(
        self,
        method: str,
        path: str,
        *,
        content: bytes | AsyncIterator[bytes] | None = None,
        params: Mapping[str, Any] | None = None,
        files: Any = None,
        data: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """As ``json``, with a body that is streamed, or a form with files."""
        sent = {"Content-Type": "application/json"} if content is not None else {}
        async with self._asked(
            method, self._url(path), content=content, params=params, files=files, data=data,
            headers={**sent, **(headers or {})},
        ) as response:  # fmt: skip
            raw = await _whole(response)
        if not raw.strip():
            return {}
        try:
            return orjson.loads(raw)
        except orjson.JSONDecodeError as exc:
            message = f"{self.name}: answers with what is no JSON"
            raise Failure(Verdict(kind="ambiguous", reason="bad_json", message=message)) from exc

    async def headers_of(
        self, method: str, path: str, *, body: Any, headers: Mapping[str, str]
    ) -> httpx.Headers:
        """The headers of the answer to a question, as where to upload to."""
        async with self._asked(
            method, self._url(path), content=orjson.dumps(body),
            headers={"Content-Type": "application/json", **headers},
        ) as response:  # fmt: skip
            await _whole(response)
            return response.headers

    async def fetch(self, source: str, path: Path) -> None:
        """Fetch a file, by its path below the API's root or its whole URL, onto the disk.

        It stands under its name only when it is there to its end.
        """
        part = path.with_name(path.name + ".part")
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            async with self._asked("GET", self._url(source), follow=True) as response:
                async for piece in response.aiter_bytes(PIECE_BYTES):
                    file.write(piece)
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
        part.replace(path)

    async def aclose(self) -> None:
        await self._http.aclose()

    def _url(self, path: str) -> httpx.URL:
        if not path.startswith(("http://", "https://")):
            path, _, query = path.partition("?")
            url = self.address.at(path)
            return url.copy_merge_params(dict(httpx.QueryParams(query))) if query else url
        try:
            return httpx.URL(path)
        except httpx.InvalidURL as exc:
            message = f"{self.name}: names a place that is no URL"
            raise Failure(Verdict(kind="dead", reason="bad_url", message=message)) from exc

    @asynccontextmanager
    async def _asked(
        self,
        method: str,
        url: httpx.URL,
        *,
        follow: bool = False,
        headers: Mapping[str, str] | None = None,
        **given: Any,
    ) -> AsyncIterator[httpx.Response]:
        """An answer of status 200 to 299. Raises Failure for all else."""
        try:
            for _ in range(4):
                sent = dict(headers or {})
                if self._is_ours(url):
                    sent |= {name: reveal() for name, reveal in self._headers.items()}
                    if self._key is not None:
                        sent[self._key_header] = self._key_prefix + self._key.reveal()
                async with self._http.stream(method, url, headers=sent, **given) as response:
                    if follow and response.is_redirect and "location" in response.headers:
                        url = url.join(response.headers["location"])
                        if url.scheme != "https" and not is_loopback(url.host):
                            raise self._failure(Failure(refused("redirects to plain http")))
                        continue
                    if not response.is_success:
                        raise await self._refusal(response)
                    yield response
                    return
            raise Failure(refused("redirects without end"))
        except Failure as exc:
            raise self._failure(exc) from exc.__cause__
        except (httpx.HTTPError, httpx.StreamError, OSError, TimeoutError) as exc:
            verdict = classify(exception=exc, phase="generate", where=self.name)
            raise self._failure(Failure(verdict)) from exc

    async def _refusal(self, response: httpx.Response) -> Failure:
        raw = await _whole(response)
        return Failure(
            classify(
                status=response.status_code,
                headers=response.headers,
                body=raw,
                where=self.name,
            )
        )

    def _failure(self, failure: Failure) -> Failure:
        return self._masking.failure(failure)

    def _is_ours(self, url: httpx.URL) -> bool:
        own = self.address.url
        return (url.scheme, url.host, url.port) == (own.scheme, own.host, own.port)

    @property
    def masking(self) -> Masking:
        """What takes the key out of the provider's words."""
        return self._masking


def refused(message: str) -> Verdict:
    """What a provider says no to, for good."""
    return Verdict(kind="dead", reason="refused", message=message)


async def _whole(response: httpx.Response) -> bytes:
    """The body of a small answer."""
    pieces, size = list[bytes](), 0
    async for piece in response.aiter_bytes():
        size += len(piece)
        if size > MOST_JSON_BYTES:
            raise Failure(Verdict(kind="ambiguous", reason="too_large", message="a huge answer"))
        pieces.append(piece)
    return b"".join(pieces)
