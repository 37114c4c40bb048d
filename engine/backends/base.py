"""The seam between the engine and whatever generates text.

A backend makes **one attempt**: it knows nothing of limits, retries or other endpoints. Those
belong to ``engine.limits`` and ``engine.run.deliver``, so that every backend, the scripted one of
the tests included, gets them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from engine.errors import BackendError, WoolmillError
from engine.records import Completion, Prompt

__all__ = [
    "EMPTY_ANSWERS",
    "GIVEN_UP",
    "Backend",
    "Failure",
    "GivesUp",
    "Making",
    "Tells",
    "Verdict",
]

GIVEN_UP = "given_up"
"""The reason of answers that a backend gave up when the run stopped; see ``GivesUp``."""
ANSWERS_OF_NO_USE = frozenset({"too_large", "encoding"})
"""Reasons of requests that were answered, and paid for, in vain."""
EMPTY_ANSWERS = frozenset({"no_choices", "empty_answer"})
"""Reasons of whole answers with nothing in them, as Gemini's to a prompt that it blocks: no better
time is worth waiting for."""

Kind = Literal["unavailable", "throttled", "ambiguous", "overflow", "settings", "dead", "fatal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What follows from one failed attempt.

    kind:
        ``unavailable``  nothing was sent or paid (refused, no route, 503): free retry, breaker
        ``throttled``    429 or the like: the limit shrinks, the attempt does not count
        ``ambiguous``    may have been paid (cut body, 500, time-out): at most ``max_attempts``
        ``overflow``     the prompt does not fit the context: shrunk, then sent once more
        ``settings``     a setting seems wrong (key, model, address, a field). Before any answer,
                         and confirmed once, the run stops with ``error``; later it is the
                         request's own: at most ``max_attempts``
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
    completion_limit: int | None = None
    """The most tokens of one answer, where an overflow message states that."""
    parameters: tuple[str, ...] = ()
    """The fields of the request that the message complains of, where it lists them."""
    error: WoolmillError | None = None
    """Of ``settings`` and ``fatal``: what the run stops with."""
    taken: int | None = None
    """Where ``billed``: the tokens of one prompt and of what came for it before the attempt failed;
    None: nothing came, and a server may have written all that it was allowed to. A connection that
    is reset before the first byte says no more: a proxy hangs up on an engine that goes on.
    """

    @property
    def billed(self) -> bool:
        """Whether the attempt may have to be paid for."""
        return self.kind == "ambiguous" or (
            self.kind in ("dead", "settings") and self.reason in ANSWERS_OF_NO_USE
        )


class Failure(BackendError):
    """One attempt, or in the end one request, failed; carries its verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(
            f"{verdict.reason}: {verdict.message}" if verdict.message else verdict.reason
        )
        self.verdict = verdict


class Backend(Protocol):
    """One place that answers prompts: an endpoint, or an engine in a child process or thread.

    Attributes:
        name: for people and the store: ``http://host:port``, ``transformers``, …
        model: the model id asked for.
        context_length: tokens that prompt and completion take together at most; None until known.
        max_in_flight: how many prompts make sense at once; None where the answers must tell.
    """

    name: str
    model: str
    context_length: int | None
    max_in_flight: int | None

    async def start(self) -> None:
        """Load or probe; find ``context_length``. Raises ConfigError, AuthError or
        UnavailableError.
        """

    async def complete(self, prompts: Sequence[Prompt]) -> list[Completion | BaseException]:
        """Answer prompts of one call, in their order; a failure of one of them stands in its place.

        Several prompts are given only to backends that batch (Alpaca's ``request_batch_size``).
        Raises Failure where the whole call failed.
        """

    async def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        """Tokens of each text under the model's own tokenizer; None where it cannot be had."""

    async def aclose(self) -> None:
        """Release what ``start`` took. Never raises."""


@runtime_checkable
class Making(Protocol):
    """A backend that knows how far its unfinished answers are: an engine in this process or in a
    child, or a server that streams.
    """

    @property
    def tokens_in_the_making(self) -> int:
        """Completion tokens made so far for answers that are not finished. Cheap to ask."""


@runtime_checkable
class Tells(Protocol):
    """A backend that finds out what it cannot do only when it is asked to."""

    on_lesson: Callable[[str], None]
    """Called with it, in words for the person."""


@runtime_checkable
class GivesUp(Protocol):
    """A backend whose unfinished answers cost nothing to drop."""

    def give_up(self, within_s: float) -> tuple[int, float]:
        """Drop at once the answers that could not be finished within ``within_s`` seconds.

        Their calls fail with StoppedError. Returns how many they are, and the seconds that the
        others may take; 0.0 where none is left.
        """
