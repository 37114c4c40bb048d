"""What a server sends, and what it adds up to."""

from __future__ import annotations

import json
from typing import Any

import httpx
import orjson
import pytest

from engine.backends.base import Failure
from engine.backends.openai.reply import FINISH, Events, Reply, Unpacker, parsed
from engine.errors import ConfigError
from engine.records import Completion, Usage
from tests.engine.wire import prompt

USED = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
MOST_EVENT_BYTES = 2**20


def choice(content: Any, finish: Any = "stop", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **more}
    return {"index": 0, "message": message, "finish_reason": finish}


def whole(*choices: Any, usage: Any = USED, **more: Any) -> Reply:
    return Reply.of_whole({"choices": list(choices), "usage": usage, **more}, 1)


def completed(reply: Reply) -> Completion:
    (outcome,) = reply.completions([prompt()], 0.0)
    assert isinstance(outcome, Completion), outcome
    return outcome


def refused(reply: Reply) -> str:
    (outcome,) = reply.completions([prompt()], 0.0)
    assert isinstance(outcome, Failure), outcome
    assert outcome.verdict.kind == "ambiguous"
    return outcome.verdict.reason


# Finish reasons

FINISHES = [
    ("stop", "OpenAI", "stop"),
    ("end_turn", "Anthropic, xAI", "stop"),
    ("stop_sequence", "Anthropic, TGI", "stop"),
    ("eos", "Together", "stop"),
    ("eos_token", "TGI", "stop"),
    ("COMPLETE", "Cohere", "stop"),
    ("STOP", "Gemini", "stop"),
    ("completed", "of Responses", "stop"),
    ("length", "OpenAI", "length"),
    ("max_tokens", "Anthropic", "length"),
    ("MAX_TOKENS", "Gemini, Cohere", "length"),
    ("max_output_tokens", "of Responses", "length"),
    ("model_length", "Mistral", "length"),
    ("model_context_window_exceeded", "Anthropic, z.ai", "length"),
    ("content_filter", "OpenAI", "content_filter"),
    ("sensitive", "z.ai", "content_filter"),
    ("SAFETY", "Gemini", "content_filter"),
    ("PROHIBITED_CONTENT", "Gemini", "content_filter"),
    ("RECITATION", "Gemini", "content_filter"),
    ("ERROR_TOXIC", "Cohere", "content_filter"),
    ("refusal", "Anthropic", "refusal"),
    ("tool_calls", "OpenAI", "tool_calls"),
    ("function_call", "OpenAI, before", "tool_calls"),
    ("tool_use", "Anthropic", "tool_calls"),
    ("repetition", "vLLM", "repetition"),
    ("moon", "nobody", "unknown"),
    (7, "nobody", "unknown"),
]


@pytest.mark.parametrize(
    ("word", "finish"), [pytest.param(w, f, id=f"{w} {host}") for w, host, f in FINISHES]
)
def test_finish_reasons_come_in_one_language(word: Any, finish: str) -> None:
    answer = completed(whole(choice("yes", word)))
    assert (answer.text, answer.finish_reason) == ("yes", finish)


IN_VAIN = [
    ("error", "finish_error"),
    ("network_error", "finish_error"),
    ("insufficient_system_resource", "finish_error"),
    ("failed", "finish_error"),
    ("timeout", "finish_error"),
    ("abort", "finish_abort"),
    ("cancelled", "finish_abort"),
]


@pytest.mark.parametrize(("word", "reason"), IN_VAIN)
def test_what_the_server_gave_up_is_no_answer(word: str, reason: str) -> None:
    assert refused(whole(choice("half an ans", word))) == reason


def test_every_word_of_the_table_leads_to_one_of_ours() -> None:
    ours = {"stop", "length", "content_filter", "refusal", "tool_calls", "repetition"}
    assert set(FINISH.values()) == ours | {"abort", "error"}
    assert all(word == word.lower() for word in FINISH)


