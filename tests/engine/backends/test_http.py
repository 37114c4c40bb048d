"""The OpenAI-shaped backend against the toxic server: what it asks, and what it makes of hosts."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from benchmarks.server import Behaviour, Server
from engine.backends.base import Failure
from engine.backends.openai.access import Access
from engine.backends.openai.backend import HttpBackend
from engine.backends.openai.listening import Timeouts
from engine.backends.scripted import alpaca_text
from engine.errors import AuthError, ConfigError, UnavailableError
from engine.records import Completion
from engine.secrets import Secret
from tests.engine.backends.talk import (
    QUICK,
    canned,
    talking,
    text,
    verdict_of,
)
from tests.engine.wire import http as http_bytes
from tests.engine.wire import prompt, raw_server

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


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
