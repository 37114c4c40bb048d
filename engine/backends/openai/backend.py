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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import httpx
import orjson

from engine.backends.base import Failure, Verdict
from engine.backends.constraint import CONSTRAINT, Witness
from engine.backends.openai.access import Access
from engine.backends.openai.address import Address, read_address
from engine.backends.openai.body import CONTINUES, request_body
from engine.backends.openai.dialect import Dialect
from engine.backends.openai.error_body import read_error
from engine.backends.openai.exchange import Exchange
from engine.backends.openai.gauges import read_gauges
from engine.backends.openai.listening import Listening, Timeouts
from engine.backends.openai.reply import Events, Reply, parsed
from engine.backends.openai.served import find_model, listed, read_models
from engine.backends.openai.streaming import Streaming
from engine.backends.openai.verdicts import Phase, classify
from engine.backends.openai.wire import FastTransport
from engine.errors import ConfigError, UnavailableError
from engine.records import Api, Completion, Prompt

__all__ = ["HttpBackend"]

GAUGES_S = 2.0
"""How long an answer to ``/metrics`` may take; the next one is asked for soon."""
MAX_RESPONSE_BYTES = 32 * 2**20
"""Of one answer, unpacked. It bounds memory against an answer, or a gzip bomb, without end; real
ones are far shorter."""
START_TRIES, START_WAIT_S = 3, 0.5
"""How often, and how long apart, a server that answers the first question with a fault is asked."""
HEARD = ("http_", "html", "cut_body", "bad_json", "unreadable", "quota", "content_filter")
"""How reasons begin of which a server's answer is the cause, and not its absence."""
MOST_LESSONS = 12
"""Fields that a host may refuse one after the other within one attempt."""
MOST_NAMES = 16
"""Model names of replies that are kept apart; more come from a host that makes them up."""
log = logging.getLogger(__name__)