# Contents

CONTENTS: list[tuple[str, dict[str, Any], str, str]] = [
    ("a text", {"content": "yes"}, "yes", ""),
    ("null", {"content": None, "reasoning": "hm"}, "", "hm"),
    ("empty", {"content": "", "reasoning_content": "hm"}, "", "hm"),
    ("DeepSeek, SGLang, llama.cpp", {"content": "yes", "reasoning_content": "hm"}, "yes", "hm"),
    ("vLLM, Ollama, Groq", {"content": "yes", "reasoning": "hm"}, "yes", "hm"),
    ("both names once", {"content": "yes", "reasoning": "hm", "reasoning_content": "hm"},
     "yes", "hm"),
    ("OpenRouter", {"content": "yes", "reasoning": None, "reasoning_details": [
        {"type": "reasoning.summary", "summary": "h"}, {"type": "reasoning.text", "text": "m"},
        {"type": "reasoning.encrypted", "data": "x"}]}, "yes", "hm"),
    ("parts", {"content": [{"type": "text", "text": "ye"}, {"type": "text", "text": "s"}]},
     "yes", ""),
    ("Mistral", {"content": [
        {"type": "thinking", "thinking": [{"type": "text", "text": "h"},
                                          {"type": "text", "text": "m"}]},
        {"type": "text", "text": "yes"}]}, "yes", "hm"),
    ("Anthropic's by a gateway", {"content": [
        {"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "yes"}]},
     "yes", "hm"),
    ("Databricks", {"content": [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "text", "text": "yes"}]}, "yes", "hm"),
    ("parts that are strings", {"content": ["ye", "s"]}, "yes", ""),
    ("parts of other kinds", {"content": [{"type": "image_url", "image_url": {}}, None, 7,
                                          {"type": "text", "text": "yes"}]}, "yes", ""),
]  # fmt: skip


@pytest.mark.parametrize("part", ["message", "delta"])
@pytest.mark.parametrize(
    ("message", "text", "thought"), [pytest.param(*row[1:], id=row[0]) for row in CONTENTS]
)
def test_contents(message: dict[str, Any], text: str, thought: str, part: str) -> None:
    """Text and thoughts, under all names, whole and streamed; both are life."""
    reply = Reply(1)
    reply.whole = part == "message"
    reply.add({"choices": [{"index": 0, part: message, "finish_reason": "stop"}]}, part)
    answer = completed(reply)
    assert (answer.text, answer.reasoning) == (text, thought)
    assert reply.started


def test_a_refusal_is_an_answer() -> None:
    assert completed(whole(choice(None, refusal="I cannot"))).finish_reason == "refusal"


@pytest.mark.parametrize(
    ("at", "text", "tokens"),
    [
        (1, "so ", 50),
        (1, "字", 50),
        (None, "字", 50),
        (None, "longer words ", 162),
        (50, "字", 7),
    ],
)
def test_a_count_in_the_midst_of_a_stream_is_not_the_last(
    at: int | None, text: str, tokens: int
) -> None:
    """Fifty pieces, and the usage behind one of them: what came later was paid too."""
    reply = Reply(1)
    for number in range(1, 51):
        finish = "stop" if number == 50 else None
        reply.add({"choices": [{"delta": {"content": text}, "finish_reason": finish}]}, "delta")
        if number == at:
            reply.add({"usage": {"prompt_tokens": 9, "completion_tokens": 7}}, "delta")
    usage = completed(reply).usage
    assert (usage.completion_tokens, usage.estimated) == (tokens, at != 50)


def test_a_choice_without_an_index_is_the_first() -> None:
    answer = completed(whole({"message": {"content": "yes"}, "finish_reason": "stop"}))
    assert answer.text == "yes"


# Endings

ENDINGS = [
    ("null and short", choice("yes", None), USED, "stop"),
    ("missing and short", {"index": 0, "message": {"content": "yes"}}, USED, "stop"),
    ("empty and short", choice("yes", ""), USED, "stop"),
    ("null, at the limit", choice("yes", None), USED | {"completion_tokens": 64}, "length"),
    ("null, of thoughts", choice(None, None, reasoning="hm"), USED, "stop"),
]


@pytest.mark.parametrize(
    ("answer", "usage", "finish"), [pytest.param(*row[1:], id=row[0]) for row in ENDINGS]
)
def test_a_whole_answer_needs_no_finish_reason(
    answer: dict[str, Any], usage: Any, finish: str
) -> None:
    """One JSON value cannot have been cut."""
    assert completed(whole(answer, usage=usage)).finish_reason == finish


@pytest.mark.parametrize("choices", [[], None, {}, "none"])
def test_an_answer_without_choices_is_asked_for_again(choices: Any) -> None:
    assert refused(Reply.of_whole({"choices": choices, "usage": USED}, 1)) == "no_choices"


def test_an_empty_answer_of_no_tokens_is_asked_for_again() -> None:
    """GLM and MiniMax under load; one of many tokens was spent on hidden thoughts."""
    nothing = {"prompt_tokens": 10, "completion_tokens": 0, "total_tokens": 10}
    assert refused(whole(choice(""), usage=nothing)) == "empty_answer"
    assert completed(whole(choice(""))).text == ""


# Usage

USAGES: list[tuple[str, dict[str, Any], Usage]] = [
    ("OpenAI", USED | {"prompt_tokens_details": {"cached_tokens": 8, "audio_tokens": 0},
                       "completion_tokens_details": {"reasoning_tokens": 3}},
     Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=8, reasoning_tokens=3)),
    ("no details", USED | {"prompt_tokens_details": None, "completion_tokens_details": None},
     Usage(prompt_tokens=10, completion_tokens=5)),
    ("DeepSeek", USED | {"prompt_cache_hit_tokens": 6, "prompt_cache_miss_tokens": 4,
                         "prompt_tokens_details": {"cached_tokens": 6}},
     Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=6)),
    ("Anthropic by LiteLLM", USED | {"cache_read_input_tokens": 4,
                                     "cache_creation_input_tokens": 0},
     Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=4)),
    ("Anthropic's own names", {"input_tokens": 3, "output_tokens": 5,
                               "cache_read_input_tokens": 7},
     Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=7)),
    ("Responses'", {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15,
                    "input_tokens_details": {"cached_tokens": 8},
                    "output_tokens_details": {"reasoning_tokens": 3}},
     Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=8, reasoning_tokens=3)),
    ("xAI counts thoughts beside", {"prompt_tokens": 10, "completion_tokens": 5,
                                    "total_tokens": 35,
                                    "completion_tokens_details": {"reasoning_tokens": 20}},
     Usage(prompt_tokens=10, completion_tokens=25, reasoning_tokens=20)),
    ("Gemini does not name them", {"prompt_tokens": 10, "completion_tokens": 5,
                                   "total_tokens": 215},
     Usage(prompt_tokens=10, completion_tokens=205, reasoning_tokens=200)),
    ("OpenRouter", USED | {"cost": 0.00014, "is_byok": False},
     Usage(prompt_tokens=10, completion_tokens=5, cost=0.00014)),
    ("OpenRouter, free", USED | {"cost": 0},
     Usage(prompt_tokens=10, completion_tokens=5, cost=0.0)),
    ("Perplexity", USED | {"search_context_size": "low",
                           "cost": {"input_tokens_cost": 0.001, "total_cost": 0.006}},
     Usage(prompt_tokens=10, completion_tokens=5, cost=0.006)),
    ("Moonshot, at the top", USED | {"cached_tokens": 9},
     Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=9)),
    ("whole numbers as floats", {"prompt_tokens": 10.0, "completion_tokens": 5.0},
     Usage(prompt_tokens=10, completion_tokens=5)),
    ("thoughts beyond what was written", USED | {"reasoning_tokens": 50},
     Usage(prompt_tokens=10, completion_tokens=5, reasoning_tokens=5)),
    ("implausible details", USED | {"prompt_tokens_details": {"cached_tokens": 2**63},
                                    "completion_tokens_details": {"reasoning_tokens": -1}},
     Usage(prompt_tokens=10, completion_tokens=5)),
    ("a negative cost", USED | {"cost": -1}, Usage(prompt_tokens=10, completion_tokens=5)),
    ("a cost that is none", USED | {"cost": "0.1"}, Usage(prompt_tokens=10, completion_tokens=5)),
    ("an implausible total", USED | {"total_tokens": 2**63 - 1},
     Usage(prompt_tokens=10, completion_tokens=5)),
]  # fmt: skip


