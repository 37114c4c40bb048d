"""The OpenAI-shaped backend against the toxic server: what is an answer, and what is not."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson
import pytest

from benchmarks.server import FAULTS, Behaviour, Server
from engine.backends.base import Failure, Verdict
from engine.backends.openai.access import Access
from engine.backends.openai.backend import HttpBackend
from engine.backends.openai.listening import Timeouts
from engine.backends.scripted import alpaca_text
from engine.errors import AuthError, ConfigError, UnavailableError
from engine.records import Completion
from engine.secrets import Secret
from tests.engine.wire import http as http_bytes
from tests.engine.wire import prompt, raw_server

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

QUICK = Timeouts(connect_s=1.0, first_token_s=0.3, idle_s=0.2, total_s=1.0)


@asynccontextmanager
async def talking(
    behaviour: Behaviour | None = None, **options: Any
) -> AsyncIterator[tuple[Server, HttpBackend]]:
    async with Server(behaviour) as server:
        backend = HttpBackend(server.url, **options)
        await backend.start()
        yield server, backend
        await backend.aclose()


async def verdict_of(backend: HttpBackend, index: int = 0) -> Verdict:
    try:
        (outcome,) = await backend.complete([prompt(index)])
    except Failure as exc:
        return exc.verdict
    assert isinstance(outcome, Failure)
    return outcome.verdict


def canned(*events: Any, whole: Any = None) -> httpx.MockTransport:
    """A transport that serves ``/models``, and one stream of ``events`` or one ``whole`` answer."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        if whole is not None:
            return httpx.Response(200, json=whole)
        lines = [e if isinstance(e, bytes) else b"data: " + orjson.dumps(e) for e in events]
        return httpx.Response(
            200,
            headers={"content-type": "text/event-stream"},
            content=b"\n\n".join(lines) + b"\n\n",
        )

    return httpx.MockTransport(answer)


async def ask(transport: httpx.AsyncBaseTransport, **options: Any) -> Completion | BaseException:
    backend = HttpBackend("http://localhost", transport=transport, **options)
    await backend.start()
    try:
        return (await backend.complete([prompt()]))[0]
    except Failure as exc:
        return exc


def text(words: str, finish: str | None = None) -> dict[str, Any]:
    return {"model": "m", "choices": [{"index": 0, "text": words, "finish_reason": finish}]}


