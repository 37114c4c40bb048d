"""Each way in which a call goes wrong, as one of the first calls to a host of unknown context.

Then calls go alone, one after the other, so whatever one of them waits for, all wait for: a run
that stands still shows here. On virtual time: eighty faults, three places, four numbers in flight.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import orjson
import pytest

from benchmarks import virtual_time
from engine.errors import InternalError, StoppedError, UnavailableError
from engine.limits import Pool
from engine.prompts.fit import Prompts
from engine.records import Prompt
from tests.engine.doubles import Notes, Wire, answer_to, run_on, whole

pytestmark = pytest.mark.slow

EVENTS = {"content-type": "text/event-stream"}


def status(code: int, content: Any = b"", **headers: str) -> Callable[[Any], httpx.Response]:
    """An answer of that status; ``content`` is a message, JSON or bytes."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if isinstance(content, str):
        content = {"error": {"message": content}}
    if not isinstance(content, bytes):
        content = orjson.dumps(content)
    return lambda request: httpx.Response(code, headers=named, content=content)


def failing(error: Exception, cause: BaseException | None = None) -> Callable[[Any], Exception]:
    error.__cause__ = cause
    return lambda request: error


class Pieces(httpx.AsyncByteStream):
    """A body that comes in pieces, ``every_s``; then it ends, fails, or never does."""

    def __init__(self, *pieces: Any, every_s: float = 0.0) -> None:
        self._pieces = pieces
        self._every_s = every_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            await asyncio.sleep(self._every_s)
            if piece is None:
                await asyncio.sleep(1e9)
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def stream(*pieces: Any, every_s: float = 0.0) -> Callable[[Any], httpx.Response]:
    return lambda request: httpx.Response(
        200, headers=EVENTS, stream=Pieces(*pieces, every_s=every_s)
    )


def event(data: Any) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def never(request: httpx.Request) -> None:
    await asyncio.sleep(1e9)


def code(number: int) -> Any:
    return {"choices": None, "error": {"message": "Provider returned error", "code": number}}


BEGUN = event(whole("half of", finish=None))
PAGE = b"<html><head><title>Just a moment...</title></head><body>wait</body></html>"
CUT = httpx.RemoteProtocolError("the server closed the connection before the end")
TOO_LONG = (
    "This model's maximum context length is 2048 tokens. However, you requested 2100 tokens (2000"
    " in the messages, 100 in the completion)."
)

