"""What refusals teach about a host, and what they do not."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from engine.backends.base import Verdict
from engine.backends.openai.dialect import OPTIONAL, Dialect
from engine.backends.openai.error_body import read_error
from engine.backends.openai.verdicts import classify
from engine.records import Api

ALL = {
    "model": "m",
    "messages": [],
    "max_tokens": 64,
    "temperature": 1.0,
    "top_p": 1.0,
    "stop": ["\n20"],
    "seed": 7,
    "stream": True,
    "stream_options": {"include_usage": True},
}


def refusal(data: Any, status: int = 400) -> tuple[Verdict, str]:
    raw = data if isinstance(data, bytes) else orjson.dumps(data)
    return classify(status=status, headers={}, body=raw), read_error(raw).text


def learn(
    dialect: Dialect,
    data: Any,
    status: int = 400,
    *,
    body: dict[str, Any] | None = None,
    api: Api = "chat",
) -> str | None:
    verdict, text = refusal(data, status)
    return dialect.learn(verdict, text, ALL if body is None else body, api)


def openai(message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return {"error": error}


def unknown(name: str) -> dict[str, Any]:
    field = {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs", "input": 1}
    return {"object": "error", "message": {"detail": [field]}, "type": "invalid_request_error"}


NEW = {"max_tokens": "max_completion_tokens"}
LESSONS: list[tuple[str, int, Any, dict[str, Any]]] = [
    ("OpenAI, a name", 400, openai("Unsupported parameter: 'max_tokens' is not supported with this"
     " model. Use 'max_completion_tokens' instead.", "max_tokens", "unsupported_parameter"), NEW),
    ("the new name alone", 400, openai("This model needs max_completion_tokens."), NEW),
    ("OpenAI, a value", 400, openai("Unsupported value: 'temperature' does not support 1 with this"
     " model.", "temperature", "unsupported_value"), {"left_out": ["temperature"]}),
    ("OpenAI, a field", 400, openai("Unsupported parameter: 'stop' is not supported with this"
     " model.", "stop", "unsupported_parameter"), {"left_out": ["stop"]}),
    ("Azure, no param", 400, openai("Unrecognized request argument supplied: stream_options"),
     {"left_out": ["stream_options"]}),
    ("Mistral", 422, unknown("seed"), {"left_out": ["seed"]}),
    ("FastAPI", 422, {"detail": [{"loc": ["body", "ChatRequest", "seed"], "msg": "no"}]},
     {"left_out": ["seed"]}),
    ("Gemini", 400, [{"error": {"code": 400, "status": "INVALID_ARGUMENT", "message":
     'Invalid JSON payload received. Unknown name "seed": Cannot find field.'}}],
     {"left_out": ["seed"]}),
    ("Groq", 400, openai("property 'seed' is unsupported"), {"left_out": ["seed"]}),
    ("Fireworks", 400, openai("Extra inputs are not permitted, field: 'seed', value: 1"),
     {"left_out": ["seed"]}),
    ("xAI", 400, {"code": "invalid", "error": "Argument not supported on this model: stop"},
     {"left_out": ["stop"]}),
    ("TGI", 422, {"error": "Input validation error: `top_p` must be > 0.0 and < 1.0",
                  "error_type": "validation"}, {"left_out": ["top_p"]}),
    ("Moonshot", 400, openai("invalid temperature: only 0.6 is allowed for this model"),
     {"left_out": ["temperature"]}),
    ("Databricks", 400, {"error_code": "BAD_REQUEST", "message":
     'Bad request: json: unknown field "seed"'}, {"left_out": ["seed"]}),
    ("LiteLLM", 400, {"error": {"code": "400", "param": None, "message":
     "litellm.UnsupportedParamsError: gemini does not support parameters: ['seed'], for model=m"}},
     {"left_out": ["seed"]}),
    ("Anthropic", 400, openai("`temperature` and `top_p` cannot both be specified for this model."
     " Please use only one."), {"left_out": ["temperature"]}),
    ("a host that knows no streams", 400, openai("Unknown parameter: 'stream'.", "stream"),
     {"left_out": ["stream"]}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "data", "learnt"), [pytest.param(*row[1:], id=row[0]) for row in LESSONS]
)
def test_lessons(status: int, data: Any, learnt: dict[str, Any]) -> None:
    """A refused field is renamed or left out, the person reads it, and it holds."""
    dialect = Dialect()
    lesson = learn(dialect, data, status)
    assert dialect.learnt == learnt
    assert lesson is not None
    for name in learnt.get("left_out", NEW.values()):
        assert name in lesson
    spoken = dialect.spoken(dict(ALL))
    assert not spoken.keys() & learnt.get("left_out", NEW.keys())
    assert ("max_completion_tokens" in spoken) is (learnt == NEW)
    later = Dialect()
    later.restore(orjson.loads(orjson.dumps(dialect.learnt)))
    assert later.spoken(dict(ALL)) == spoken
    assert str(later)


def test_only_what_changes_answers_is_called_so() -> None:
    for name in OPTIONAL:
        lesson = learn(Dialect(), openai("no", name), body={**ALL, name: True})
        assert lesson is not None
        neutral = ("stream", "stream_options", "response_format")
        assert ("answers differ" in lesson) is (name not in neutral), name


def test_all_fields_of_a_reasoning_model_are_learnt_one_by_one() -> None:
    """As OpenAI names them; what is left is taken."""
    dialect = Dialect()
    for name in ("max_tokens", "stop", "top_p", "temperature"):
        assert learn(dialect, openai(f"Unsupported parameter: '{name}'", name)) is not None
    assert dialect.spoken(dict(ALL)).keys() == {
        *("model", "messages", "seed", "stream", "stream_options", "max_completion_tokens")
    }


NOTHING = [
    ("a required field", 400, openai("Invalid value: 'model'", "model")),
    ("a fault of the prompt", 400, openai("Invalid 'messages[0].content': temperature of a string",
                                          "messages[0].content")),
    ("a field that was not sent", 400, openai("Unknown parameter: 'top_k'.", "top_k")),
    ("another status", 500, openai("temperature sensor failed")),
    ("a rate limit", 429, openai("slow down; lower max_tokens")),
    ("a page", 400, b"<html><title>Bad Request</title>"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "data"), [pytest.param(*row[1:], id=row[0]) for row in NOTHING])
def test_what_teaches_nothing(status: int, data: Any) -> None:
    dialect = Dialect()
    assert learn(dialect, data, status) is None
    assert dialect.learnt == {}


def test_what_the_user_asked_for_is_never_left_out() -> None:
    dialect = Dialect(asked={"temperature"})
    assert learn(dialect, openai("no", "temperature")) is None
    assert dialect.spoken(dict(ALL))["temperature"] == 1.0


def test_without_is_never_sent() -> None:
    spoken = Dialect(without=("stop", "seed")).spoken(dict(ALL))
    assert spoken.keys() == ALL.keys() - {"stop", "seed"}
    assert not Dialect(without=("stream",)).streams(True)


def test_after_an_answer_a_refusal_is_about_the_request() -> None:
    dialect = Dialect()
    dialect.answered(ALL, "chat")
    assert learn(dialect, openai("no", "temperature")) is None
    assert learn(dialect, openai("no", "temperature"), body={**ALL, "ignore_eos": True}) is None
    assert learn(dialect, openai("no", "ignore_eos"), body={**ALL, "ignore_eos": True}) is not None


CHATS = [
    ("OpenAI", 404, openai("This is a chat model and not supported in the v1/completions endpoint."
                           " Did you mean to use v1/chat/completions?", "model")),
    ("Azure", 400, {"error": {"code": "OperationNotSupported", "message": "The completion operation"
                              " does not work with the specified model, gpt-4o."}}),
    ("DeepSeek", 400, openai("completions api is only available when using beta api")),
    ("Groq", 404, openai("Unknown request URL: POST /openai/v1/completions", None, "unknown_url")),
    ("Cloudflare", 400, {"errors": [{"code": 7000, "message": "No route for that URI"}]}),
    ("Mistral", 404, {"message": "no Route matched with those values"}),
    ("Anthropic", 404, {"error": {"type": "not_found_error", "message": "Not found"}}),
    ("Vertex, a page", 404, b"<!DOCTYPE html><title>Error 404 (Not Found)!!1</title>"),
    ("a proxy", 405, {"detail": "Method Not Allowed"}),
    ("not implemented", 501, openai("completions not implemented")),
    ("FastAPI, chats on every path", 422, {"detail": [
        {"type": "missing", "loc": ["body", "messages"], "msg": "Field required"}]}),
    ("OpenAI's chats, in words", 400, openai("Missing required parameter: 'messages'.")),
    ("OpenAI's chats, of old", 400, openai("'messages' is a required property")),
    ("Groq's chats", 400, openai("property 'prompt' is unsupported")),
]  # fmt: skip


@pytest.mark.parametrize(
    "said",
    [
        "prompt is required",
        "This model needs a longer prompt; the messages of it are odd",
        "seed is not supported with this prompt",
    ],
)
def test_a_refusal_of_the_prompt_is_no_word_for_chats(said: str) -> None:
    dialect = Dialect()
    dialect.any_api = True
    learn(dialect, openai(said), api="completions")
    assert dialect.api("completions") == "completions"


@pytest.mark.parametrize(("status", "data"), [pytest.param(*row[1:], id=row[0]) for row in CHATS])
def test_hosts_of_chats_alone(status: int, data: Any) -> None:
    """Under ``--api auto`` a request for completions goes out as a chat from then on."""
    dialect = Dialect()
    assert learn(dialect, data, status, api="completions") is None
    dialect.any_api = True
    lesson = learn(dialect, data, status, api="completions")
    assert lesson is not None
    assert "chat" in lesson
    assert dialect.api("completions") == "chat"
    assert dialect.learnt == {"api": "chat"}
    assert learn(dialect, data, status, api="chat") is None


def test_a_host_that_has_answered_completions_keeps_them() -> None:
    dialect = Dialect()
    dialect.any_api = True
    dialect.answered({"model": "m", "prompt": "x"}, "completions")
    assert learn(dialect, openai("not found"), 404, api="completions") is None
    assert dialect.api("completions") == "completions"


STREAMS = [
    openai("This model only support stream mode, please enable the stream parameter."),
    openai("Requests with max_tokens > 4096 must have stream=true"),
    openai("parameter.enable_thinking must be set to false for non-streaming calls"),
]


@pytest.mark.parametrize("data", STREAMS, ids=["DashScope", "Fireworks", "Qwen"])
def test_hosts_of_streams_alone(data: Any) -> None:
    """Nothing else is learnt from it, least of all another name of max_tokens."""
    dialect = Dialect()
    unstreamed = {name: ALL[name] for name in ALL if not name.startswith("stream")}
    assert not dialect.streams(False)
    assert learn(dialect, data, body=unstreamed) is not None
    assert dialect.learnt == {"stream": True}
    assert dialect.streams(False)


@pytest.mark.parametrize(
    "kept",
    [
        {"left_out": ["model", "prompt"]},
        {"left_out": "stop"},
        {"max_tokens": "n"},
        {"api": 7, "stream": "yes"},
    ],
)
def test_what_is_restored_is_checked(kept: dict[str, Any]) -> None:
    """A store is a file: no request goes out without its model because of one."""
    dialect = Dialect()
    dialect.any_api = True
    dialect.restore(kept)
    assert dialect.learnt == {}
    assert dialect.spoken(dict(ALL)) == ALL