DONE = b"data: [DONE]"
COUNTED = {"prompt_tokens": 20, "completion_tokens": 50, "total_tokens": 70}
NOTHING = {"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9}


@pytest.mark.parametrize("stream", [True, False])
async def test_both_modes_give_the_same_answer(stream: bool) -> None:
    """Text, finish reason and usage agree; only a stream knows the time to the first token."""
    async with talking(stream=stream) as (_, backend):
        asked = prompt(3)
        (answer,) = await backend.complete([asked])
        assert isinstance(answer, Completion)
        assert answer.text == alpaca_text(asked.text, seed=3)
        assert (answer.finish_reason, answer.model) == ("stop", "toy")
        assert answer.usage.completion_tokens == len(answer.text) // 4
        assert not answer.usage.estimated
        assert (answer.ttft_s is not None) == stream


async def test_chat_is_one_user_message() -> None:
    """The chat API gets the prompt as the user's; a second prompt in the call is refused."""
    async with talking(stream=False) as (_, backend):
        (answer,) = await backend.complete([prompt(1, api="chat")])
        assert isinstance(answer, Completion)
        assert answer.text
        with pytest.raises(Failure, match="request-batch-size"):
            await backend.complete([prompt(1, api="chat"), prompt(2, api="chat")])


@pytest.mark.parametrize("stream", [True, False])
async def test_several_prompts_in_one_call(stream: bool) -> None:
    """Alpaca's batches: answers in the prompts' order, the billed tokens shared out in full."""
    async with talking(stream=stream) as (server, backend):
        prompts = [prompt(i, text=f"{i} " * (i + 1) + "4. Instruction:") for i in range(5)]
        answers = await backend.complete(prompts)
        assert server.paths["/v1/completions"] == 1
        for asked, answer in zip(prompts, answers, strict=True):
            assert isinstance(answer, Completion)
            assert answer.text == alpaca_text(asked.text, seed=0)
        usages = [a.usage for a in answers if isinstance(a, Completion)]
        assert sum(u.prompt_tokens for u in usages) == server.ledger.prompt_tokens
        assert sum(u.completion_tokens for u in usages) == server.ledger.completion_tokens


async def test_fault_046_a_missing_choice_is_that_prompts_alone() -> None:
    """Fewer choices than prompts: those that are there stand, the rest fail one by one."""
    whole = {"model": "m", "choices": [{"index": 1, "text": "second", "finish_reason": "stop"}]}
    backend = HttpBackend("http://localhost", transport=canned(whole=whole), stream=False)
    await backend.start()
    first, second = await backend.complete([prompt(0), prompt(1)])
    assert isinstance(first, Failure)
    assert isinstance(second, Completion)
    assert second.text == "second"


async def test_start_learns_model_and_context() -> None:
    """/v1/models gives the only model's name, vLLM's max_model_len, and that it is vLLM."""
    async with talking(Behaviour(model="llama", root="llama", max_model_len=2048)) as (_, backend):
        assert (backend.model, backend.context_length) == ("llama", 2048)
        assert backend.is_vllm
        assert await backend.count_tokens(["x" * 40, "y" * 80]) == [10, 20]


async def test_fault_029_a_model_that_is_not_served() -> None:
    """One free question, and the answer lists what is served."""
    async with Server(Behaviour(model="llama")) as server:
        with pytest.raises(ConfigError, match="llama"):
            await HttpBackend(server.url, "lama").start()
        assert server.ledger.asked.total() == 0


async def test_fault_026_a_refused_key_is_masked() -> None:
    """401: permission denied, and no more of the key than its last characters anywhere."""
    async with Server(Behaviour(api_key="sk-right")) as server:
        backend = HttpBackend(server.url, access=Access(key=Secret("sk-CANARY0123456789wxyz")))
        with pytest.raises(AuthError) as caught:
            await backend.start()
        assert "CANARY" not in str(caught.value)
        right = HttpBackend(server.url, access=Access(key=Secret("sk-right")))
        await right.start()


async def test_fault_027_a_key_revoked_in_the_middle() -> None:
    """The same verdict later, at the first request that is refused."""
    async with talking(access=Access(key=Secret("sk-old"))) as (server, backend):
        await backend.complete([prompt()])
        server.behaviour = Behaviour(api_key="sk-new")
        verdict = await verdict_of(backend)
        assert verdict.kind == "settings"
        assert isinstance(verdict.error, AuthError)


async def test_fault_002_nobody_there_at_the_start() -> None:
    """Unavailable, with the address and what to look at."""
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1.*is the server up"):
        await HttpBackend("http://127.0.0.1:1").start()


async def test_fault_030_and_fault_041_not_an_api() -> None:
    """A web page where the API should be is named as such."""
    page = httpx.MockTransport(
        lambda request: httpx.Response(200, html="<html><body>Welcome</body></html>")
    )
    with pytest.raises(ConfigError, match="HTML"):
        await HttpBackend("http://localhost", transport=page).start()
    missing = httpx.MockTransport(lambda request: httpx.Response(404, text="nothing here"))
    with pytest.raises(ConfigError, match="/v1"):
        await HttpBackend("http://localhost/api", transport=missing).start()


async def test_fault_016_redirects_are_not_followed() -> None:
    """Not a byte of a prompt goes to where a redirect points."""
    async with talking() as (elsewhere, _):

        async def serve(request: bytes, writer: asyncio.StreamWriter) -> None:
            target = f"location: {elsewhere.url}/v1/completions\r\n"
            writer.write(http_bytes(b"", status=307, headers=target))

        async with raw_server(serve) as url:
            with pytest.raises(ConfigError, match="redirects to"):
                await HttpBackend(url, "toy").start()
        assert elsewhere.ledger.asked.total() == 0


FAULT_NUMBERS = {
    "reset": "004", "reset_midway": "005", "cut": "006", "short_length": "007", "hang": "008",
    "stall": "009", "header_bomb": "019", "429": "021", "429_bare": "023", "408": "034",
    "500": "037", "502": "038", "503": "038", "529": "038", "error_in_200": "040",
    "truncated_json": "042", "nan": "042", "bad_utf8": "042", "done_only": "006",
    "no_finish": "006", "abort": "048", "error_event": "049", "garbage": "042",
}  # fmt: skip
SILENT = ("hang", "stall")
UNPAID = {"429": "throttled", "429_bare": "throttled"} | dict.fromkeys(
    ("502", "503", "529"), "unavailable"
)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(
    "fault", [pytest.param(f, id=f"fault_{FAULT_NUMBERS[f]} {f}") for f in FAULTS]
)
async def test_no_fault_passes_for_an_answer(fault: str, stream: bool) -> None:
    """Every way of going wrong ends in a failure that is tried again, and holds nothing open.

    A whole answer without a finish reason is no fault: JSON that parses has not been cut.
    """
    if not stream and fault in ("no_finish", "done_only"):
        whole = {**text("words"), "usage": {"prompt_tokens": 9, "completion_tokens": 64}}
        outcome = await ask(canned(whole=whole), stream=False)
        assert isinstance(outcome, Completion)
        assert (outcome.text, outcome.finish_reason) == ("words", "length")
        return
    behaviour = Behaviour(fault_rate=1.0, faults=(fault,))
    async with talking(behaviour, stream=stream, timeouts=QUICK) as (server, backend):
        verdict = await verdict_of(backend)
        assert verdict.kind == UNPAID.get(fault, "ambiguous")
        assert " " in verdict.message, "words, and no bare name of a class"
        assert (fault in SILENT) == verdict.message.startswith("no answer after")
        await asyncio.sleep(0.01)
        assert server.ledger.live == 0
        server.behaviour = Behaviour()
        (answer,) = await backend.complete([prompt()])
        assert isinstance(answer, Completion)


STREAMS = [
    ("fault_049 error wins over DONE", [text("a", "stop"), {"error": {"message": "died"}}, DONE],
     "error_in_answer"),
    ("fault_006 DONE without finish_reason", [text("a"), DONE], "cut_body"),
    ("fault_043 choices [] in a stream", [{"choices": []}, DONE], "no_choices"),
    ("fault_042 half an event", [text("a"), b'data: {"choices": [{"ind'], "bad_stream"),
    ("fault_042 two texts in one event",
     [b'data: {"choices":[{"index":0,"text":"a","text":"b","finish_reason":"stop"}]}', DONE],
     "bad_stream"),
    ("fault_042 not an object", [b"data: [1]", DONE], "bad_json"),
    ("fault_042 a choice out of range",
     [{"choices": [{"index": 7, "text": "x", "finish_reason": "stop"}]}, DONE], "bad_json"),
    ("fault_048 abort", [text("a", "abort"), DONE], "finish_abort"),
    ("fault_048 error", [text("a", "error"), DONE], "finish_error"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("events", "reason"), [pytest.param(*row[1:], id=row[0]) for row in STREAMS]
)
async def test_streams_that_are_not_answers(events: list[Any], reason: str) -> None:
    """What makes a stream whole is a finish reason for each choice, and no error."""
    outcome = await ask(canned(*events), stream=True)
    assert isinstance(outcome, Failure)
    assert (outcome.verdict.kind, outcome.verdict.reason) == ("ambiguous", reason)


TAKEN = [
    ("by what came", [text("a" * 400)], 7 + 100),
    ("thoughts too", [{"choices": [{"index": 0, "delta": {"reasoning": "a" * 40}}]}], 7 + 10),
    ("or the last count", [text("a" * 40), {"usage": COUNTED}], 70),
    ("which is not that of all", [{"usage": COUNTED}, text("a" * 4000)], 7 + 1000),
    ("an error after it", [text("a" * 400), {"error": {"message": "died"}}, DONE], 7 + 100),
    ("a text of no use", [text("a" * 400, "abort"), DONE], 7 + 100),
    ("no text, and counted", [text("", "stop"), {"usage": NOTHING}, DONE], 9),
    ("nothing", [], None),
    ("nothing but a role", [text("")], None),
    ("nothing but a count of the prompt", [{"usage": NOTHING}], None),
    ("an error at once", [{"error": {"message": "died"}}, DONE], None),
]


@pytest.mark.parametrize(("events", "taken"), [pytest.param(*row[1:], id=row[0]) for row in TAKEN])
async def test_a_cut_stream_is_booked_by_what_came(events: list[Any], taken: int | None) -> None:
    """Where something came; else the server may have written all that it was allowed to."""
    outcome = await ask(canned(*events), stream=True)
    assert isinstance(outcome, Failure)
    assert outcome.verdict.billed
    assert outcome.verdict.taken == taken


async def test_each_prompt_of_a_cut_call_has_its_share() -> None:
    """What came is known for all of them or for none."""
    both = [{"choices": [{"index": i, "text": "a" * 400 * (i + 1)}]} for i in range(2)]
    for events, taken in ((both, 7 + 150), (both[:1], None)):
        backend = HttpBackend("http://localhost", transport=canned(*events), stream=True)
        await backend.start()
        with pytest.raises(Failure) as failed:
            await backend.complete([prompt(0), prompt(1)])
        assert failed.value.verdict.taken == taken


AFTERWARDS = {
    "silence": b"",
    "a cut": None,
    "broken JSON": b'data: {"usage": {"prompt_tokens": NaN}}\n\n',
    "a wrong choice": b'data: {"choices": [{"index": 7, "text": "x"}]}\n\n',
}


@pytest.mark.parametrize("after", AFTERWARDS.values(), ids=AFTERWARDS)
async def test_what_goes_wrong_after_all_choices_are_finished_costs_no_answer(
    after: bytes | None,
) -> None:
    """It is whole by its own word, and paid."""

    async def serve(request: bytes, writer: asyncio.StreamWriter) -> None:
        if b"/models" in request:
            writer.write(http_bytes(b'{"data":[{"id":"m"}]}'))
            return
        body = b"data: " + orjson.dumps(text("whole", "stop")) + b"\n\n" + (after or b"")
        head = "content-type: text/event-stream\r\n"
        writer.write(http_bytes(body, headers=head, length=len(body) + 9))
        await writer.drain()
        if after is None:
            writer.close()
        else:
            await asyncio.sleep(5)

    async with raw_server(serve) as url:
        backend = HttpBackend(url, stream=True, timeouts=QUICK)
        await backend.start()
        (answer,) = await backend.complete([prompt()])
        assert isinstance(answer, Completion)
        assert (answer.text, answer.finish_reason) == ("whole", "stop")
        await backend.aclose()


async def test_fault_009_a_stream_that_falls_silent_is_told_as_one() -> None:
    async def serve(request: bytes, writer: asyncio.StreamWriter) -> None:
        if b"/models" in request:
            writer.write(http_bytes(b'{"data":[{"id":"m"}]}'))
            return
        body = b"data: " + orjson.dumps(text("half", None)) + b"\n\n"
        head = "content-type: text/event-stream\r\n"
        writer.write(http_bytes(body, headers=head, length=len(body) + 9))
        await writer.drain()
        await asyncio.sleep(5)

    async with raw_server(serve) as url:
        backend = HttpBackend(url, stream=True, timeouts=QUICK)
        await backend.start()
        verdict = await verdict_of(backend)
        assert verdict.message.startswith("the answer broke off: silent or without an end after ")
        await backend.aclose()


async def test_streams_in_awkward_pieces() -> None:
    """Comments, CRLF, no space after the colon, UTF-8 cut anywhere: the text comes out the same."""
    lines = (
        b": ping\r\n\r\ndata:"
        + orjson.dumps(text("häl"))
        + b"\r\n\r\nevent: x\r\ndata: "
        + orjson.dumps(text("lo €", "stop"))
        + b"\r\n\r\ndata: [DONE]\r\n\r\n"
    )

    async def serve(request: bytes, writer: asyncio.StreamWriter) -> None:
        if b"/models" in request:
            writer.write(http_bytes(b'{"data":[{"id":"m"}]}'))
            return
        writer.write(
            http_bytes(b"", headers="content-type: text/event-stream\r\n", length=len(lines))
        )
        for byte in lines:
            writer.write(bytes([byte]))
            await writer.drain()

    async with raw_server(serve) as url:
        backend = HttpBackend(url, stream=True)
        await backend.start()
        (answer,) = await backend.complete([prompt()])
        assert isinstance(answer, Completion)
        assert answer.text == "hällo €"
        assert answer.usage.estimated
        await backend.aclose()


def message(content: Any, finish: str = "stop", **more: Any) -> dict[str, Any]:
    said = {"role": "assistant", "content": content, **more}
    return {"model": "m", "choices": [{"index": 0, "message": said, "finish_reason": finish}]}


NO_TOKENS = {"prompt_tokens": 9, "completion_tokens": 0}
OF_NO_USE = [
    ("fault_043 choices []", {"model": "m", "choices": []}, "ambiguous", "no_choices"),
    ("fault_043 nothing, of no tokens", {**message(""), "usage": NO_TOKENS}, "ambiguous",
     "empty_answer"),
    ("fault_042 nonsense", {"choices": "?"}, "ambiguous", "no_choices"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("whole", "kind", "reason"), [pytest.param(*row[1:], id=row[0]) for row in OF_NO_USE]
)
async def test_answers_without_text(whole: Any, kind: str, reason: str) -> None:
    """No choice, or no token of it: a fault of the server's, to be asked again like a cut body."""
    outcome = await ask(canned(whole=whole), stream=False)
    assert isinstance(outcome, Failure)
    assert (outcome.verdict.kind, outcome.verdict.reason) == (kind, reason)


async def test_an_answer_may_speak_of_its_own_keys() -> None:
    """Keys quoted in a text, and those of two choices, do not come twice."""
    words = 'Say {"choices": [], "text": "choices"}.'
    outcome = await ask(canned(whole=text(words, "stop")), stream=False)
    assert isinstance(outcome, Completion)
    assert outcome.text == words
    async with talking(stream=False) as (_, backend):
        answers = await backend.complete([prompt(1), prompt(2)])
        assert all(isinstance(answer, Completion) for answer in answers)


@pytest.mark.parametrize(
    ("whole", "finish"),
    [
        pytest.param(message("x", "content_filter"), "content_filter", id="fault_033"),
        pytest.param(message(None, refusal="I will not"), "refusal", id="fault_043 refusal"),
        pytest.param(message(None, "tool_calls"), "tool_calls", id="fault_043 tool_calls"),
        pytest.param(message("x", "length"), "length", id="fault_047"),
        pytest.param(message("x", "repetition"), "repetition", id="fault_048 repetition"),
        pytest.param(message("x", "novelty"), "unknown", id="fault_048 unknown"),
    ],
)
async def test_answers_that_say_no(whole: Any, finish: str) -> None:
    """A no is an answer: it is kept with its finish reason, for the filters to refuse."""
    outcome = await ask(canned(whole=whole), stream=False)
    assert isinstance(outcome, Completion)
    assert outcome.finish_reason == finish


@pytest.mark.parametrize(
    "usage",
    [None, {}, {"prompt_tokens": -5, "completion_tokens": 3}, {"prompt_tokens": "7"}, [1]],
)
async def test_fault_044_usage_missing_or_absurd(usage: Any) -> None:
    """Estimated and flagged; never negative."""
    outcome = await ask(canned(whole={**message("some words"), "usage": usage}), stream=False)
    assert isinstance(outcome, Completion)
    assert outcome.usage.estimated
    assert outcome.usage.prompt_tokens > 0
    assert outcome.usage.completion_tokens > 0


async def test_fault_045_another_model_answers() -> None:
    """Recorded; with strict_model the run stops."""
    whole = {**message("x"), "model": "other"}
    outcome = await ask(canned(whole=whole), stream=False)
    assert isinstance(outcome, Completion)
    assert outcome.model == "other"
    strict = await ask(canned(whole=whole), stream=False, strict_model=True)
    assert isinstance(strict, Failure)
    assert isinstance(strict.verdict.error, ConfigError)


async def test_fault_010_a_drip_ends_with_the_total_time() -> None:
    """A byte now and then keeps no request alive for ever."""

    async def serve(request: bytes, writer: asyncio.StreamWriter) -> None:
        if b"/models" in request:
            writer.write(http_bytes(b'{"data":[{"id":"m"}]}'))
            return
        event = b"data: " + orjson.dumps(text("drip")) + b"\n\n"
        writer.write(http_bytes(b"", headers="content-type: text/event-stream\r\n", length=10**6))
        while not writer.is_closing():
            writer.write(event)
            await asyncio.sleep(0.05)

    async with raw_server(serve) as url:
        backend = HttpBackend(url, stream=True, timeouts=Timeouts(total_s=0.4, idle_s=0.2))
        await backend.start()
        began = asyncio.get_running_loop().time()
        assert (await verdict_of(backend)).reason == "timeout"
        assert asyncio.get_running_loop().time() - began < 2
        await backend.aclose()


async def test_fault_020_answers_without_bounds_are_cut_off() -> None:
    """A zip bomb and an endless body end at the limit, for that request alone."""
    bomb = gzip.compress(b" " * 50_000_000)

    async def serve(request: bytes, writer: asyncio.StreamWriter) -> None:
        if b"/models" in request:
            writer.write(http_bytes(b'{"data":[{"id":"m"}]}'))
        else:
            writer.write(http_bytes(bomb, headers="content-encoding: gzip\r\n"))

    async with raw_server(serve) as url:
        backend = HttpBackend(url, stream=False, max_response_bytes=100_000)
        await backend.start()
        verdict = await verdict_of(backend)
        assert (verdict.kind, verdict.reason) == ("dead", "too_large")
        await backend.aclose()


async def test_packed_answers_are_unpacked() -> None:
    """Some proxies pack what nobody asked to be packed."""
    packed = gzip.compress(json.dumps(message("words")).encode())

    async def serve(request: bytes, writer: asyncio.StreamWriter) -> None:
        if b"/models" in request:
            writer.write(http_bytes(b'{"data":[{"id":"m"}]}'))
        else:
            writer.write(http_bytes(packed, headers="content-encoding: gzip\r\n"))

    async with raw_server(serve) as url:
        backend = HttpBackend(url, stream=False)
        await backend.start()
        (answer,) = await backend.complete([prompt()])
        assert isinstance(answer, Completion)
        assert answer.text == "words"
        await backend.aclose()


async def test_fault_032_a_parameter_that_the_server_does_not_know() -> None:
    """The settings are doubted, with the server's own words; whether that is believed is the
    pool's to say.
    """
    refuses = True

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        if refuses:
            return httpx.Response(400, json={"error": {"message": "unknown argument: top_q"}})
        return httpx.Response(200, json=text("fine", "stop"))

    backend = HttpBackend("http://localhost", transport=httpx.MockTransport(answer), stream=False)
    await backend.start()
    first = await verdict_of(backend)
    assert isinstance(first.error, ConfigError)
    assert "top_q" in str(first.error)
    refuses = False
    await backend.complete([prompt()])
    refuses = True
    assert (await verdict_of(backend)).kind == "settings"


async def test_fault_053_another_model_after_an_outage() -> None:
    """Back after an outage, the server is asked what it serves before any prompt goes out."""
    async with talking(stream=False) as (server, backend):
        port = server.port
        await server.stop()
        await verdict_of(backend)  # on the old connection, or refused on a new one
        async with Server(Behaviour(root="toy-finetuned")) as other:
            await other.stop()
            await other.start(port)
            verdict = await verdict_of(backend)
            assert verdict.kind == "settings"
            assert "another model" in verdict.message
            assert other.ledger.asked.total() == 0


async def test_fault_055_giving_up_stops_the_server_too() -> None:
    """After a time-out the generation is not left alive behind our back."""
    behaviour = Behaviour(faults=("hang",), fault_rate=1.0)
    async with talking(behaviour, timeouts=QUICK) as (server, backend):
        await asyncio.gather(*[verdict_of(backend, i) for i in range(8)])
        await asyncio.sleep(0.01)
        assert server.ledger.live == 0
        assert server.ledger.hung_up == 8


async def test_hang_up_fails_everything_in_flight() -> None:
    """The watchdog's lever: all calls end at once, and their connections with them."""
    behaviour = Behaviour(faults=("hang",), fault_rate=1.0)
    async with talking(behaviour) as (server, backend):
        calls = [asyncio.ensure_future(verdict_of(backend, i)) for i in range(4)]
        await asyncio.sleep(0.05)
        assert server.ledger.live == 4
        backend.hang_up()
        assert {verdict.reason for verdict in await asyncio.gather(*calls)} == {"timeout"}


async def test_gauges_of_vllm_and_of_others() -> None:
    """/metrics is read where it has a queue; a server without is asked once and never again."""
    async with talking() as (server, backend):
        assert await backend.load() == (0.0, 0.0, 0.0)
    async with talking() as (server, backend):

        def nothing() -> bytes:
            return b"up 1\n"

        server.metrics = nothing  # type: ignore[method-assign]
        assert await backend.load() is None
        assert await backend.load() is None
        assert server.paths["/metrics"] == 1


async def test_streams_where_they_pay() -> None:
    """auto: few at a time are streamed, what goes beyond is asked for whole."""
    async with talking(Behaviour(latency_s=0.05)) as (_, backend):
        answers = await asyncio.gather(*[backend.complete([prompt(i)]) for i in range(100)])
        streamed = sum(isinstance(a, Completion) and a.ttft_s is not None for (a,) in answers)
        assert streamed == 64


async def test_fault_008_more_is_streamed_after_a_silence() -> None:
    """Whole answers that never came cost a slot the longest time-out; the next silence is noticed
    after that to the first token, also with more than 64 in flight.
    """
    timeouts = Timeouts(first_token_s=0.6, total_s=3.0)
    behaviour = Behaviour(faults=("hang",), fault_rate=1.0)
    loop = asyncio.get_running_loop()
    async with talking(behaviour, timeouts=timeouts) as (server, backend):
        seconds = []
        for _ in range(2):
            began = loop.time()
            await asyncio.gather(*[verdict_of(backend, i) for i in range(100)])
            seconds.append(loop.time() - began)
        assert seconds[0] > 2.7
        assert 0.6 < seconds[1] < 2.1
        server.behaviour = Behaviour(latency_s=0.05)
        answers = await asyncio.gather(*[backend.complete([prompt(i)]) for i in range(100)])
        assert all(isinstance(a, Completion) and a.ttft_s is not None for (a,) in answers)


async def test_a_finish_reason_that_nobody_knows_is_named_once() -> None:
    """Its answers count as cut off, which alone says nothing of the cause."""
    choice = {"index": 0, "text": " Say it", "finish_reason": "banana\x1b[31m"}
    answer = httpx.Response(200, json={"model": "m", "choices": [choice]})
    backend = HttpBackend(
        "http://localhost", model="m", stream=False,
        transport=httpx.MockTransport(lambda request: answer),
    )  # fmt: skip
    said: list[str] = []
    backend.on_lesson = said.append
    for index in range(3):
        (outcome,) = await backend.complete([prompt(index)])
        assert isinstance(outcome, Completion)
        assert outcome.finish_reason == "unknown"
    assert [line.count("'banana") for line in said] == [1]
    assert "\x1b" not in said[0]
