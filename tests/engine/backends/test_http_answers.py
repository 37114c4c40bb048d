"""What a host answers, read to its end: faults, streams in pieces, and answers of no use."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import orjson
import pytest

from benchmarks.server import FAULTS, Behaviour
from engine.backends.base import Failure
from engine.backends.openai.backend import HttpBackend
from engine.backends.openai.listening import Timeouts
from engine.errors import ConfigError, UnavailableError
from engine.records import Completion
from tests.engine.backends.talk import (
    COUNTED,
    DONE,
    NOTHING,
    QUICK,
    ask,
    canned,
    packed_answers,
    talking,
    text,
    verdict_of,
)
from tests.engine.wire import http as http_bytes
from tests.engine.wire import prompt, raw_server

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


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
        setting = "--first-token-s" if stream else "--attempt-s"
        assert (fault in SILENT) == verdict.message.endswith(f"({setting})")
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
        assert verdict.message.endswith("(--idle-s)")
        await backend.aclose()


async def test_a_list_of_models_that_does_not_come_is_told_as_one() -> None:
    """A server may take the question and be silent, as one that still loads its model."""

    async def serve(request: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5)

    async with raw_server(serve) as url:
        backend = HttpBackend(url, timeouts=QUICK)
        with pytest.raises(UnavailableError, match=r"no answer to GET /v1/models after \d+ s"):
            await backend.start()
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
    async with packed_answers(b" " * 50_000_000) as url:
        backend = HttpBackend(url, stream=False, max_response_bytes=100_000)
        await backend.start()
        verdict = await verdict_of(backend)
        assert (verdict.kind, verdict.reason) == ("dead", "too_large")
        await backend.aclose()


async def test_packed_answers_are_unpacked() -> None:
    """Some proxies pack what nobody asked to be packed."""
    async with packed_answers(json.dumps(message("words")).encode()) as url:
        backend = HttpBackend(url, stream=False)
        await backend.start()
        (answer,) = await backend.complete([prompt()])
        assert isinstance(answer, Completion)
        assert answer.text == "words"
        await backend.aclose()


@pytest.mark.parametrize("named", ["other", ""])
async def test_an_answer_that_names_no_model_is_of_the_one_asked_for(named: str) -> None:
    whole = {**text("words", "stop"), "usage": COUNTED, "model": named}
    answer = await ask(canned(whole=whole), stream=False, model="mine")
    assert isinstance(answer, Completion)
    assert answer.model == (named or "mine")
