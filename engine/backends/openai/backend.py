"""An OpenAI-shaped server: a hosted API or vLLM's. One ``HttpBackend`` is one endpoint.

It makes one attempt and is strict about what counts as an answer: the body is whole, it is JSON,
each prompt has its choice and each choice is known to be at its end; in a stream an error event
outweighs all else. What is none is a ``Failure`` with the verdict of ``verdicts``. A host that
refuses a field of the request is asked again without it (``dialect``), within the same attempt: a
refusal costs nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import httpx
import orjson

from engine.backends.base import Failure, Verdict
from engine.backends.constraint import CONSTRAINT, Witness
from engine.backends.local.masking import Masking
from engine.backends.openai.address import Address, Header, is_loopback, read_address
from engine.backends.openai.body import CONTINUES, request_body
from engine.backends.openai.deadlines import Deadlines
from engine.backends.openai.dialect import Dialect
from engine.backends.openai.error_body import read_error
from engine.backends.openai.gauges import read_gauges
from engine.backends.openai.reply import Events, Reply, Unpacker, parsed
from engine.backends.openai.served import find_model, listed, read_models
from engine.backends.openai.streaming import Streaming
from engine.backends.openai.verdicts import Phase, classify
from engine.backends.openai.wire import FastTransport
from engine.errors import ConfigError, UnavailableError
from engine.records import Api, Completion, Prompt
from engine.secrets import Secret

__all__ = ["HttpBackend", "Timeouts"]

SILENCE_S = 60.0
"""No event from any of the streams in flight for so long: the engine hangs behind its port."""
GAUGES_S = 2.0
"""How long an answer to ``/metrics`` may take; the next one is asked for soon."""
MAX_RESPONSE_BYTES = 32 * 2**20
"""Of one answer, unpacked. It bounds memory against an answer, or a gzip bomb, without end; real
ones are far shorter."""
MAX_EVENT_BYTES = 2**20
"""Of one event of a stream, which carries a token or a few."""
START_TRIES, START_WAIT_S = 3, 0.5
"""How often, and how long apart, a server that answers the first question with a fault is asked."""
HEARD = ("http_", "html", "cut_body", "bad_json", "unreadable", "quota", "content_filter")
"""How reasons begin of which a server's answer is the cause, and not its absence."""
DONE_S = 1.0
"""How long a stream that says that it is done may take to end."""
FINISHED_S = 5.0
"""How long a stream may be silent once its choices are finished, for counts to come."""
MOST_LESSONS = 12
"""Fields that a host may refuse one after the other within one attempt."""
MOST_NAMES = 16
"""Model names of replies that are kept apart; more come from a host that makes them up."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long one attempt may take, in seconds."""

    connect_s: float = 5.0
    first_token_s: float = 120.0
    """Silence before a stream's first token; each event is a sign of life. Includes the server's
    own queue.
    """
    idle_s: float = 30.0
    """Silence within a stream, from the first token on."""
    total_s: float = 600.0
    """The whole attempt, however busy it looks."""


