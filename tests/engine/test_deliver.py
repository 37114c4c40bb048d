"""One call carried to its end: what is tried again, how often, where, and what stops the run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.server import QUICK_FAULTS, Behaviour, Server
from benchmarks.virtual_time import VirtualLoop
from engine.backends.base import Failure, Verdict
from engine.backends.openai.backend import HttpBackend
from engine.backends.openai.listening import Timeouts
from engine.backends.scripted import ScriptedBackend
from engine.errors import AuthError, ConfigError, StoppedError
from engine.limits import LimitSettings, Pool
from engine.records import Completion, Prompt
from engine.run.deliver import Delivery, RetryPolicy, deliver, most_tokens
from tests.engine.wire import prompt

pytestmark = pytest.mark.anyio

VIRTUAL = pytest.param(("asyncio", {"loop_factory": VirtualLoop}), id="virtual")
REAL = pytest.param(("asyncio", {}), id="real")


def verdict(kind: Any, **more: Any) -> Verdict:
    return Verdict(kind=kind, reason=f"a_{kind}", **more)


def failing(times: int, what: Verdict, **options: Any) -> ScriptedBackend:
    """The first ``times`` attempts of each prompt come to ``what``."""
    return ScriptedBackend(fault=lambda _, attempt: what if attempt <= times else None, **options)


def no_refit(prompt: Prompt, verdict: Verdict) -> Prompt | None:
    return None


async def run(
    prompts: Sequence[Prompt],
    pool: Pool,
    *,
    policy: RetryPolicy | None = None,
    refit: Any = no_refit,
) -> list[Delivery]:
    lease = await pool.acquire(tokens=sum(map(most_tokens, prompts)))
    return await deliver(prompts, pool, policy or RetryPolicy(), lease, refit)


async def run_one_by_one(count: int, pool: Pool) -> list[Delivery]:
    """So many prompts, of which no more than one waits for its first slot, as in a run."""
    calls = []
    for index in range(count):
        lease = await pool.acquire(tokens=100)
        call = deliver([prompt(index)], pool, RetryPolicy(), lease, no_refit)
        calls.append(asyncio.ensure_future(call))
    return [delivery for (delivery,) in await asyncio.gather(*calls)]


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("anyio_backend", [VIRTUAL])
class TestPolicy:
    async def test_a_first_attempt_that_succeeds(self) -> None:
        """One attempt, one call, the slot given back."""
        backend = ScriptedBackend()
        pool = Pool([backend])
        (done,) = await run([prompt()], pool)
        assert isinstance(done.outcome, Completion)
        assert (done.attempts, done.backend, pool.in_flight) == (1, "scripted", 0)

    async def test_fault_037_ambiguous_failures_are_bounded(self) -> None:
        """At most four attempts that may have been paid; the last failure is the dead letter."""
        backend = failing(99, verdict("ambiguous"))
        (done,) = await run([prompt()], Pool([backend]))
        assert isinstance(done.outcome, Failure)
        assert done.outcome.verdict.reason == "a_ambiguous"
        assert (done.attempts, backend.calls[0]) == (4, 4)
        assert 20 < now() < 0.5 + 1 + 40

    async def test_an_empty_answer_is_no_outage(self) -> None:
        """A blocked prompt does not hold back the decisions behind it."""
        backend = failing(99, replace(verdict("ambiguous"), reason="no_choices"))
        (done,) = await run([prompt()], Pool([backend]))
        assert (done.attempts, backend.calls[0]) == (4, 4)
        assert 0 < now() < 0.5 + 1 + 2

    async def test_back_off_grows_no_further_than_the_server_fails(self) -> None:
        """One prompt fails eleven times: long waits where nothing else is answered, short ones
        where all else is.
        """

        def unlucky(prompt: Prompt, attempt: int) -> Verdict | None:
            return verdict("ambiguous") if prompt.index == 0 and attempt <= 11 else None

        policy = RetryPolicy(max_attempts=13)
        waits = []
        for busy in (False, True):
            backend = ScriptedBackend(max_in_flight=8, delay_s=0.01, fault=unlucky)
            pool = Pool([backend])
            began = now()
            first = asyncio.ensure_future(run([prompt(0)], pool, policy=policy))
            index = 0
            while busy and not first.done():
                index += 1
                await run([prompt(index)], pool)
            (done,) = await first
            assert isinstance(done.outcome, Completion)
            assert done.attempts == 12
            waits.append(now() - began)
        # Its own fault may be the only one in a row, which doubles half a second once.
        assert waits[1] < 11 * 2 * 0.5 + 1 < waits[0]

    @pytest.mark.parametrize("in_flight", [1, 4, 16])
    @pytest.mark.parametrize("out_s", [10.0, 180.0])
    async def test_an_outage_fails_no_request(self, in_flight: int, out_s: float) -> None:
        """Nor where each attempt may have been paid, as where a gateway resets connections."""

        def fault(prompt: Prompt, attempt: int) -> Verdict | None:
            return verdict("ambiguous") if 5 < now() < 5 + out_s else None

        backend = ScriptedBackend(max_in_flight=in_flight, delay_s=0.2, fault=fault)
        pool = Pool([backend])
        done = await run_one_by_one(60 * in_flight, pool)
        assert all(isinstance(each.outcome, Completion) for each in done)
        assert backend.calls.total() < 60 * in_flight + 80
        assert 5 + out_s < now() < 5 + out_s + 60

    async def test_bad_minutes_are_waited_for_before_the_last_attempt(self) -> None:
        """Half the connections are reset, so that the server never seems to be out."""

        def fault(prompt: Prompt, attempt: int) -> Verdict | None:
            return verdict("ambiguous") if prompt.index % 2 and now() < 15 else None

        pool = Pool([ScriptedBackend(max_in_flight=8, delay_s=0.2, fault=fault)])
        done = await run_one_by_one(1200, pool)
        assert all(isinstance(each.outcome, Completion) for each in done)
        assert max(each.attempts for each in done) == 4

    async def test_a_prompt_that_a_server_dies_of_is_given_up(self) -> None:
        """However often it is the one that tries whether the server is back."""
        down_s = 0.0

        def fault(asked: Prompt, attempt: int) -> Verdict | None:
            nonlocal down_s
            down_s = now() + 3 if asked.index == 0 else down_s
            return verdict("ambiguous") if now() < down_s else None

        backend = ScriptedBackend(max_in_flight=1, delay_s=0.01, fault=fault)
        pool = Pool([backend])
        done = await run_one_by_one(100, pool)
        failed = [each.prompt.index for each in done if isinstance(each.outcome, Failure)]
        assert failed[0] == 0
        assert len(failed) < 4, "those that it took with it each time"
        assert 4 <= done[0].attempts <= 4 + 20

    async def test_fault_052_free_failures_burn_no_attempts(self) -> None:
        """Refused connections, however many, are not attempts that were paid."""
        backend = failing(20, verdict("unavailable"))
        (done,) = await run([prompt()], Pool([backend]))
        assert isinstance(done.outcome, Completion)
        assert done.attempts == 21

    async def test_fault_021_throttling_burns_no_attempts(self) -> None:
        """Nor are refusals."""
        backend = failing(20, verdict("throttled", retry_after_s=1.0))
        (done,) = await run([prompt()], Pool([backend]))
        assert isinstance(done.outcome, Completion)
        assert now() > 20

    @pytest.mark.parametrize("kind", ["dead", "fatal"])
    async def test_what_is_not_tried_again(self, kind: str) -> None:
        """A dead letter is sent once; what is fatal is raised, and sent once too."""
        error = AuthError("no") if kind == "fatal" else None
        backend = failing(99, verdict(kind, error=error))
        pool = Pool([backend])
        if error:
            with pytest.raises(AuthError):
                await run([prompt()], pool)
        else:
            (done,) = await run([prompt()], pool)
            assert isinstance(done.outcome, Failure)
        assert backend.calls[0] == 1
        assert pool.in_flight == 0

    @pytest.mark.parametrize("reason", ["http_400", "http_403", "http_422"])
    async def test_a_prompt_that_alone_is_refused_is_sent_twice(self, reason: str) -> None:
        """Once there were answers, as before them: the host has said all that it has to say. Where
        it refuses others too, it may be a gateway that starts anew.
        """
        refused = replace(verdict("settings", error=ConfigError("no")), reason=reason)
        backend = ScriptedBackend(fault=lambda p, _: refused if p.index else None)
        pool = Pool([backend])
        await run([prompt(0)], pool)
        (done,) = await run([prompt(1)], pool)
        assert isinstance(done.outcome, Failure)
        assert (done.attempts, backend.calls[1]) == (2, 2)
        await run([prompt(0)], pool)
        both = await asyncio.gather(*[run([prompt(index)], pool) for index in (2, 3)])
        assert [each.attempts for (each,) in both] == [4, 4]

    async def test_a_host_that_refuses_at_random_is_asked_as_often_as_any(self) -> None:
        """A prompt was answered that had been refused: two refusals settle nothing after it."""
        refused = replace(verdict("settings", error=ConfigError("no")), reason="http_403")
        refusals = {1: 1, 2: 3}
        backend = ScriptedBackend(
            fault=lambda p, nth: refused if nth <= refusals[p.index] else None
        )
        pool = Pool([backend])
        pool.doubts.answered()
        for index, attempts in ((1, 2), (2, 4)):
            (done,) = await run([prompt(index)], pool)
            assert (done.attempts, type(done.outcome)) == (attempts, Completion)

    async def test_back_off_holds_no_slot(self) -> None:
        """With one slot, a hundred others finish while one waits to be tried again."""
        backend = ScriptedBackend(
            max_in_flight=1,
            delay_s=0.001,
            fault=lambda p, attempt: (
                verdict("ambiguous", retry_after_s=60.0) if p.index == 0 and attempt == 1 else None
            ),
        )
        pool = Pool([backend])
        first = asyncio.ensure_future(run([prompt(0)], pool))
        await asyncio.sleep(0)
        await asyncio.gather(*[run([prompt(i)], pool) for i in range(1, 101)])
        assert now() < 1
        assert not first.done()
        (done,) = await first
        assert isinstance(done.outcome, Completion)

    async def test_a_failure_within_a_batch_is_asked_again_alone(self) -> None:
        """Four answers stand, the fifth gets a call of its own."""
        sizes = []

        class Counting(ScriptedBackend):
            async def complete(self, prompts: Sequence[Prompt]) -> list[Any]:
                sizes.append(len(prompts))
                return await super().complete(prompts)

        backend = Counting(
            fault=lambda p, attempt: verdict("ambiguous") if p.index == 3 and attempt == 1 else None
        )
        done = await run([prompt(i) for i in range(5)], Pool([backend]))
        assert [d.attempts for d in done] == [1, 1, 1, 2, 1]
        assert [d.prompt.index for d in done] == list(range(5))
        assert sizes == [5, 1]

    async def test_the_failures_of_a_batch_are_retried_beside_each_other(self) -> None:
        """Eight that must wait a minute each take one minute, even with a single slot."""
        backend = ScriptedBackend(
            max_in_flight=1,
            fault=lambda p, attempt: (
                verdict("ambiguous", retry_after_s=60.0) if attempt == 1 else None
            ),
        )
        done = await run([prompt(i) for i in range(8)], Pool([backend]))
        assert [d.prompt.index for d in done] == list(range(8))
        assert all(isinstance(d.outcome, Completion) for d in done)
        assert 60 <= now() < 62

    async def test_what_is_fatal_for_one_of_a_batch_ends_the_others(self) -> None:
        """The error itself is raised, at once, and no slot is lost."""

        def fault(asked: Prompt, attempt: int) -> Verdict | None:
            if attempt == 1 or asked.index != 2:
                return verdict("ambiguous", retry_after_s=1.0 if asked.index == 2 else 600.0)
            return verdict("fatal", error=AuthError("no"))

        pool = Pool([ScriptedBackend(fault=fault)])
        with pytest.raises(AuthError):
            await run([prompt(i) for i in range(4)], pool)
        assert (now() < 3, pool.in_flight) == (True, 0)

    async def test_fault_031_an_overflow_is_sent_again_smaller(self) -> None:
        """Never the same prompt twice: refit decides, and None is a dead letter."""
        sent = []

        def fault(asked: Prompt, attempt: int) -> Verdict | None:
            sent.append(asked.sampling.max_tokens)
            return verdict("overflow", context_length=20) if sent[-1] > 20 else None

        def halve(asked: Prompt, verdict: Verdict) -> Prompt | None:
            assert verdict.context_length == 20
            smaller = replace(asked.sampling, max_tokens=asked.sampling.max_tokens // 2)
            return replace(asked, sampling=smaller, truncated=True)

        (done,) = await run([prompt()], Pool([ScriptedBackend(fault=fault)]), refit=halve)
        assert isinstance(done.outcome, Completion)
        assert sent == [64, 32, 16]
        assert done.prompt.truncated
        (dead,) = await run([prompt(1)], Pool([failing(99, verdict("overflow"))]))
        assert isinstance(dead.outcome, Failure)
        assert (dead.outcome.verdict.kind, dead.attempts) == ("overflow", 1)

    async def test_overflows_without_end_end(self) -> None:
        """A server that refuses every size gets eleven prompts, not an endless loop."""
        backend = failing(10**9, verdict("overflow"))
        (done,) = await run([prompt()], Pool([backend]), refit=lambda p, v: p)
        assert isinstance(done.outcome, Failure)
        assert backend.calls[0] == 11

    async def test_a_bug_in_a_backend_is_not_retried(self) -> None:
        """An exception that is no Failure goes up as it is, and the slot is free."""

        class Broken(ScriptedBackend):
            async def complete(self, prompts: Sequence[Prompt]) -> list[Any]:
                raise ZeroDivisionError

        pool = Pool([Broken()])
        with pytest.raises(ZeroDivisionError):
            await run([prompt()], pool)
        assert pool.in_flight == 0

    async def test_a_cancelled_call_counts_as_paid(self) -> None:
        """Nobody knows what the server did with it; the budget takes the most it can have been."""
        pool = Pool([ScriptedBackend(delay_s=100.0)], LimitSettings(max_tokens_total=10_000))
        task = asyncio.ensure_future(run([prompt()], pool))
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.wait([task])
        assert pool.in_flight == 0
        assert pool.tokens_used == most_tokens(prompt())

    async def test_fault_058_the_second_attempt_goes_elsewhere(self) -> None:
        """What failed on one endpoint is tried on another first."""
        bad, good = failing(99, verdict("ambiguous"), name="bad"), ScriptedBackend(name="good")
        (done,) = await run([prompt()], Pool([bad, good]))
        assert done.backend == "good"
        assert done.attempts == 2


POOLS = LimitSettings(max_in_flight=32)


async def send_all(server: Server, count: int, **options: Any) -> list[Delivery]:
    """``count`` prompts through the whole wire, 32 at a time."""
    timeouts = Timeouts(first_token_s=1.0, idle_s=0.5, total_s=2.0)
    backend = HttpBackend(server.url, timeouts=timeouts)
    pool = Pool([backend], POOLS)
    await pool.start()
    policy = RetryPolicy(max_attempts=12, backoff_s=0.01)
    prompts = [prompt(i) for i in range(count)]
    done = await asyncio.gather(*[run([p], pool, policy=policy, **options) for p in prompts])
    await pool.aclose()
    return [delivery for (delivery,) in done]


@pytest.mark.parametrize("anyio_backend", [REAL])
class TestAgainstTheServer:
    @pytest.mark.parametrize("rate", [0.2, 0.5])
    async def test_every_row_is_delivered(self, rate: float) -> None:
        """All quick faults mixed, at 20 and 50 per cent: every prompt gets its own answer, once."""
        behaviour = Behaviour(fault_rate=rate, faults=QUICK_FAULTS, retry_after="0.01")
        async with Server(behaviour) as server:
            done = await send_all(server, 300)
            assert [d.prompt.index for d in done] == list(range(300))
            assert all(isinstance(d.outcome, Completion) for d in done)
            assert server.ledger.peak_live <= 32
            assert server.ledger.live == 0

    @pytest.mark.slow
    async def test_fault_055_live_generations_never_exceed_ours(self) -> None:
        """With hanging and stalling answers too, the server never works on more than we think."""
        behaviour = Behaviour(fault_rate=0.1, faults=("hang", "stall"), latency_s=0.01)
        async with Server(behaviour) as server:
            done = await send_all(server, 200)
            assert all(isinstance(d.outcome, Completion) for d in done)
            assert server.ledger.peak_live <= 32

    async def test_fault_024_out_of_credit_stops_the_run(self) -> None:
        """Exhausted quota: stopped and resumable, with what was in flight and no request more."""
        async with Server() as server:
            backend = HttpBackend(server.url, stream=False)
            pool = Pool([backend], POOLS)
            await pool.start()
            await run([prompt()], pool)
            server.behaviour = Behaviour(
                extra={"error": {"code": "insufficient_quota", "message": "add credit"}}
            )
            with pytest.raises(StoppedError, match="add credit"):
                await run([prompt(1)], pool)
            assert server.ledger.asked.total() == 2
            await pool.aclose()

    async def test_fault_029_a_model_that_disappears(self) -> None:
        """404 in the middle of a run is the configuration's fault, not the request's."""
        async with Server() as server:
            pool = Pool([HttpBackend(server.url)], POOLS)
            await pool.start()
            server.behaviour = Behaviour(model="other")
            with pytest.raises(ConfigError, match="does not exist"):
                await run([prompt()], pool)
            await pool.aclose()

    async def test_fault_058_one_endpoint_killed(self) -> None:
        """Two endpoints, one killed half way: every prompt is answered all the same."""
        slow = Behaviour(latency_s=0.02)
        async with Server(slow) as one, Server(slow) as two:
            pool = Pool(
                [HttpBackend(one.url), HttpBackend(two.url)], LimitSettings(max_in_flight=8)
            )
            await pool.start()
            calls = [asyncio.ensure_future(run([prompt(i)], pool)) for i in range(200)]
            await asyncio.sleep(0.1)
            await one.stop()
            done = [delivery for (delivery,) in await asyncio.gather(*calls)]
            assert all(isinstance(d.outcome, Completion) for d in done)
            # Not those of the whole run: the breaker spares them, though a server that is slow to
            # die closes it again and again with a last answer.
            assert sum(d.attempts > 1 for d in done) < 100
            await pool.aclose()


@pytest.mark.parametrize("anyio_backend", [VIRTUAL])
async def test_one_account_out_of_credit_is_not_the_run_s_end_fault_024() -> None:
    """Its endpoint gets no more work and the other goes on; where both are, the run stops."""
    quota = verdict("fatal", error=StoppedError("out of credit"))
    quota = replace(quota, reason="quota")
    broke = failing(99, quota, name="broke")
    pool = Pool([broke, ScriptedBackend(name="paid")])
    for index in range(6):
        (done,) = await run([prompt(index)], pool)
        assert isinstance(done.outcome, Completion)
        assert done.backend == "paid"
    assert broke.calls.total() == 1
    pool = Pool([failing(99, quota, name="broke"), failing(99, quota, name="broke too")])
    with pytest.raises(StoppedError, match="out of credit"):
        await run([prompt()], pool)


@pytest.mark.parametrize("anyio_backend", [VIRTUAL])
async def test_an_endpoint_out_of_credit_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """However many calls are in flight there, and whatever answers still come between them."""
    quota = replace(verdict("fatal", error=StoppedError("out of credit")), reason="quota")
    broke = failing(99, quota, name="broke", delay_s=1.0)
    pool = Pool([broke, ScriptedBackend(name="paid")])
    await asyncio.gather(*[run([prompt(index)], pool) for index in range(6)])
    assert sum("gets no more work" in line for line in caplog.messages) == 1