KEEPS_ALL = {
    "fault_001 dns": failing(httpx.ConnectError("x"), socket.gaierror(-2, "unknown")),
    "fault_002 refused": failing(httpx.ConnectError("refused")),
    "fault_003 connect timeout": failing(httpx.ConnectTimeout("5 s")),
    "fault_004 reset": failing(httpx.ReadError("reset")),
    "fault_005 reset in a stream": stream(BEGUN, httpx.ReadError("reset")),
    "fault_006 a stream without end": stream(BEGUN),
    "fault_006 done alone": stream(BEGUN, b"data: [DONE]\n\n"),
    "fault_007 a short body": stream(BEGUN, CUT),
    "fault_008 no answer": never,
    "fault_009 a stall": stream(BEGUN, None),
    "fault_010 a drip": stream(*[BEGUN] * 2000, every_s=1.0),
    "fault_014 certificate": failing(
        httpx.ConnectError("x"), ssl.SSLCertVerificationError("expired")
    ),
    "fault_015 proxy": failing(httpx.ProxyError("407 Proxy Authentication Required")),
    "fault_016 redirect": status(307, location="https://else.where/v1"),
    "fault_019 headers": failing(httpx.RemoteProtocolError("headers larger than 65536 bytes")),
    "fault_020 bad gzip": status(200, b"\x1f\x8bno", content_encoding="gzip"),
    "fault_020 brotli": status(200, b"\x0b\x02\x80", content_encoding="br"),
    "fault_021 429": status(429, "slow", retry_after="7"),
    "fault_022 429 in ms": status(429, "slow", retry_after_ms="1500"),
    "fault_022 429 as a date": status(429, "slow", retry_after="Wed, 21 Oct 2015 07:28:00 GMT"),
    "fault_022 429 garbage": status(429, "slow", retry_after="soon"),
    "fault_022 429 negative": status(429, "slow", retry_after="-3"),
    "fault_022 500 for ever": status(500, "x", retry_after="1e300"),
    "fault_022 500 ten days": status(500, "x", retry_after="864000"),
    "fault_022 503 a minute": status(503, "x", retry_after="60"),
    "fault_022 a number of 5,000 digits": status(429, "slow", retry_after="9" * 5000 + "s"),
    "fault_023 429 bare": status(429),
    "fault_026 401": status(401, "Incorrect API key"),
    "fault_028 403": status(403, "Country not supported"),
    "fault_029 model": status(404, "The model `m` does not exist"),
    "fault_030 path": status(404, {"detail": "Not Found"}),
    "fault_031 overflow": status(400, TOO_LONG),
    "fault_031 overflow without numbers": status(400, "Please reduce your prompt."),
    "fault_032 a field": status(400, "Unrecognized request argument supplied: top_q"),
    "fault_034 408": status(408),
    "fault_034 409": status(409),
    "fault_034 425": status(425),
    "fault_036 422": status(422, {"detail": [{"msg": "field required"}]}),
    "fault_037 500": status(500, "oops"),
    "fault_038 502": status(502, PAGE),
    "fault_038 503": status(503),
    "fault_038 504": status(504),
    "fault_038 529": status(529, {"error": {"type": "overloaded_error"}}),
    "fault_039 do": status(418, "teapot", x_should_retry="true"),
    "fault_040 429 in 200": status(200, code(429)),
    "fault_040 502 in 200": status(200, code(502)),
    "fault_040 in a list": status(429, [{"error": {"code": 429, "message": "x", "status": "X"}}]),
    "fault_040 in a choice": status(200, {"choices": [{"index": 0, "error": {"code": 502}}]}),
    "fault_040 without a name": status(200, {"error": "engine died"}),
    "fault_041 a page": status(200, PAGE, content_type="text/html"),
    "fault_042 half of the JSON": status(200, b'{"choices": [{"ind'),
    "fault_042 not UTF-8": status(200, b'{"choices": "\xff\xfe"}'),
    "fault_042 NaN": status(200, b'{"choices": NaN}'),
    "fault_042 a key twice": status(200, b'{"choices":[],"choices":[]}'),
    "fault_042 deep": status(200, b"[" * 100_000),
    "fault_042 half an event": stream(b'data: {"choices": [{"ind', b"\n\n"),
    "fault_042 a list": status(200, b"[1]"),
    "fault_043 choices []": status(200, {"model": "m", "choices": []}),
    "fault_043 choices [] in a stream": stream(event({"choices": []}), b"data: [DONE]\n\n"),
    "fault_043 nothing": status(200, {**whole(""), "usage": {"prompt_tokens": 1,
                                                              "completion_tokens": 0}}),
    "fault_044 no usage": status(200, {k: v for k, v in whole().items() if k != "usage"}),
    "fault_044 absurd usage": status(200, whole(usage={"prompt_tokens": 2**63 - 1,
                                                       "completion_tokens": -5})),
    "fault_045 another model": status(200, whole(model="other")),
    "fault_048 abort": status(200, whole(finish="abort")),
    "fault_048 error": status(200, whole(finish="error")),
    "fault_048 network_error": status(200, whole(finish="network_error")),
    "fault_049 error before DONE": stream(event({"error": {"message": "died"}}),
                                          b"data: [DONE]\n\n"),
    "fault_050 engine dead": status(500, "EngineDeadError"),
    "a header that is not ASCII": lambda r: httpx.Response(
        200, headers=[(b"x-ratelimit-limit-requests", b"\xe2\x88\x9e")], json=whole()),
    "whatever else": failing(RuntimeError("nobody thought of this")),
}  # fmt: skip
"""Every row comes, and no request fails for good."""

