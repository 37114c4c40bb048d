"""A real vLLM held to a schema, as a server and in a child: all that comes back fits, and the
witness tells a server that constrains from one that does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema_rs
import orjson
import pytest

from engine.backends.constraint import WATCHED, Witness
from engine.backends.openai.backend import HttpBackend
from engine.backends.vllm.backend import VllmBackend
from engine.backends.vllm.servers import Server
from engine.records import Completion, Message, Prompt, Sampling
from tests.vllm.conftest import ARGUMENTS
from tests.vllm.test_real_vllm import text_of

pytestmark = [pytest.mark.vllm, pytest.mark.anyio, pytest.mark.timeout(900)]

SCHEMA = {
    "type": "object",
    "properties": {"word": {"enum": ["yes", "no"]}, "score": {"enum": [1, 2, 3]}},
    "required": ["word", "score"],
    "additionalProperties": False,
}
ASKED = 2 * WATCHED
"""Some answers end at their limit in the blanks that JSON allows between two tokens."""
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}


def contradicting(seed: int, **extra: Any) -> Prompt:
    """A prompt that asks for anything but what the schema wants."""
    text = "Tell me a short story about a fox. Write plain sentences, no JSON."
    sampling = Sampling(max_tokens=48, seed=seed, extra=extra)
    return Prompt(
        index=seed,
        api="chat",
        messages=(Message(role="user", content=text),),
        sampling=sampling,
    )


def is_valid(text: str) -> bool:
    try:
        return jsonschema_rs.is_valid(SCHEMA, orjson.loads(text))
    except orjson.JSONDecodeError:
        return False


async def ask(backend: Any, prompts: list[Prompt]) -> list[Completion]:
    answers = [(await backend.complete([prompt]))[0] for prompt in prompts]
    assert all(text_of(answer) is not None for answer in answers)
    return answers


async def test_a_server_and_its_witness(server: Server) -> None:
    """Over HTTP: what the prompt contradicts comes back nonetheless, every time; without the schema
    it never does.
    """
    backend = HttpBackend(server.base_url, "smollm2")
    await backend.start()
    try:
        held = await ask(backend, [contradicting(n, response_format=FORMAT) for n in range(ASKED)])
        free = await ask(backend, [contradicting(n) for n in range(3)])
        (paris,) = await backend.complete([begun()])
    finally:
        await backend.aclose()
    assert all(is_valid(answer.text) for answer in held if answer.finish_reason == "stop")
    assert backend.witness.constrains is True
    assert backend.dialect.learnt == {}
    assert text_of(paris).startswith(" Paris")
    told: list[str] = []
    witness = Witness(told.append)
    for answer in free:
        assert not is_valid(answer.text)
        whole = Completion(text=answer.text, finish_reason="stop", usage=answer.usage)
        witness.saw({"response_format": FORMAT}, whole)
    assert witness.constrains is False
    assert len(told) == 1


async def test_a_child_and_its_witness(python: Path) -> None:
    """In a child: the same, and penalties are vLLM's own."""
    backend = VllmBackend("smollm2", python=python, args=ARGUMENTS)
    await backend.start()
    try:
        held = await ask(
            backend,
            [contradicting(n, response_format=FORMAT, top_k=40, min_p=0.01) for n in range(ASKED)],
        )
        (paris,) = await backend.complete([begun()])
        (unknown,) = await backend.complete([contradicting(0, top_kk=4)])
    finally:
        await backend.aclose()
    assert all(is_valid(answer.text) for answer in held if answer.finish_reason == "stop")
    assert backend.witness.constrains is True
    assert text_of(paris).startswith(" Paris")
    assert "did you mean top_k?" in str(unknown)


def begun() -> Prompt:
    """A chat that begins its own answer."""
    turns = (
        Message(role="user", content="What is the capital of France?"),
        Message(role="assistant", content="The capital of France is"),
    )
    sampling = Sampling(max_tokens=4, temperature=0, extra={"presence_penalty": 0.1})
    return Prompt(index=0, api="chat", messages=turns, sampling=sampling)