class HttpBackend:
    """One endpoint. See ``engine.backends.base.Backend`` for the methods' contract.

    Args:
        address: where it is; a URL with or without ``/v1`` will do.
        model: as the server names it; None takes the one model that the server serves.
        key: sent as ``Authorization: Bearer``, or as Azure's ``api-key``; over plain http only to
            this machine, unless ``insecure_http``.
        headers: further headers of every request.
        dialect: what the host takes of a request's body; learns.
        transport: what carries requests; by default ``engine.backends.openai.wire.FastTransport``.
        stream: True, False, or ``"auto"`` (see ``streaming``).
        strict_model: stop when a reply names another model than was asked for.
        max_in_flight: a limit known beforehand; None lets the limiter find it.
    """

    MODEL_FLAG: ClassVar[str] = "--model"
    """How the person names the model."""

    def __init__(
        self,
        address: Address | str,
        model: str | None = None,
        *,
        key: Secret | None = None,
        headers: Mapping[str, Header] | None = None,
        dialect: Dialect | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        timeouts: Timeouts | None = None,
        stream: bool | Literal["auto"] = "auto",
        strict_model: bool = False,
        insecure_http: bool = False,
        ca_file: str | None = None,
        max_in_flight: int | None = None,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
    ) -> None:
        if isinstance(address, str):
            address = read_address(address)
        headers = headers or {}
        secrets = [key] if key is not None else []
        secrets += [h.secret for h in headers.values() if h.secret is not None]
        self._masking = Masking(secrets)
        url = address.url
        if secrets and url.scheme == "http" and not insecure_http and not is_loopback(url.host):
            raise ConfigError(
                f"{url.host}: the key would travel unencrypted; use https, "
                "or --insecure-http if the network is yours"
            )
        self.name = address.name
        self.model = model or address.deployment or ""
        self.context_length: int | None = None
        self.max_in_flight = max_in_flight
        self.is_vllm = False
        self._continues = False
        """It goes on with an assistant's turn at a chat's end where it is told to."""
        self.dialect = dialect or Dialect()
        self.on_lesson: Callable[[str], None] = lambda what: log.warning("%s: %s", self.name, what)
        """Called with what the dialect learnt, in words."""
        self.witness = Witness(lambda what: self.on_lesson(what))
        self.quota: dict[str, str] = {}
        """The latest rate limit headers: ``limit-requests`` and the like."""
        self.heard_at_s = 0.0
        self._calls = Deadlines()
        self._streams_open: set[Reply] = set()
        self._has_gauges = True
        self._address = address
        self._urls: dict[Api, httpx.URL] = {
            "completions": address.at("/completions"),
            "chat": address.at("/chat/completions"),
        }
        self._transport = transport or FastTransport(ca_file=ca_file)
        self._timeouts = timeouts or Timeouts()
        self.hung_after_s = self._timeouts.total_s
        self._streaming = Streaming(stream)
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
        self._names: set[str] = set()
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
        self._secret_headers = {name: header.reveal for name, header in headers.items()}
        if key is not None and not {"authorization", "api-key"} & {n.lower() for n in headers}:
            if address.deployment:
                self._secret_headers["api-key"] = key.reveal
            else:
                self._secret_headers["Authorization"] = lambda: f"Bearer {key.reveal()}"

    # The Backend protocol

    async def start(self) -> None:
        """Ask which models there are: the cheapest request that proves address, key and model.

        A host without a list is no obstacle where the model is named.
        """
        try:
            await self._check("start")
        except Failure as exc:
            verdict = self._masking.verdict(exc.verdict)
            if verdict.error is not None:
                raise verdict.error from exc
            raise UnavailableError(
                f"{self.name}: no answer ({verdict.reason}: {verdict.message}); is the server up?"
            ) from exc
        except ConfigError as exc:
            raise ConfigError(self._masking.text(str(exc))) from exc

    async def complete(self, prompts: Sequence[Prompt]) -> list[Completion | BaseException]:
        try:
            if not self._checked:  # after an outage another model may have taken the port
                async with self._checking:
                    if not self._checked:
                        await self._check("probe")
            outcomes = await self._generate(prompts)
        except Failure as exc:
            if exc.verdict.kind == "unavailable" or isinstance(exc.__cause__, httpx.TransportError):
                self._checked = False
            raise self._masking.failure(exc) from exc.__cause__
        except ConfigError as exc:  # from the check
            verdict = Verdict(kind="settings", reason="config", message=str(exc), error=exc)
            raise self._masking.failure(Failure(verdict)) from exc
        return [self._masking.outcome(outcome) for outcome in outcomes]

    async def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        """By vLLM's own tokenizer, where it lets itself be asked."""
        if not self.is_vllm:
            return None
        counts: list[int] = []
        url = self._address.at_root("/tokenize")
        for text in texts:
            body = {"model": self.model, "prompt": text, "add_special_tokens": True}
            try:
                data = await self._json("POST", url, body, "probe")
            except Failure as exc:
                log.info("%s: cannot count tokens (%s); estimating", self.name, exc)
                return None
            count = data.get("count") if isinstance(data, dict) else None
            if not isinstance(count, int) or not 0 <= count <= len(text.encode()) + 16:
                return None
            counts.append(count)
        return counts

    async def aclose(self) -> None:
        self._calls.close()
        await self._transport.aclose()

    # What the pool and the pipeline watch (WatchedServer, Making)

    @property
    def tokens_in_the_making(self) -> int:
        """Of the answers that are streamed; about one for each of their events."""
        return sum(reply.pieces for reply in self._streams_open)

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
        url = self._address.at_root("/metrics")
        try:
            response, raw = await self._ask("GET", url, None, "probe", GAUGES_S)
        except Failure:
            return None
        gauges = read_gauges(raw) if response.status_code == 200 else None
        self._has_gauges = gauges is not None
        return gauges

    # Which model is served

    async def _check(self, phase: Phase) -> None:
        """Compare what is served with what was asked for, and with what was served before."""
        try:
            data = await self._list(phase)
        except Failure as exc:
            verdict = exc.verdict
            if not verdict.reason.startswith(HEARD):
                raise  # nobody is there, or somebody else
            if not self.model and verdict.reason in ("http_404", "http_405"):
                raise ConfigError(
                    f"{self.name}: has no list of models ({verdict.message}); check the base URL, "
                    f"or name a model with {self.MODEL_FLAG}"
                ) from exc
            if not self.model:
                raise
            log.info("%s: does not list its models (%s)", self.name, exc)
            self._checked = True
            return
        served = read_models(data)
        if not self.model:
            if len(served) != 1:
                raise ConfigError(
                    f"{self.name}: serves {listed(served)}; choose one with {self.MODEL_FLAG}"
                )
            self.model = served[0].id
        found = find_model(served, self.model)
        if found is None:
            if any(model.owner == "vllm" for model in served):
                raise ConfigError(
                    f"{self.name}: does not serve {self.model!r} but {listed(served)}; "
                    f"check {self.MODEL_FLAG}"
                )
            log.info("%s: does not list %r", self.name, self.model)
            self._checked = True
            return
        self.is_vllm = found.owner == "vllm"
        self._continues = found.owner in CONTINUES
        self.context_length = found.context_length or self.context_length
        identity = (self.model, found.root, found.context_length if self.is_vllm else None)
        if self._identity is not None and identity != self._identity:
            raise ConfigError(
                f"{self.name}: came back with another model ({identity}, was {self._identity}); "
                "start a new run, or restore the model and resume"
            )
        self._identity = identity
        self._checked = True

    async def _list(self, phase: Phase) -> Any:
        """The list of models; at the start, with patience for a server that has a fault."""
        for left in reversed(range(START_TRIES if phase == "start" else 1)):
            try:
                return await self._json("GET", self._address.at("/models"), None, phase)
            except Failure as exc:
                final = exc.verdict.kind in ("settings", "fatal", "dead")
                if final or not left or not exc.verdict.reason.startswith(HEARD):
                    raise
            await asyncio.sleep(START_WAIT_S)
        raise AssertionError("the last try returns or raises")

    async def _json(
        self,
        method: str,
        url: httpx.URL,
        body: Any,
        phase: Phase,
        limit_s: float | None = None,
    ) -> Any:
        limit_s = limit_s or self._timeouts.connect_s + self._timeouts.idle_s
        response, raw = await self._ask(method, url, body, phase, limit_s)
        if response.status_code != 200:
            raise Failure(self._classified(response, raw))
        return parsed(raw, response, self.name)

    async def _ask(
        self, method: str, url: httpx.URL, body: Any, phase: Phase, limit_s: float
    ) -> tuple[httpx.Response, bytes]:
        """A small question that costs nothing. Raises Failure."""
        request = self._request(method, url, orjson.dumps(body) if body else b"")
        try:
            async with asyncio.timeout(limit_s):
                response = await self._transport.handle_async_request(request)
                try:
                    return response, await self._whole(response)
                finally:
                    await response.aclose()
        except Exception as exc:  # whatever fails while a server is read is a verdict
            raise self._failure(exc, phase) from exc

    # One attempt

    async def _generate(self, prompts: Sequence[Prompt]) -> list[Completion | BaseException]:
        """One attempt; a refusal that teaches what the host takes is not the end of it."""
        began = asyncio.get_running_loop().time()
        before: dict[str, Any] = {}
        lessons: list[str] = []
        wants_stream = self._streaming.wanted(len(self._calls))
        for _ in range(MOST_LESSONS):
            api, body = self._spoken(prompts, wants_stream)
            answer = await self._answer(body, api, len(prompts), began)
            if isinstance(answer, Reply):
                for lesson in lessons:
                    self.on_lesson(lesson)
                return self._outcomes(answer, prompts, api, body, began)
            verdict, text = answer
            now_api, now_body = self._spoken(prompts, wants_stream)
            if (api, body.keys()) != (now_api, now_body.keys()):
                continue  # another request has learnt it meanwhile
            before = before if lessons else self.dialect.learnt
            learnt = self.dialect.learn(verdict, text, body, api)
            if learnt is None:
                break
            lessons.append(learnt)
        if lessons and verdict.kind == "settings":
            self.dialect.restore(before)  # they did not help: something else is refused
        raise Failure(verdict)

    def _spoken(self, prompts: Sequence[Prompt], wants_stream: bool) -> tuple[Api, dict[str, Any]]:
        """The API and the body by which the host takes ``prompts``."""
        api = self.dialect.api(prompts[0].api)
        streamed = self.dialect.streams(wants_stream)
        return api, self.dialect.spoken(
            request_body(
                prompts,
                model=self.model,
                api=api,
                streamed=streamed,
                ignores_eos=self.is_vllm,
                continues=self._continues,
            )
        )

    def _outcomes(
        self,
        answer: Reply,
        prompts: Sequence[Prompt],
        api: Api,
        body: Mapping[str, Any],
        began: float,
    ) -> list[Completion | BaseException]:
        """What each prompt of an answered call came to."""
        if self._strict_model and answer.model and answer.model != self.model:
            error = ConfigError(f"{self.name}: answered as {answer.model!r}, not as {self.model!r}")
            raise Failure(Verdict(kind="settings", reason="model", message=str(error), error=error))
        self._streaming.answered()
        answer.model = self._named(answer.model)
        latency_s = asyncio.get_running_loop().time() - began
        outcomes = answer.completions(prompts, latency_s)
        if any(isinstance(outcome, Completion) for outcome in outcomes):
            self.dialect.answered(body, api)
        if CONSTRAINT in body:
            for prompt, outcome in zip(prompts, outcomes, strict=True):
                self.witness.saw(prompt.sampling.extra, outcome)
        if api == prompts[0].api:
            return outcomes
        return [replace(o, api=api) if isinstance(o, Completion) else o for o in outcomes]

    async def _answer(
        self, body: Mapping[str, Any], api: Api, count: int, began: float
    ) -> Reply | tuple[Verdict, str]:
        """Send one request: the answer, or the verdict on a refusal and the host's words.

        Raises Failure for all else; whatever goes wrong while a server's bytes are read is one.
        """
        request = self._request("POST", self._urls[api], orjson.dumps(body))
        timeouts = self._timeouts
        first_s = timeouts.first_token_s if body.get("stream") else timeouts.total_s
        call = asyncio.timeout(None)
        streamed: list[Reply] = []
        try:
            async with call:
                self._calls.set(call, began + min(first_s, timeouts.total_s))
                response = await self._transport.handle_async_request(request)
                try:
                    self.heard_at_s = asyncio.get_running_loop().time()
                    self._note_quota(response.headers)
                    if response.status_code != 200:
                        raw = await self._whole(response)
                        return self._classified(response, raw), read_error(raw).text
                    answer = await self._read(response, count, streamed, began, call)
                finally:
                    await response.aclose()
        except Exception as exc:  # whatever fails while a server is read is a verdict
            if streamed and streamed[0].finished:
                return streamed[0]  # what went wrong came after it
            if isinstance(exc, Failure):
                raise
            if isinstance(exc, TimeoutError):
                self._streaming.timed_out()
            raise self._failure(exc, "generate") from exc
        finally:
            self._calls.drop(call)
        if answer.error is None:
            return answer
        verdict = classify(status=200, headers=response.headers, body=answer.error, where=self.name)
        return verdict, read_error(answer.error).text

    def _request(self, method: str, url: httpx.URL, body: bytes) -> httpx.Request:
        request = httpx.Request(  # a stream, since httpx takes ten times as long over ``content``
            method,
            url,
            headers=self._headers,
            stream=httpx.ByteStream(body),
            extensions={"timeout": self._wire_timeout},
        )
        request.headers["Content-Length"] = str(len(body))
        for name, reveal in self._secret_headers.items():
            request.headers[name] = reveal()
        return request

    # Reading what comes

    async def _whole(self, response: httpx.Response) -> bytes:
        unpack = self._unpacker(response)
        return b"".join([unpack(piece) async for piece in _pieces(response)])

    def _unpacker(self, response: httpx.Response) -> Unpacker:
        encoding = response.headers.get("content-encoding", "identity")
        return Unpacker(encoding, self._max_response_bytes)

    async def _read(
        self,
        response: httpx.Response,
        count: int,
        streamed: list[Reply],
        began: float,
        call: asyncio.Timeout,
    ) -> Reply:
        """The answer, whole or streamed as the server chose; a stream's is in ``streamed`` while it
        comes.
        """
        if "event-stream" in response.headers.get("content-type", ""):
            streamed.append(Reply(count))
            return await self._read_stream(response, streamed[0], began, call)
        raw = await self._whole(response)
        if raw[:64].lstrip().startswith(b"data:"):  # a gateway has lost the content type
            answer = Reply(count)
            events = Events(answer, self._max_response_bytes)
            events.feed(raw)
            events.end()
            return answer
        return Reply.of_whole(parsed(raw, response, self.name, count), count)

    async def _read_stream(
        self, response: httpx.Response, answer: Reply, began: float, call: asyncio.Timeout
    ) -> Reply:
        """A stream's answer. Its body's end is its end: ``[DONE]`` is asked for only where the
        choices do not say by themselves that they are finished.
        """
        events = Events(answer, MAX_EVENT_BYTES)
        unpack = self._unpacker(response)
        loop = asyncio.get_running_loop()
        timeouts = self._timeouts
        end_s = began + timeouts.total_s
        self._streams_open.add(answer)
        try:
            pieces = aiter(_pieces(response))
            async for piece in pieces:
                events.feed(unpack(piece))
                self.heard_at_s = now_s = loop.time()
                if answer.ttft_s is None and answer.started:
                    answer.ttft_s = now_s - began
                    self.hung_after_s = SILENCE_S
                if answer.done:
                    await _let_end(pieces)
                    break
                silence_s = timeouts.first_token_s if answer.ttft_s is None else timeouts.idle_s
                if answer.finished:  # counts may follow, and that is all
                    silence_s = min(silence_s, FINISHED_S)
                self._calls.set(call, min(now_s + silence_s, end_s))
        finally:
            self._streams_open.discard(answer)
        events.end()
        if answer.error is None and not answer.done and None in answer.finish:
            message = "the stream has no end"
            raise Failure(Verdict(kind="ambiguous", reason="cut_body", message=message))
        return answer

    def _note_quota(self, headers: httpx.Headers) -> None:
        """Keep rate limit headers: OpenAI's ``x-ratelimit-limit-requests``, Anthropic's
        ``anthropic-ratelimit-requests-limit``.
        """
        for name, value in headers.raw:
            lower = name.lower()
            if lower.startswith(b"x-ratelimit-"):
                self.quota[lower[12:].decode("latin-1")] = value.decode("latin-1")
            elif lower.startswith(b"anthropic-ratelimit-"):
                what, _, kind = lower[20:].decode("latin-1").rpartition("-")
                self.quota[f"{kind}-{what}"] = value.decode("latin-1")

    def _named(self, model: str) -> str:
        """A model's name from a reply; they are counted by name, so there must not be many."""
        if model not in self._names:
            if len(self._names) >= MOST_NAMES:
                return "(another)"
            self._names.add(model)
        return model

    # What goes wrong

    def _classified(self, response: httpx.Response, body: bytes) -> Verdict:
        return classify(
            status=response.status_code, headers=response.headers, body=body, where=self.name
        )

    def _failure(self, exc: Exception, phase: Phase) -> Failure:
        if isinstance(exc, Failure):
            return exc
        return Failure(classify(exception=exc, phase=phase, where=self.name))


async def _let_end(pieces: AsyncIterator[bytes]) -> None:
    """Wait a moment for the end of a stream that said ``[DONE]``, so that its connection can be
    kept. Nothing that comes now is of use.
    """
    with suppress(TimeoutError, httpx.TransportError):
        async with asyncio.timeout(DONE_S):
            async for _ in pieces:
                pass


def _pieces(response: httpx.Response) -> httpx.AsyncByteStream:
    """The body as it comes."""
    assert isinstance(response.stream, httpx.AsyncByteStream)
    return response.stream