class HttpBackend:
    """One endpoint. See ``engine.backends.base.Backend`` for the methods' contract.

    Args:
        address: where it is; a URL with or without ``/v1`` will do.
        model: as the server names it; None takes the one model that the server serves.
        access: by what it lets one in; over plain http only to this machine, unless it says so.
        dialect: what the host takes of a request's body; learns.
        transport: what carries requests; by default ``engine.backends.openai.wire.FastTransport``.
        stream: True, False, or ``"auto"`` (see ``streaming``).
        strict_model: stop when a reply names another model than was asked for.
        max_in_flight: a limit known beforehand; None lets the limiter find it.
        max_response_bytes: of one answer, unpacked.
    """

    MODEL_FLAG: ClassVar[str] = "--model"
    """How the person names the model."""

    def __init__(
        self,
        address: Address | str,
        model: str | None = None,
        *,
        access: Access | None = None,
        dialect: Dialect | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        timeouts: Timeouts | None = None,
        stream: bool | Literal["auto"] = "auto",
        strict_model: bool = False,
        max_in_flight: int | None = None,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
    ) -> None:
        if isinstance(address, str):
            address = read_address(address)
        access, timeouts = access or Access(), timeouts or Timeouts()
        access.check(address.url)
        self._masking = access.masking
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
        self._said_unknown = False
        self._untold: list[str] = []
        """Lessons of attempts that then failed for another cause, such as a busy host: kept by the
        dialect, and told with the next answer."""
        self.witness = Witness(lambda what: self.on_lesson(what))
        self.quota: dict[str, str] = {}
        """The latest rate limit headers: ``limit-requests`` and the like."""
        self._has_gauges = True
        self._address = address
        self._urls: dict[Api, httpx.URL] = {
            "completions": address.at("/completions"),
            "chat": address.at("/chat/completions"),
        }
        self._exchange = Exchange(
            address,
            access,
            transport or FastTransport(),
            connect_s=timeouts.connect_s,
            max_response_bytes=max_response_bytes,
        )
        self._timeouts = timeouts
        self._listening = Listening(timeouts)
        self._streaming = Streaming(stream)
        self._strict_model = strict_model
        self._identity: tuple[str, str, int | None] | None = None
        self._names: set[str] = set()
        self._checked = False
        self._checking = asyncio.Lock()

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
        self._listening.calls.close()
        await self._exchange.aclose()

    # What the pool and the pipeline watch (WatchedServer, Making)

    @property
    def tokens_in_the_making(self) -> int:
        """Of the answers that are streamed; about one for each of their events."""
        return self._listening.tokens

    @property
    def heard_at_s(self) -> float:
        """Loop time when the host last sent anything for a generation."""
        return self._listening.heard_at_s

    @property
    def hung_after_s(self) -> float:
        """Silence of everything in flight that means that its engine hangs."""
        return self._listening.hung_after_s

    @property
    def identity(self) -> tuple[str, str, int | None] | None:
        """(model id, root, context length) as served; replicas must agree on the first two."""
        return self._identity

    def hang_up(self) -> None:
        """Let every call in flight time out now, which closes its connection."""
        self._listening.calls.expire()
        self._checked = False

    async def load(self) -> tuple[float, float, float] | None:
        """(running, waiting, preemptions), summed over the server's engines."""
        if not self._has_gauges:
            return None
        url = self._address.at_root("/metrics")
        try:
            response, raw = await self._exchange.ask("GET", url, None, "probe", GAUGES_S)
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
        return await self._exchange.json(method, url, body, phase, limit_s)

    # One attempt

    async def _generate(self, prompts: Sequence[Prompt]) -> list[Completion | BaseException]:
        """One attempt; a refusal that teaches what the host takes is not the end of it."""
        began = asyncio.get_running_loop().time()
        before: dict[str, Any] = {}
        lessons: list[str] = []
        wants_stream = self._streaming.wanted(len(self._listening.calls))
        for _ in range(MOST_LESSONS):
            api, body = self._spoken(prompts, wants_stream)
            answer = await self._answer(body, api, prompts, began)
            if isinstance(answer, Reply):
                told, self._untold = [*self._untold, *lessons], []
                for lesson in told:
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
        else:
            self._untold += lessons
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
        answer.model = self._named(answer.model or self.model)
        if answer.unknown and not self._said_unknown:
            self._said_unknown = True
            self.on_lesson(
                f"answers end with the finish_reason {answer.unknown!r}, which is not known here:"
                " such answers count as cut off; see what the host's documentation says of it"
            )
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
        self, body: Mapping[str, Any], api: Api, prompts: Sequence[Prompt], began: float
    ) -> Reply | tuple[Verdict, str]:
        """Send one request: the answer, or the verdict on a refusal and the host's words.

        Raises Failure for all else; whatever goes wrong while a server's bytes are read is one.
        """
        exchange, calls, timeouts = self._exchange, self._listening.calls, self._timeouts
        first_s = timeouts.first_token_s if body.get("stream") else timeouts.total_s
        content = orjson.dumps(body)  # what fails here is a bug, and no verdict on the server
        call = asyncio.timeout(None)
        streamed: list[Reply] = []
        try:
            async with call:
                calls.set(call, began + min(first_s, timeouts.total_s))
                response = await exchange.send("POST", self._urls[api], content)
                try:
                    self._listening.heard_at_s = asyncio.get_running_loop().time()
                    self._note_quota(response.headers)
                    if response.status_code != 200:
                        raw = await exchange.whole(response)
                        return exchange.classified(response, raw), read_error(raw).text
                    answer = await self._read(response, len(prompts), streamed, began, call)
                finally:
                    await response.aclose()
        except Exception as exc:  # whatever fails while a server is read is a verdict
            if streamed and streamed[0].finished:
                return streamed[0]  # what went wrong came after it
            if isinstance(exc, TimeoutError):
                self._streaming.timed_out()
            verdict = exchange.failure(exc, "generate").verdict
            if verdict.reason == "timeout":
                seconds = asyncio.get_running_loop().time() - began
                verdict = replace(verdict, message=_waited(streamed, seconds, timeouts))
            raise Failure(_booked(verdict, streamed[0] if streamed else None, prompts)) from exc
        finally:
            calls.drop(call)
        if answer.error is None:
            return answer
        verdict = classify(status=200, headers=response.headers, body=answer.error, where=self.name)
        return _booked(verdict, answer, prompts), read_error(answer.error).text

    # Reading what comes

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
            unpack = self._exchange.unpacker(response)
            return await self._listening.read(response, streamed[0], unpack, began, call)
        raw = await self._exchange.whole(response)
        if raw[:64].lstrip().startswith(b"data:"):  # a gateway has lost the content type
            answer = Reply(count)
            events = Events(answer, self._exchange.max_response_bytes)
            events.feed(raw)
            events.end()
            return answer
        return Reply.of_whole(parsed(raw, response, self.name, count), count)

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


def _waited(streamed: Sequence[Reply], seconds: float, timeouts: Timeouts) -> str:
    """What was there of an answer when its time was over, ``seconds`` after it was asked for, and
    the setting that says so.
    """
    setting = "--attempt-s" if seconds >= timeouts.total_s else None
    if not streamed or streamed[0].ttft_s is None:
        what = "no answer"
        if setting is None and seconds >= timeouts.first_token_s:
            setting = "--first-token-s"
    else:
        what = "the answer broke off: silent or without an end"
        setting = setting or "--idle-s"
    return f"{what} after {seconds:.0f} s{f' ({setting})' if setting else ''}"


def _booked(verdict: Verdict, answer: Reply | None, prompts: Sequence[Prompt]) -> Verdict:
    """The verdict on a call that failed, with what each of its prompts has taken."""
    taken = answer.taken(prompts) if answer is not None and verdict.billed else [None]
    known = [tokens for tokens in taken if tokens is not None]
    if len(known) < len(taken):
        return verdict
    return replace(verdict, taken=-(-sum(known) // len(known)))