@pytest.mark.parametrize(("said", "usage"), [pytest.param(*row[1:], id=row[0]) for row in USAGES])
def test_usages(said: dict[str, Any], usage: Usage) -> None:
    assert completed(whole(choice("yes"), usage=said)).usage == usage


@pytest.mark.parametrize(
    "said",
    [
        None,
        {},
        [],
        "many",
        {"prompt_tokens": 2**63 - 1, "completion_tokens": 5},
        {"prompt_tokens": 10, "completion_tokens": -5},
        {"prompt_tokens": True, "completion_tokens": 5},
        {"prompt_tokens": 10.5, "completion_tokens": 5},
        {"prompt_tokens": "10", "completion_tokens": 5},
        {"prompt_tokens": None, "completion_tokens": None},
        {"prompt_tokens": 1e300, "completion_tokens": float("inf")},
    ],
    ids=repr,
)
def test_implausible_counts_are_estimated(said: Any) -> None:
    usage = completed(whole(choice("yes, sir"), usage=said)).usage
    assert usage.estimated
    assert 0 < usage.prompt_tokens < 100
    assert usage.completion_tokens == 2


@pytest.mark.parametrize(
    "event",
    [
        {"choices": [], "usage": USED},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "usage": USED}]},
        {"choices": [{"index": 0, "delta": {}}], "x_groq": {"id": "req_1", "usage": USED}},
    ],
    ids=["OpenAI", "Moonshot", "Groq"],
)
def test_the_usage_of_a_stream(event: dict[str, Any]) -> None:
    """Wherever it stands; the last one counts."""
    reply = Reply(1)
    reply.add({"choices": [{"index": 0, "delta": {"content": "yes"}, "finish_reason": "stop"}],
               "usage": {"prompt_tokens": 10, "completion_tokens": 1}}, "delta")  # fmt: skip
    reply.add(event, "delta")
    assert completed(reply).usage == Usage(prompt_tokens=10, completion_tokens=5)


