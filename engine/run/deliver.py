"""What is tried again, when, and how often: ``deliver`` carries one call to its end.

Every failure has one owner. A backend makes one attempt and says what happened (``Failure``); the
limiter decides when there is room for another; what is worth another is decided here and nowhere
else. A wait never holds a slot: the lease is given back, and each attempt asks for a new one,
ahead of first attempts.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tenacity

from engine.backends.base import EMPTY_ANSWERS, GIVEN_UP, Failure, Verdict
from engine.errors import WoolmillError
from engine.limits import OF_THE_PROMPT, Lease, Pool
from engine.recipes.base import Ask
from engine.recipes.guard import RecipeFault
from engine.records import Answer, Completion, Prompt

__all__ = ["Books", "Delivery", "Refit", "RetryPolicy", "deliver", "most_tokens", "unsent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how patiently."""

    max_attempts: int = 4
    """Attempts that may have been paid, or that blamed the settings. The pool's outage time bounds
    the free ones."""
    max_probes: int = 20
    """Attempts besides by which a server that is out was tried, so that a longer outage fails no
    request; bounded, since a prompt may be what the server dies of."""
    max_refits: int = 10
    """Times that one prompt is shrunk to fit the context."""
    backoff_s: float = 0.5
    """The most that the first wait after a fault takes, with full jitter. It doubles with each
    fault of the request, but no more often than its server has failed since it last answered:
    where others are answered, waiting longer spares nobody."""
    max_backoff_s: float = 30.0
    last_wait_s: float = 40.0
    """The most, and half of it the least, that is waited before the last attempt after faults that
    may pass: bad times are often longer than the waits before it take together. It holds no slot.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What one prompt came to."""

    prompt: Prompt
    """As last sent: shorter than at first where it was refitted."""
    outcome: Completion | Failure
    attempts: int
    backend: str

    def answer(self) -> Answer:
        """As the store keeps it."""
        prompt, outcome = self.prompt, self.outcome
        failed = outcome.verdict if isinstance(outcome, Failure) else None
        return Answer(
            index=prompt.index,
            demonstrations=prompt.demonstrations,
            completion=outcome if isinstance(outcome, Completion) else None,
            failure=failed.reason if failed else None,
            message=failed.message if failed else "",
            truncated=prompt.truncated,
            attempts=self.attempts,
            backend=self.backend,
            row=prompt.row,
        )


def unsent(ask: Ask, fault: RecipeFault) -> Answer:
    """What the store keeps of a request that the recipe makes no prompt for."""
    return Answer(
        index=ask.index,
        demonstrations=(),
        completion=None,
        failure=fault.reason,
        message=str(fault),
        attempts=0,
        row=ask.row,
    )


CANCELLED = Failure(Verdict(kind="ambiguous", reason="cancelled"))
LEFT = Failure(Verdict(kind="unavailable", reason="left", message="nothing was sent"))
"""What comes of a call whose server has left before it went out."""


class Books:
    """Told of attempts that give no answer. This one keeps nothing."""

    def lost(self, tokens: int) -> None:
        """So many tokens, at the most, may have been billed for one."""

    def dropped(self, requests: int) -> None:
        """So many requests of one were on the wire, and their answers are not waited for."""


UNBOOKED = Books()
Refit = Callable[[Prompt, Verdict], Prompt | None]
"""A prompt that fits better than the one refused, or None where nothing more can be left out."""


async def deliver(
    prompts: Sequence[Prompt],
    pool: Pool,
    policy: RetryPolicy,
    lease: Lease,
    refit: Refit,
    books: Books = UNBOOKED,
) -> list[Delivery]:
    """Answer the prompts of one call, each with a completion or a failure for good, in their order.

    ``lease`` is the slot of the first attempt; it is given back here whatever happens. A prompt
    that fails within a call of several is asked again alone, beside the others that failed: none of
    them holds a slot while it waits for one.

    Raises a WoolmillError where no request can succeed any more: AuthError, ConfigError,
    StoppedError, UnavailableError.
    """
    backend = lease.backend
    outcomes = await _attempt(prompts, pool, lease, books)

    async def delivery(prompt: Prompt, outcome: Completion | Failure) -> Delivery:
        if isinstance(outcome, Completion):
            return Delivery(prompt=prompt, outcome=outcome, attempts=1, backend=backend.name)
        return await _Retrial(prompt, outcome, lease, pool, policy, refit, books).run()

    if len(prompts) == 1:
        return [await delivery(prompts[0], outcomes[0])]
    try:
        async with asyncio.TaskGroup() as group:
            pairs = zip(prompts, outcomes, strict=True)
            tasks = [group.create_task(delivery(*pair)) for pair in pairs]
    except ExceptionGroup as errors:  # the first ended the others; the caller knows single errors
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _attempt(
    prompts: Sequence[Prompt], pool: Pool, lease: Lease, books: Books
) -> list[Completion | Failure]:
    """One attempt of one call; the lease ends with it. Raises what ends the run."""
    outcomes: list[Completion | Failure] = [CANCELLED] * len(prompts)
    try:
        if not pool.has(lease.backend):
            raise LEFT
        with pool.on_the_wire():
            outcomes = [_checked(outcome) for outcome in await lease.backend.complete(prompts)]
    except Failure as exc:
        outcomes = [exc] * len(prompts)
    except BaseException:  # raised again
        books.dropped(len(prompts))
        raise
    finally:
        results = [o if isinstance(o, Completion) else o.verdict for o in outcomes]
        if lost := lease.release(results):
            books.lost(lost)
    failed = [outcome.verdict for outcome in outcomes if isinstance(outcome, Failure)]
    if given_up := sum(verdict.reason == GIVEN_UP for verdict in failed):
        books.dropped(given_up)
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        if isinstance(outcome, Failure) and (error := _ends_the_run(prompt, outcome, pool, lease)):
            raise error from outcome
    return outcomes


