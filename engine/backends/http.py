"""An OpenAI-shaped server: a hosted API or vLLM's. One ``HttpBackend`` is one endpoint.

It makes one attempt and is strict about what counts as an answer: the body is whole, it is JSON,
each prompt has its choice and each choice its ``finish_reason``; in a stream an error event
outweighs ``[DONE]``, and without
``[DONE]`` there is no answer. Everything else is a ``Failure`` with the verdict of
``engine.backends.classify``.

Whole answers cost far less CPU than streams (one event a token), but say nothing while they are
made. So ``stream`` is by default a matter of load: below ``STREAM_BELOW`` in flight all are
streamed, which gives the time to the first token and shows that the engine behind a healthy port
still generates; beyond, all are asked for whole. Where one of those never came, more are streamed
for a while: a silence then costs its slot the time-out of a stream, not that of a whole answer.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import httpx
import orjson

from engine.backends.base import Failure, Verdict
from engine.backends.classify import Phase, classify, clean
from engine.backends.deadlines import Deadlines
from engine.backends.reply import Reply, Unpacker, parsed
from engine.backends.transport import FastTransport
from engine.errors import ConfigError, UnavailableError
from engine.records import Completion, Prompt
from engine.secrets import Secret

__all__ = ["HttpBackend", "Timeouts", "normalise_base_url"]

STREAM_BELOW, STREAM_IN_DOUBT_BELOW = 64, 256
"""So many requests in flight; the second where a time-out makes the server doubtful."""
IN_DOUBT = 1000
"""Answers after a time-out for which it is."""
SILENCE_S = 60.0
"""No event from any of the streams in flight for so long: the engine hangs behind its port."""
GAUGES_S = 2.0
"""How long an answer to ``/metrics`` may take; the next one is asked for soon."""
RUNNING = rb"vllm:num_requests_running|sglang:num_running_reqs|llamacpp:requests_processing"
WAITING = rb"vllm:num_requests_waiting|sglang:num_queue_reqs|llamacpp:requests_deferred"
PREEMPTIONS = rb"vllm:num_preemptions(?:_total)?"
GAUGE = re.compile(
    rb"^(?:(%b)|(%b)|(%b))(?:\{.*\})? ([0-9.eE+]+)$" % (RUNNING, WAITING, PREEMPTIONS), re.MULTILINE
)
"""vLLM, SGLang and llama.cpp's server; tgi has no counterpart."""
MAX_RESPONSE_BYTES = 32 * 2**20
MAX_LINE_BYTES = 2**20
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long one attempt may take, in seconds."""

    connect_s: float = 5.0
    first_token_s: float = 120.0
    """A stream's first event. Includes the server's own queue."""
    idle_s: float = 30.0
    """Silence within a stream."""
    total_s: float = 600.0
    """The whole attempt, however busy it looks."""


def normalise_base_url(text: str) -> httpx.URL:
    """The API's root, without a trailing slash: ``http://host:8000`` becomes
    ``http://host:8000/v1``.

    Raises ConfigError for other schemes, for credentials and for queries: keys in URLs end in logs.
    """
    try:
        url = httpx.URL(text.strip())
    except httpx.InvalidURL as exc:
        raise ConfigError(f"--base-url: not a URL ({clean(str(exc))})") from exc
    if url.userinfo or url.query or url.fragment:
        raise ConfigError(
            "--base-url: credentials, queries and fragments are not taken from a URL; "
            "give the key by environment or file"
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"--base-url: {clean(text)} needs http:// or https:// and a host")
    path = url.path.rstrip("/")
    for suffix in ("/chat/completions", "/completions", "/models"):
        path = path.removesuffix(suffix)
    return url.copy_with(path=path or "/v1")


class HttpBackend:
    """One endpoint. See ``engine.backends.base.Backend`` for the methods' contract.

    Args:
        base_url: with or without ``/v1``.
        model: as the server names it; None takes the one model that the server serves.
        key: sent as ``Authorization: Bearer``; over plain http only to this machine, unless
            ``insecure_http``.
        transport: what carries requests; by default ``engine.backends.transport.FastTransport``.
        stream: True, False, or ``"auto"`` (see the head of this file).
        strict_model: stop when a reply names another model than was asked for.
        max_in_flight: a limit known beforehand; None lets the limiter find it.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        key: Secret | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        timeouts: Timeouts | None = None,
        stream: bool | Literal["auto"] = "auto",
        strict_model: bool = False,
        insecure_http: bool = False,
        ca_file: str | None = None,
        max_in_flight: int | None = None,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
    ) -> None:
        url = normalise_base_url(base_url)
        if (
            key is not None
            and url.scheme == "http"
            and not insecure_http
            and not _is_loopback(url.host)
        ):
            raise ConfigError(
                f"{url.host}: the key would travel unencrypted; use https, "
                "or --insecure-http if the network is yours"
            )
        self.name = str(url).removesuffix("/v1")
        self.model = model or ""
        self.context_length: int | None = None
        self.max_in_flight = max_in_flight
        self.is_vllm = False
        self.quota: dict[str, str] = {}
        """The latest ``x-ratelimit-*`` headers, names without that prefix."""
        self.heard_at_s = 0.0
        self._calls = Deadlines()
        self._has_gauges = True
        self._base = url
        self._root = url.copy_with(path=url.path.removesuffix("/v1") or "/")
        self._urls = {
            "completions": url.copy_with(path=url.path + "/completions"),
            "chat": url.copy_with(path=url.path + "/chat/completions"),
        }
        self._key = key
        self._transport = transport or FastTransport(ca_file=ca_file)
        self._timeouts = timeouts or Timeouts()
        self.hung_after_s = self._timeouts.total_s
        self._stream = stream
        self._in_doubt = 0
        self._strict_model = strict_model
        self._max_response_bytes = max_response_bytes
        # The rest of a call's time is ``_calls``' to watch.
        self._wire_timeout = {
            "connect": self._timeouts.connect_s,
            "read": None,
            "write": None,
            "pool": None,
        }
        self._identity: tuple[str, str, int | None] | None = None
        self._answered = False
        self._checked = False
        self._checking = asyncio.Lock()
        self._headers = httpx.Headers(
            {
                "Host": url.netloc.decode("ascii"),
                "Accept": "application/json, text/event-stream",
                "Accept-Encoding": "identity",
                "Content-Type": "application/json",
                "User-Agent": "woolmill",
            }
        )

    # The Backend protocol

    async def start(self) -> None:
        """Ask which models there are: the cheapest request that proves address, key and model."""
        try:
            await self._check("start")
        except Failure as exc:
            if exc.verdict.error is not None:
                raise exc.verdict.error from exc
            raise UnavailableError(f"{self.name}: no answer ({exc}); is the server up?") from exc

    async def complete(self, prompts: Sequence[Prompt]) -> list[Completion | BaseException]:
        try:
            if not self._checked:  # after an outage another model may have taken the port
                async with self._checking:
                    if not self._checked:
                        await self._check("probe")
            return await self._generate(prompts)
        except Failure as exc:
            if exc.verdict.kind == "unavailable" or isinstance(exc.__cause__, httpx.TransportError):
                self._checked = False
            raise
        except ConfigError as exc:  # from the check
            raise Failure(classify(exception=exc, where=self.name)) from exc

    async def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        if not self.is_vllm:
            return None
        counts: list[int] = []
        url = self._root.copy_with(path=self._root.path.rstrip("/") + "/tokenize")
        for text in texts:
            body = {"model": self.model, "prompt": text, "add_special_tokens": True}
            data = await self._json("POST", url, body, "probe")
            count = data.get("count") if isinstance(data, dict) else None
            if not isinstance(count, int):
                return None
            counts.append(count)
        return counts

    async def aclose(self) -> None:
        self._calls.close()
        await self._transport.aclose()

    # What the pool watches (engine.limits.WatchedServer)

    @property
    def identity(self) -> tuple[str, str, int | None] | None:
        """(model id, root, context length) as served; replicas must agree on the first two."""
        return self._identity

    def hang_up(self) -> None:
        """Let every call in flight time out now, which closes its connection."""
        self._calls.expire()
        self._checked = False

    async def load(self) -> tuple[float, float, float] | None:
        """(running, waiting, preemptions), summed over the server's engines."""
        if not self._has_gauges:
            return None
        url = self._root.copy_with(path=self._root.path.rstrip("/") + "/metrics")
        try:
            response, raw = await self._ask("GET", url, None, "probe", GAUGES_S)
        except Failure:
            return None
        sums = [0.0, 0.0, 0.0]
        found = False
        for *names, value in GAUGE.findall(raw) if response.status_code == 200 else ():
            sums[next(i for i, name in enumerate(names) if name)] += float(value)
            found = True
        self._has_gauges = found
        return (sums[0], sums[1], sums[2]) if found else None

    # Which model is served

    async def _check(self, phase: Phase) -> None:
        """Compare what is served with what was asked for, and with what was served before."""
        url = self._base.copy_with(path=self._base.path + "/models")
        data = await self._json("GET", url, None, phase)
        served = (
            [m for m in data.get("data") or [] if isinstance(m, dict)]
            if isinstance(data, dict)
            else []
        )
        ids = [str(m.get("id")) for m in served]
        if not self.model:
            if len(ids) != 1:
                raise ConfigError(f"{self.name}: serves {_listed(ids)}; choose one with --model")
            self.model = ids[0]
        if self.model not in ids:
            raise ConfigError(
                f"{self.name}: does not serve {self.model!r} but {_listed(ids)}; check --model"
            )
        card = served[ids.index(self.model)]
        length = card.get("max_model_len")
        if isinstance(length, int) and length > 0:
            self.context_length = length
        self.is_vllm = card.get("owned_by") == "vllm"
        identity = (self.model, str(card.get("root") or self.model), self.context_length)
        if self._identity is not None and identity != self._identity:
            raise ConfigError(
                f"{self.name}: came back with another model ({identity}, was {self._identity}); "
                "start a new run, or restore the model and resume"
            )
        self._identity = identity
        self._checked = True

    async def _json(self, method: str, url: httpx.URL, body: Any, phase: Phase) -> Any:
        limit_s = self._timeouts.connect_s + self._timeouts.idle_s
        response, raw = await self._ask(method, url, body, phase, limit_s)
        if response.status_code != 200:
            raise Failure(self._classified(response, raw))
        return parsed(raw, response, self.name)

    async def _ask(
        self, method: str, url: httpx.URL, body: Any, phase: Phase, limit_s: float
    ) -> tuple[httpx.Response, bytes]:
        """A small question that costs nothing. Raises Failure."""
        try:
            async with asyncio.timeout(limit_s):
                response = await self._send(method, url, orjson.dumps(body) if body else b"")
                try:
                    return response, await self._whole(response)
                finally:
                    await response.aclose()
        except Exception as exc:  # classify re-raises what is not the wire's
            raise self._failure(exc, phase) from exc

    # One attempt

    async def _generate(self, prompts: Sequence[Prompt]) -> list[Completion | BaseException]:
        below = STREAM_IN_DOUBT_BELOW if self._in_doubt else STREAM_BELOW
        streamed = self._stream is True or (self._stream == "auto" and len(self._calls) < below)
        loop = asyncio.get_running_loop()
        began = loop.time()
        timeouts = self._timeouts
        first = timeouts.first_token_s if streamed else timeouts.total_s
        body = orjson.dumps(self._payload(prompts, streamed))
        call = asyncio.timeout(None)
        try:
            async with call:
                self._calls.set(call, began + min(first, timeouts.total_s))
                response = await self._send("POST", self._urls[prompts[0].api], body)
                try:
                    self.heard_at_s = loop.time()
                    self._note_quota(response.headers)
                    if response.status_code != 200:
                        refused = self._classified(response, await self._whole(response))
                        raise Failure(self._if_first(refused))
                    if streamed and "event-stream" in response.headers.get("content-type", ""):
                        answer = await self._read_stream(response, len(prompts), began, call)
                    else:
                        raw = await self._whole(response)
                        data = parsed(raw, response, self.name, len(prompts))
                        answer = Reply.whole(data, len(prompts))
                finally:
                    await response.aclose()
        except Failure:
            raise
        except Exception as exc:  # classify re-raises what is not the wire's
            if isinstance(exc, TimeoutError):
                self._in_doubt = IN_DOUBT
            raise self._failure(exc, "generate") from exc
        finally:
            self._calls.drop(call)
        if answer.error is not None:
            raise Failure(
                classify(status=200, headers=response.headers, body=answer.error, where=self.name)
            )
        if self._strict_model and answer.model and answer.model != self.model:
            error = ConfigError(f"{self.name}: answered as {answer.model!r}, not as {self.model!r}")
            raise Failure(Verdict(kind="fatal", reason="model", message=str(error), error=error))
        self._answered = True
        self._in_doubt = max(self._in_doubt - 1, 0)
        return answer.completions(prompts, loop.time() - began)

    def _if_first(self, verdict: Verdict) -> Verdict:
        """A request that is wrong before any was right: the settings are wrong, not the prompt."""
        if self._answered or verdict.reason not in ("http_400", "http_422"):
            return verdict
        error = ConfigError(
            f"{self.name}: refuses the first request ({verdict.message}); check model, api and "
            "sampling settings"
        )
        return replace(verdict, kind="fatal", message=str(error), error=error)

    def _payload(self, prompts: Sequence[Prompt], streamed: bool) -> dict[str, Any]:
        first = prompts[0]
        sampling = first.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if first.api == "chat":
            if len(prompts) != 1:
                raise ConfigError(
                    "the chat API takes one prompt a call; set --request-batch-size 1"
                )
            body["messages"] = [{"role": "user", "content": first.text}]
        else:
            body["prompt"] = first.text if len(prompts) == 1 else [p.text for p in prompts]
        if sampling.stop:
            body["stop"] = sampling.stop
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if sampling.forbid_eos and self.is_vllm:
            body["ignore_eos"] = True
        if streamed:
            body["stream"] = True
            body["stream_options"] = {"include_usage": True}
        return body

    async def _send(self, method: str, url: httpx.URL, body: bytes) -> httpx.Response:
        request = httpx.Request(  # a stream, since httpx takes ten times as long over ``content``
            method,
            url,
            headers=self._headers,
            stream=httpx.ByteStream(body),
            extensions={"timeout": self._wire_timeout},
        )
        request.headers["Content-Length"] = str(len(body))
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key.reveal()}"
        return await self._transport.handle_async_request(request)

    async def _whole(self, response: httpx.Response) -> bytes:
        unpack = self._unpacker(response)
        return b"".join([unpack(piece) async for piece in _pieces(response)])

    def _unpacker(self, response: httpx.Response) -> Unpacker:
        encoding = response.headers.get("content-encoding", "identity")
        return Unpacker(encoding, self._max_response_bytes)

    async def _read_stream(
        self, response: httpx.Response, count: int, began: float, call: asyncio.Timeout
    ) -> Reply:
        answer = Reply(count)
        unpack = self._unpacker(response)
        loop = asyncio.get_running_loop()
        end = began + self._timeouts.total_s
        buffer = b""
        async for piece in _pieces(response):
            *lines, buffer = (buffer + unpack(piece)).split(b"\n")
            if len(buffer) > MAX_LINE_BYTES:
                raise Failure(
                    Verdict(kind="ambiguous", reason="bad_stream", message="an endless line")
                )
            for line in lines:
                if line.startswith(b"data:") and not answer.done:
                    answer.event(line[5:].strip())
            self.heard_at_s = now = loop.time()
            if answer.ttft_s is None and answer.started:
                answer.ttft_s = now - began
                self.hung_after_s = SILENCE_S
            if answer.ttft_s is not None:
                self._calls.set(call, min(now + self._timeouts.idle_s, end))
        if answer.error is None and not answer.done:
            raise Failure(
                Verdict(kind="ambiguous", reason="cut_body", message="the stream has no end")
            )
        return answer

    def _note_quota(self, headers: httpx.Headers) -> None:
        found = [(k, v) for k, v in headers.raw if k[:12].lower() == b"x-ratelimit-"]
        if found:
            self.quota = {k[12:].decode("ascii").lower(): v.decode("ascii") for k, v in found}

    def _classified(self, response: httpx.Response, body: bytes) -> Verdict:
        return classify(
            status=response.status_code, headers=response.headers, body=body, where=self.name
        )

    def _failure(self, exc: Exception, phase: Phase) -> Failure:
        if isinstance(exc, Failure):
            return exc
        return Failure(classify(exception=exc, phase=phase, where=self.name))


def _pieces(response: httpx.Response) -> httpx.AsyncByteStream:
    """The body as it comes."""
    assert isinstance(response.stream, httpx.AsyncByteStream)
    return response.stream


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listed(ids: Sequence[str]) -> str:
    return ", ".join(clean(i) for i in ids[:8]) or "no model"