def test_a_batch_s_usage_is_shared_out() -> None:
    """To the token, and its cost to the cent."""
    texts = ["a" * 40, "b" * 80]
    choices = [{"index": i, "text": t, "finish_reason": "stop"} for i, t in enumerate(texts)]
    usage = {"prompt_tokens": 101, "completion_tokens": 31, "cost": 0.5}
    reply = Reply.of_whole({"choices": choices, "usage": usage}, 2)
    first, second = reply.completions([prompt(0), prompt(1)], 0.0)
    assert isinstance(first, Completion)
    assert isinstance(second, Completion)
    assert first.usage.prompt_tokens + second.usage.prompt_tokens == 101
    assert (first.usage.completion_tokens, second.usage.completion_tokens) == (10, 21)
    assert first.usage.cost == second.usage.cost == 0.25
    assert first.usage.estimated


# Errors in the place of an answer

ERRORS: list[tuple[str, Any]] = [
    ("OpenRouter", {"error": {"code": 429, "message": "slow"}, "choices": None}),
    ("of a choice", {"choices": [{"index": 0, "error": {"code": 502}, "finish_reason": "error"}]}),
    ("Gemini's array", [{"error": {"code": 429, "message": "slow"}}]),
    ("Cloudflare", {"success": False, "errors": [{"code": 7003}], "result": None}),
    ("MiniMax", {"choices": None, "base_resp": {"status_code": 1002, "status_msg": "slow"}}),
    ("flat", {"object": "error", "message": "slow", "code": 429}),
    ("FastAPI", {"detail": "slow"}),
    ("text", {"error": "slow"}),
    ("beside a good choice", {"error": {"message": "died"}, "choices": [choice("yes")]}),
]