ITS_OWN = {
    "fault_033 policy": status(400, {"error": {"message": "x", "code": "content_filter"}}),
    "fault_033 moderation": status(
        403, {"error": {"code": 403, "message": "flagged", "metadata": {"reasons": ["violence"]}}}
    ),
    "fault_035 413": status(413, b"too large"),
    "fault_039 do not": status(500, "x", x_should_retry="false"),
}
"""The request fails for good, it alone, and the run makes up for it."""

FINISHED = {
    f"fault_048 {word}": status(200, whole(finish=word))
    for word in ("length", "stop", "end_turn", "eos", "model_length", "repetition", "novelty")
} | {"fault_043 refusal": status(200, {"choices": [{"message": {"refusal": "no"},
                                                    "finish_reason": "stop"}]})}  # fmt: skip
"""Answers all the same."""

IN_FLIGHT = [1, 2, 16, "auto"]


def run(wire: Wire, **options: Any) -> Any:
    return virtual_time.run(run_on(wire, **options))


@pytest.mark.parametrize("in_flight", IN_FLIGHT)
@pytest.mark.parametrize("fault", [*KEEPS_ALL, *ITS_OWN, *FINISHED])
def test_a_fault_among_the_first_calls(fault: str, in_flight: Any) -> None:
    """As the 1st, 2nd or 3rd call: the run ends with every row, and loses at most the request
    whose own fault it is.
    """
    what = (KEEPS_ALL | ITS_OWN | FINISHED)[fault]
    for nth in (1, 2, 3):
        stop, pipeline, store = run(Wire({nth: what}), in_flight=in_flight)
        assert stop.reached, (nth, stop.error)
        assert pipeline.progress.accepted == 40
        assert pipeline.progress.failed == (fault in ITS_OWN)
        assert len(set(store.sent_indexes)) == len(store.sent_indexes), "recorded once"


@pytest.mark.parametrize("in_flight", IN_FLIGHT)
@pytest.mark.parametrize(
    "fault",
    ["fault_037 500", "fault_023 429 bare", "fault_006 done alone", "fault_038 502",
     "fault_002 refused", "fault_008 no answer"],
)  # fmt: skip
def test_the_first_three_calls_fail(fault: str, in_flight: Any) -> None:
    """What hung every run against a hosted API: the scout's retry keeps its turn."""
    wire = Wire(dict.fromkeys((1, 2, 3), KEEPS_ALL[fault]))
    stop, pipeline, _ = run(wire, in_flight=in_flight)
    assert stop.reached
    assert (pipeline.progress.accepted, pipeline.progress.failed) == (40, 0)


@pytest.mark.parametrize("in_flight", IN_FLIGHT)
def test_quota_that_is_used_up_stops_the_run_fault_024(in_flight: Any) -> None:
    """At once, with nothing decided that was not answered; money is not asked for twice."""
    wire = Wire(dict.fromkeys(range(1, 99), status(402, "insufficient credit")))
    stop, _, store = run(wire, in_flight=in_flight)
    assert isinstance(stop.error, StoppedError)
    assert store.answers == {}


def test_settings_that_are_wrong_end_the_run_after_one_confirmation() -> None:
    """A key that is refused from the start: two requests, status 77, nothing decided."""
    wire = Wire(dict.fromkeys(range(1, 99), KEEPS_ALL["fault_026 401"]))
    stop, _, store = run(wire, in_flight=1)
    assert stop.error is not None
    assert stop.error.exit_code == 77
    assert wire.calls == 2
    assert store.decided == {}


@pytest.mark.parametrize(
    ("fault", "exit_code"),
    [("fault_026 401", 77), ("fault_028 403", 77), ("fault_030 path", 78), ("fault_041 a page", 78),
     ("fault_036 422", 78), ("fault_014 certificate", 77)],
)  # fmt: skip
def test_settings_that_become_wrong_end_the_run_by_and_by(fault: str, exit_code: int) -> None:
    """After good answers, twenty different requests must have been refused in a row."""
    wire = Wire(dict.fromkeys(range(30, 999), KEEPS_ALL[fault]))
    stop, pipeline, _ = run(wire, in_flight=64, target=400)
    assert stop.error is not None
    assert stop.error.exit_code == exit_code
    assert pipeline.progress.answered == 29
    assert pipeline.progress.failed == 0, "what the settings lost is asked again after a resume"