def _ends_the_run(
    prompt: Prompt, failure: Failure, pool: Pool, lease: Lease
) -> WoolmillError | None:
    verdict = failure.verdict
    if verdict.reason == "quota" and pool.does_without(lease.backend, verdict.message):
        return None  # another account goes on
    if verdict.kind == "settings" and not pool.doubts.believed(prompt.index, verdict.reason):
        return None
    if verdict.error is not None and pool.doubts.has_answered(verdict.reason):
        most = pool.settings.max_refusals_in_a_row
        return type(verdict.error)(
            f"{verdict.error}. {most} different requests were refused so without an answer between "
            "them, and others were answered; where it lies in these prompts, resume with a higher "
            "--max-refusals-in-a-row"
        )
    return verdict.error


def _checked(outcome: Completion | BaseException) -> Completion | Failure:
    if isinstance(outcome, Completion | Failure):
        return outcome
    raise outcome  # a bug, or a cancellation: not ours to answer


class _Retrial:
    """One prompt after its first failure: tenacity runs it, by what, until when and how long."""

    def __init__(
        self,
        prompt: Prompt,
        failure: Failure,
        lease: Lease,
        pool: Pool,
        policy: RetryPolicy,
        refit: Refit,
        books: Books,
    ) -> None:
        self._prompt = prompt
        self._outcome: Completion | Failure = failure
        self._backend = lease.backend
        self._probed = lease.probes
        """The attempt before tried a server that was out."""
        self._pool = pool
        self._policy = policy
        self._refit = refit
        self._books = books
        self._attempts = 0
        self._counted = 0
        """Attempts that ``max_attempts`` bounds."""
        self._probes = 0
        """Attempts that ``max_probes`` bounds."""
        self._refits = 0
        self._refused_as = ""
        """The reason of the attempt before, where it lay in the prompt."""

    async def run(self) -> Delivery:
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_result(_is_worth_another),
            stop=self._is_used_up,
            wait=self._wait_s,
            sleep=self._pool.rest,
            retry_error_callback=_last_outcome,
        )
        outcome: Completion | Failure = await retrying(self._attempt)
        return Delivery(
            prompt=self._prompt,
            outcome=outcome,
            attempts=self._attempts,
            backend=self._backend.name,
        )

    async def _attempt(self) -> Completion | Failure:
        """The first has been made already; a slot is held only while a later one is under way."""
        if self._attempts > 0:
            lease = await self._pool.acquire(
                tokens=most_tokens(self._prompt), retry=True, avoid=self._backend
            )
            self._backend, self._probed = lease.backend, lease.probes
            (self._outcome,) = await _attempt([self._prompt], self._pool, lease, self._books)
        self._attempts += 1
        if isinstance(self._outcome, Failure):
            self._count(self._outcome.verdict)
        elif self._refused_as in OF_THE_PROMPT:
            self._pool.doubts.took_back = True
        return self._outcome

    def _count(self, verdict: Verdict) -> None:
        # Here, since tenacity asks how long to wait before it asks whether to stop.
        if verdict.kind == "ambiguous" and self._probed and self._probes < self._policy.max_probes:
            self._probes += 1
        else:
            self._counted += verdict.kind in ("ambiguous", "settings")

    def _is_used_up(self, state: tenacity.RetryCallState) -> bool:
        assert isinstance(self._outcome, Failure)
        verdict = self._outcome.verdict
        if verdict.kind == "overflow":
            self._refits += 1
            enough = self._refits > self._policy.max_refits
            smaller = None if enough else self._refit(self._prompt, verdict)
            self._prompt = smaller or self._prompt
            return smaller is None
        again = verdict.reason in OF_THE_PROMPT and verdict.reason == self._refused_as
        settled = again and self._pool.doubts.settled(self._prompt.index, verdict.reason)
        self._refused_as = verdict.reason
        return settled or self._counted >= self._policy.max_attempts

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        """Outages and the pauses of an endpoint are the pool's; this wait is the request's own.

        A server that asks for longer than the run would wait for it is not obeyed here: it has
        answered others, or the pool gives up.
        """
        assert isinstance(self._outcome, Failure)
        verdict = self._outcome.verdict
        asked_s = verdict.retry_after_s or 0.0
        if asked_s > self._pool.settings.max_outage_s:
            asked_s = 0.0
        if verdict.kind not in ("ambiguous", "settings"):
            return asked_s
        policy, left = self._policy, self._policy.max_attempts - self._counted
        if verdict.kind == "ambiguous" and left == 1 and verdict.reason not in EMPTY_ANSWERS:
            return max(random.uniform(0.5, 1.0) * policy.last_wait_s, asked_s)
        doublings = min(max(self._counted - 1, 0), self._pool.faults_in_a_row(self._backend), 16)
        most_s = policy.backoff_s * 2.0**doublings
        return max(random.uniform(0.0, min(most_s, policy.max_backoff_s)), asked_s)


def _is_worth_another(outcome: Completion | Failure) -> bool:
    return isinstance(outcome, Failure) and outcome.verdict.kind != "dead"


def _last_outcome(state: tenacity.RetryCallState) -> Completion | Failure:
    assert state.outcome is not None
    outcome: Completion | Failure = state.outcome.result()
    return outcome


def most_tokens(prompt: Prompt) -> int:
    """The most that an attempt can use. Where nobody counted, a token has 1.5 bytes."""
    counted = prompt.tokens or prompt.size_bytes * 2 // 3
    return counted + prompt.sampling.max_tokens