@pytest.mark.parametrize("part", ["message", "delta"])
@pytest.mark.parametrize("data", [pytest.param(row[1], id=row[0]) for row in ERRORS])
def test_errors_are_no_answers(data: Any, part: str) -> None:
    reply = Reply(1)
    reply.whole = part == "message"
    reply.add(data, part)
    assert reply.error is not None


def test_code_0_is_no_error() -> None:
    """MiniMax says so with every answer."""
    reply = whole(choice("yes"), base_resp={"status_code": 0, "status_msg": ""})
    assert reply.error is None
    assert completed(reply).text == "yes"


def test_events_without_choices_are_no_errors() -> None:
    reply = Reply(1)
    events: list[Any] = [{"type": "ping"}, {"usage": USED}, {"choices": [], "created": 0}]
    for data in events:
        reply.add(data, "delta")
    assert reply.error is None


# Streams


def event(content: str, finish: str | None = None) -> str:
    delta = {"content": content} if content else {}
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def fed(reply: Reply, raw: bytes, size: int) -> None:
    """A stream in pieces of ``size`` bytes, to its end."""
    events = Events(reply, MOST_EVENT_BYTES)
    for at in range(0, len(raw), size):
        events.feed(raw[at : at + size])
    events.end()


A, B, END = event("ye"), event("s"), event("", "stop")
SPREAD = json.dumps(json.loads(B), indent=1).replace("\n", "\ndata: ")
STREAMS = [
    ("as OpenAI has it", f"data: {A}\n\ndata: {B}\n\ndata: {END}\n\ndata: [DONE]\n\n"),
    ("carriage returns", f"data: {A}\r\n\r\ndata: {B}\r\n\r\ndata: {END}\r\n\r\n"),
    ("no space", f"data:{A}\n\ndata:{B}\n\ndata:{END}\n\ndata:[DONE]\n\n"),
    ("no blank lines", f"data: {A}\ndata: {B}\ndata: {END}\ndata: [DONE]\n"),
    ("no [DONE]", f"data: {A}\n\ndata: {B}\n\ndata: {END}\n\n"),
    ("[DONE] and no newline", f"data: {A}\n\ndata: {B}\n\ndata: {END}\n\ndata: [DONE]"),
    ("nothing after the last event", f"data: {A}\n\ndata: {B}\n\ndata: {END}"),
    ("an event on several lines", f"data: {A}\n\ndata: {SPREAD}\n\ndata: {END}\n\n"),
    ("on several, then [DONE] at once", f"data: {A}\ndata: {SPREAD}\n\ndata: {END}\ndata: [DONE]"),
    ("comments", f": OPENROUTER PROCESSING\n\ndata: {A}\n\n: keep-alive\n\ndata: {B}\n: x\n\n"
     f"data: {END}\n\n"),
    ("keep-alives that a gateway wrapped", f"data: : keep-alive\n\ndata: {A}\n\ndata:\n\n"
     f"data: {B}\n\ndata: ping\n\ndata: {END}\n\n"),
    ("names and numbers", f"event: message\nid: 1\nretry: 5\ndata: {A}\n\nevent: x\ndata: {B}\n\n"
     f"data: {END}\n\n"),
    ("blank lines first", f"\n\n\ndata: {A}\n\n\n\ndata: {B}\n\ndata: {END}\n\n"),
    ("something after [DONE]", f"data: {A}\n\ndata: {B}\n\ndata: {END}\n\ndata: [DONE]\n\n"
     "data: {broken\n\n"),
    ("pings as objects", f'data: {{"type": "ping"}}\n\ndata: {A}\n\ndata: {B}\n\ndata: {END}\n\n'),
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("stream", [pytest.param(row[1], id=row[0]) for row in STREAMS])
def test_streams(stream: str, size: int) -> None:
    """Any way of writing events, in pieces of any size, is the same answer."""
    reply = Reply(1)
    fed(reply, stream.encode(), size)
    answer = completed(reply)
    assert (answer.text, answer.finish_reason) == ("yes", "stop")
    assert reply.pieces == 2


BROKEN = [
    ("no JSON", f"data: {A}\n\ndata: {{not json\n\n", "bad_stream"),
    ("cut within an event", f"data: {A}\n\ndata: {B[:20]}", "bad_stream"),
    ("a key twice", 'data: {"choices":[{"index":0,"text":"a","text":"b"}]}\n\n', "bad_stream"),
    ("no object", "data: [1]\n\n", "bad_json"),
    ("too deep", "data: " + '{"a":' * 5000 + "\n\n", "bad_stream"),
]


@pytest.mark.parametrize(
    ("stream", "reason"), [pytest.param(*row[1:], id=row[0]) for row in BROKEN]
)
def test_broken_streams(stream: str, reason: str) -> None:
    with pytest.raises(Failure) as failed:
        fed(Reply(1), stream.encode(), size=1000)
    assert (failed.value.verdict.kind, failed.value.verdict.reason) == ("ambiguous", reason)


# Bodies


def test_a_page_is_no_answer() -> None:
    """And the person reads its title, not its markup."""
    response = httpx.Response(200, headers={"content-type": "text/html"})
    page = b"<!DOCTYPE html><html><head><title>Just a moment&hellip;</title><script>x</script>"
    with pytest.raises(Failure) as failed:
        parsed(page, response, "http://there")
    assert failed.value.verdict.reason == "html"
    assert isinstance(failed.value.verdict.error, ConfigError)
    assert "Just a moment…" in str(failed.value)
    assert "<" not in str(failed.value)


@pytest.mark.parametrize("encoding", ["br", "zstd", "Compress"])
def test_packing_that_nobody_asked_for_is_named(encoding: str) -> None:
    with pytest.raises(Failure, match=encoding.lower()) as failed:
        Unpacker(encoding, 100)
    assert failed.value.verdict.kind == "settings"


@pytest.mark.parametrize(
    "choices",
    [
        [{"index": "0", "text": "words", "finish_reason": "stop"}],
        [{"index": 0, "text": "words", "finish_reason": "stop"}, {"index": 1, "text": "more"}],
        [{"index": None, "message": {"content": "words"}, "finish_reason": "stop"}],
    ],
)
def test_choices_that_are_numbered_in_odd_ways(choices: list[Any]) -> None:
    """The choice that was asked for is read; one more than that does not cost it."""
    (answer,) = Reply.of_whole({"choices": choices}, 1).completions([prompt()], 0.0)
    assert isinstance(answer, Completion)
    assert answer.text == "words"


def test_a_stream_of_whole_messages_behind_a_byte_order_mark() -> None:
    """``message`` may stand for ``delta``, and a file's mark before the first event."""
    reply = Reply(1)
    events = Events(reply, 10_000)
    choice = {"index": 0, "message": {"content": "words"}, "finish_reason": "stop"}
    events.feed(b"\xef\xbb\xbfdata: " + orjson.dumps({"choices": [choice]}) + b"\n\n")
    events.end()
    (answer,) = reply.completions([prompt()], 0.0)
    assert isinstance(answer, Completion)
    assert answer.text == "words"