@pytest.mark.parametrize("in_flight", ["auto", 1, 16])
def test_a_server_that_is_silent_from_the_start_costs_no_request(in_flight: Any) -> None:
    """It is out after three time-outs to the first token, and the run ends when it has been so for
    too long; what it then says is asked for by the same command again.
    """
    wire = Wire(dict.fromkeys(range(1, 999), never))
    stop, pipeline, store = run(wire, in_flight=in_flight)
    assert isinstance(stop.error, UnavailableError)
    assert "timeout: no answer after 120 s" in str(stop.error)
    assert (pipeline.progress.failed, store.answers) == (0, {})
    assert wire.calls <= 2 * 3 * 16


def test_one_bad_answer_in_ten_ends_nothing() -> None:
    """Pages, refusals and missing routes among good answers cost their own attempts alone. The
    first of them meet a request once, since a host is not known for it yet; later ones up to three
    times.
    """
    kinds = ["fault_041 a page", "fault_028 403", "fault_030 path", "fault_020 bad gzip"]
    met: Counter[bytes] = Counter()

    def fault(number: int) -> Callable[[httpx.Request], Any]:
        bad = KEEPS_ALL[kinds[number // 10 % 4]]

        def once_in_a_while(request: httpx.Request) -> Any:
            body = b"".join(request.stream)  # type: ignore[arg-type]
            met[body] += 1
            return (bad if met[body] <= (1 if number < 100 else 3) else answer_to)(request)

        return once_in_a_while

    faults = {number: fault(number) for number in range(10, 700, 10)}
    stop, pipeline, _ = run(Wire(faults), in_flight=16, target=400)
    assert sum(met.values()) > 40
    assert stop.reached
    assert pipeline.progress.failed == 0


def test_prompts_larger_than_any_go_one_at_a_time_and_others_beside_them() -> None:
    """One overflow teaches the limit, though sixteen may be in flight."""
    overflows = 0

    def narrow(request: httpx.Request) -> httpx.Response:
        nonlocal overflows
        body = orjson.loads(b"".join(request.stream))  # type: ignore[arg-type]
        if len(body["prompt"]) // 4 + body["max_tokens"] > 650:
            overflows += 1
            return status(400, TOO_LONG.replace("2048", "650").replace("2000", "700"))(request)
        return answer_to(request)

    wire = Wire(dict.fromkeys(range(1, 999), narrow))
    stop, pipeline, _ = run(wire, in_flight=16, target=200)
    assert stop.reached
    assert pipeline.progress.failed == 0
    assert overflows == 1
    assert wire.most_together == 16


def test_a_bug_in_one_call_loses_no_other_answer() -> None:
    """It stops the sending; those in flight come home and are kept; status 70."""

    def refit(self: object, prompt: Prompt, verdict: object) -> Prompt:
        raise ZeroDivisionError("a bug")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Prompts, "refit", refit)
        wire = Wire({20: KEEPS_ALL["fault_031 overflow"]})
        stop, pipeline, store = run(wire, in_flight=8)
    assert isinstance(stop.error, InternalError)
    assert stop.error.exit_code == 70
    assert len(store.answers) == wire.calls - 1
    assert pipeline.progress.answered == len(store.answers)


def test_slots_that_are_held_while_nobody_is_asked_are_noticed() -> None:
    """A bug of ours, made here: a slot that is never given back. The run ends with 70."""
    notes = Notes()

    async def leaking() -> Any:
        acquire = Pool.acquire

        async def twice(self: Pool, **asked: Any) -> Any:
            lease = await acquire(self, **asked)
            await acquire(self, tokens=1)
            return lease

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Pool, "acquire", twice)
            return await run_on(Wire({}), in_flight=4, display=notes)

    stop, pipeline, _ = virtual_time.run(leaking())
    assert isinstance(stop.error, InternalError)
    assert "slots held" in str(stop.error)
    assert pipeline.progress.answered == pipeline.progress.sent
