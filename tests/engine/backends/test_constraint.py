"""Structured outputs and further sampling over HTTP: what is sent, and what is said where they do
nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import orjson
import pytest

from engine.backends.base import Failure
from engine.backends.constraint import WATCHED, Witness, schema_of
from engine.backends.openai.backend import HttpBackend
from engine.backends.openai.dialect import Dialect
from engine.records import Completion, Message, Prompt, Sampling, Usage

SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "integer"}},
    "required": ["score"],
    "additionalProperties": False,
}
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA},
}
EXTRA: dict[str, Any] = {
    "response_format": FORMAT,
    "presence_penalty": 1.5,
    "top_k": 40,
    "min_p": 0.1,
}


def prompt(*, begun: bool = False, **extra: Any) -> Prompt:
    turns = [Message(role="system", content="Judge."), Message(role="user", content="A poem.")]
    if begun:
        turns.append(Message(role="assistant", content='{"score":'))
    sampling = Sampling(max_tokens=20, extra=extra)
    return Prompt(index=0, api="chat", messages=tuple(turns), sampling=sampling)


def answer(text: str, **changed: Any) -> Completion:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    return replace(Completion(text=text, finish_reason="stop", usage=usage), **changed)


class Host:
    """A host that answers ``text`` and refuses the fields named in ``refused``, one at a time."""

    def __init__(self, text: str = '{"score": 3}', owner: str = "me", refused: Any = ()) -> None:
        self.text, self.owner, self.refused = text, owner, refused
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "m", "owned_by": self.owner}]})
        body = orjson.loads(request.content)
        self.bodies.append(body)
        for name in self.refused:
            if name in body:
                error = {"message": f"This {name} type is unavailable now", "code": "invalid"}
                return httpx.Response(400, json={"error": error})
        choice = {"index": 0, "message": {"content": self.text}, "finish_reason": "stop"}
        return httpx.Response(200, json={"model": "m", "choices": [choice]})

    async def asked(self, *prompts: Prompt, **options: Any) -> list[str]:
        """Ask all, one after the other; what was said of the host."""
        backend = HttpBackend(
            "http://localhost", stream=False, transport=httpx.MockTransport(self), **options
        )
        said: list[str] = []
        backend.on_lesson = said.append
        await backend.start()
        for each in prompts:
            (outcome,) = await backend.complete([each])
            assert isinstance(outcome, Completion)
        return said


@pytest.mark.anyio
async def test_further_fields_are_sent_as_they_are() -> None:
    host = Host()
    assert await host.asked(prompt(**EXTRA)) == []
    (body,) = host.bodies
    assert body | EXTRA == body
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"]


@pytest.mark.anyio
@pytest.mark.parametrize(("owner", "told"), [("vllm", True), ("sglang", True), ("openai", False)])
async def test_a_begun_answer_is_gone_on_with(owner: str, told: bool) -> None:
    """vLLM and SGLang must be told to; other hosts refuse the fields that tell them."""
    host = Host(owner=owner)
    await host.asked(prompt(begun=True), prompt())
    begun, other = host.bodies
    assert begun["messages"][-1] == {"role": "assistant", "content": '{"score":'}
    fields = {"continue_final_message", "add_generation_prompt"}
    assert (begun.keys() & fields == fields) is told
    assert not other.keys() & fields


class Busy(Host):
    """The first request whose fields it takes meets a host that is busy."""

    def __call__(self, request: httpx.Request) -> httpx.Response:
        answer = super().__call__(request)
        if answer.status_code == 200 and len(self.bodies) == len(self.refused) + 1:
            return httpx.Response(503, json={"error": {"message": "overloaded"}})
        return answer


@pytest.mark.anyio
async def test_what_was_learnt_before_a_refusal_for_load_is_told_with_the_next_answer() -> None:
    host = Busy(refused=["top_k"])
    backend = HttpBackend("http://localhost", stream=False, transport=httpx.MockTransport(host))
    said: list[str] = []
    backend.on_lesson = said.append
    await backend.start()
    with pytest.raises(Failure) as refused:
        await backend.complete([prompt(**EXTRA)])
    assert refused.value.verdict.kind == "throttled"
    assert said == []
    for _ in range(2):
        (answer,) = await backend.complete([prompt(**EXTRA)])
        assert isinstance(answer, Completion)
        assert len(said) == 1
        assert "does not take top_k" in said[0]
    assert [("top_k" in body) for body in host.bodies] == [True, False, False, False]


@pytest.mark.anyio
async def test_a_host_without_schemas_is_asked_without_them_and_that_is_said() -> None:
    host = Host("a poem", refused=["response_format", "top_k"])
    said = await host.asked(prompt(**EXTRA), prompt(**EXTRA))
    assert [body.keys() & EXTRA.keys() for body in host.bodies[-2:]] == [
        {"presence_penalty", "min_p"},
        {"presence_penalty", "min_p"},
    ]
    assert said == [
        "it does not take response_format, which is left out: answers are not constrained there, "
        "and checked here all the same (it says: This response_format type is unavailable now)",
        "it does not take top_k, which is left out; answers differ from what it would give",
    ]


@pytest.mark.anyio
async def test_what_the_person_set_is_never_left_out() -> None:
    host = Host(refused=["top_k"])
    backend = HttpBackend(
        "http://localhost",
        stream=False,
        transport=httpx.MockTransport(host),
        dialect=Dialect(asked={"top_k"}),
    )
    await backend.start()
    with pytest.raises(Exception, match="top_k type is unavailable"):
        await backend.complete([prompt(top_k=40)])
    assert all("top_k" in body for body in host.bodies)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("text", "constrains"),
    [
        ('{"score": 3}', True),
        ('<think>Three?</think>{"score": 3}', True),
        ('```json\n{"score": 3}\n```', False),
        ('{"score": "three"}', False),
        ("I like it.", False),
    ],
)
async def test_a_host_that_ignores_a_schema_is_told_of_once(text: str, constrains: bool) -> None:
    host = Host(text)
    said = await host.asked(*(prompt(**EXTRA) for _ in range(WATCHED + 2)))
    assert len(said) == (0 if constrains else 1)
    assert all("does not constrain" in line for line in said)


def test_only_whole_answers_to_a_schema_witness_anything() -> None:
    told: list[str] = []
    witness = Witness(told.append)
    witness.saw(EXTRA, answer('{"sco', finish_reason="length"))
    witness.saw({}, answer("no JSON was asked for"))
    witness.saw(EXTRA, RuntimeError("failed"))
    assert witness.constrains is None
    for _ in range(WATCHED):
        witness.saw(EXTRA, answer('{"score": 1}'))
    assert witness.constrains is True
    assert told == []


@pytest.mark.parametrize(
    "wanted",
    [None, "json_object", {"type": "json_object"}, {"type": "json_schema"},
     {"type": "json_schema", "json_schema": {"schema": "nonsense"}}],
)  # fmt: skip
def test_what_is_no_schema_is_none(wanted: Any) -> None:
    assert schema_of({"response_format": wanted}) is None
