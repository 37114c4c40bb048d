"""What is tried again, when, and how often: ``deliver`` carries one call to its end.

Every failure has one owner. A backend makes one attempt and says what happened (``Failure``); the
limiter decides when there is room for another; what is worth another is decided here and nowhere
else. A wait never holds a slot: the lease is given back, and each attempt asks for a new one,
ahead of first attempts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import anyio

from engine.errors import BackendError, WoolmillError
from engine.records import Completion, Prompt

if TYPE_CHECKING:
    from engine.limits import Lease, Pool

__all__ = ["Delivery", "Failure", "Refit", "RetryPolicy", "Verdict", "deliver"]

Kind = Literal["unavailable", "throttled", "ambiguous", "overflow", "dead", "fatal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What follows from one failed attempt.

    kind:
        ``unavailable``  nothing was sent or paid (refused, no route, 503): free retry, breaker
        ``throttled``    429 or the like: the limit shrinks, the attempt does not count
        ``ambiguous``    may have been paid (cut body, 500, time-out): at most ``max_attempts``
        ``overflow``     the prompt does not fit the context: shrunk, then sent once more
        ``dead``         this request will never succeed: a dead letter, decided with ``reason``
        ``fatal``        no request will succeed: the run stops with ``error``
    """

    kind: Kind
    reason: str
    """A stable snake_case name: ``connect_refused``, ``http_500``, ``cut_body``,
    ``content_filter`` …
    """
    message: str = ""
    """For the person; stripped of control characters, without keys."""
    retry_after_s: float | None = None
    context_length: int | None = None
    """The limit that an overflow message states, in tokens."""
    prompt_tokens: int | None = None
    """The prompt's length that an overflow message states, in tokens."""
    error: WoolmillError | None = None


class Failure(BackendError):
    """One attempt, or in the end one request, failed; carries its verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(
            f"{verdict.reason}: {verdict.message}" if verdict.message else verdict.reason
        )
        self.verdict = verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how patiently."""

    max_attempts: int = 4
    """Attempts that may have been paid; free ones (refused, throttled) are bounded by the pool's
    outage time.
    """
    max_refits: int = 2
    """Times that one prompt is shrunk to fit the context."""
    backoff_s: float = 0.5
    """The first wait; it doubles, with full jitter."""
    max_backoff_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What one prompt came to."""

    prompt: Prompt
    """As last sent: shorter than at first where it was refitted."""
    outcome: Completion | Failure
    attempts: int
    backend: str


Refit = Callable[[Prompt, Verdict], Prompt | None]
"""A prompt that fits better than the one refused, or None where nothing more can be left out."""


async def deliver(
    prompts: Sequence[Prompt],
    pool: Pool,
    policy: RetryPolicy,
    lease: Lease,
    refit: Refit,
) -> list[Delivery]:
    """Answer the prompts of one call, each with a completion or a failure for good, in their order.

    ``lease`` is the slot of the first attempt; it is given back here whatever happens. A prompt
    that fails within a call of several is asked again alone.
    Raises a WoolmillError where no request can succeed any more: AuthError, ConfigError,
    StoppedError, UnavailableError.
    """
    outcomes = await _attempt(prompts, lease)
    name = lease.backend.name
    deliveries = []
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        if isinstance(outcome, Completion):
            deliveries.append(Delivery(prompt=prompt, outcome=outcome, attempts=1, backend=name))
        else:
            deliveries.append(await _again(prompt, outcome, pool, policy, refit, name))
    return deliveries


async def _attempt(prompts: Sequence[Prompt], lease: Lease) -> list[Completion | Failure]:
    """One attempt of one call; the lease ends with it. Raises what is fatal."""
    outcomes: list[Completion | Failure] = []
    try:
        try:
            for outcome in await lease.backend.complete(prompts):
                if not isinstance(outcome, Completion | Failure):
                    raise outcome
                outcomes.append(outcome)
        except Failure as exc:
            outcomes = [exc] * len(prompts)
    finally:
        lease.release([o if isinstance(o, Completion) else o.verdict for o in outcomes])
    for outcome in outcomes:
        if isinstance(outcome, Failure) and outcome.verdict.error is not None:
            raise outcome.verdict.error from outcome
    return outcomes


async def _again(
    prompt: Prompt, failure: Failure, pool: Pool, policy: RetryPolicy, refit: Refit, name: str
) -> Delivery:
    attempts, paid, refits = 1, 0, 0
    outcome: Completion | Failure = failure
    while isinstance(outcome, Failure):
        verdict = outcome.verdict
        paid += verdict.kind == "ambiguous"
        if verdict.kind == "dead" or paid >= policy.max_attempts:
            break
        if verdict.kind == "overflow":
            smaller = refit(prompt, verdict) if refits < policy.max_refits else None
            if smaller is None:
                break
            prompt, refits = smaller, refits + 1
        else:
            most_s = min(policy.backoff_s * 2 ** min(attempts - 1, 16), policy.max_backoff_s)
            wait_s = random.uniform(0, most_s)
            await anyio.sleep(max(wait_s, verdict.retry_after_s or 0))
        lease = await pool.acquire(tokens=_most_tokens(prompt), retry=True)
        attempts += 1
        name = lease.backend.name
        (outcome,) = await _attempt([prompt], lease)
    return Delivery(prompt=prompt, outcome=outcome, attempts=attempts, backend=name)


def _most_tokens(prompt: Prompt) -> int:
    """The most that an attempt can use; a token is taken to be at least three bytes where nobody
    counted.
    """
    return (prompt.tokens or len(prompt.text.encode()) // 3) + prompt.sampling.max_tokens
