"""Classify one failure, and decide what is tried again, when, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.errors import BackendError, WoolmillError

__all__ = ["Failure", "Verdict"]

Kind = Literal["unavailable", "throttled", "ambiguous", "overflow", "dead", "fatal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What follows from one failed attempt.

    kind:
        ``unavailable``  nothing was sent or paid (refused, no route, 503): tried again for free,
        breaker
        ``throttled``    429 or the like: the limit shrinks, the attempt does not count
        ``ambiguous``    may have been paid (cut body, 500, time-out): counted, at most
        ``max_attempts``
        ``overflow``     the prompt does not fit the context: shrunk, then sent once more
        ``dead``         this request will never succeed: a dead letter, decided with ``reason``
        ``fatal``        no request will succeed: the run stops with ``error``
    """

    kind: Kind
    reason: str
    """A stable snake_case name: ``connect_refused``, ``http_500``, ``cut_body``, ``content_filter``
    …
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
