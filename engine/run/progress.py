"""What a run has come to and how it ends: what the pipeline keeps up to date and displays show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from engine.errors import WoolmillError
from engine.limits import Pool
from engine.money import Spent
from engine.records import EVERY

__all__ = ["BatchView", "Display", "Owner", "Pace", "Progress", "Stop", "of_target"]

PRIOR_ANSWERS = 1.0
"""Weight, in answers, of the most that an answer can hold against what they held so far. An
estimate that starts high and sinks sends too few first and never too many.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Why nothing more is sent."""

    error: WoolmillError | None = None
    signum: int | None = None
    asked: bool = False
    """The program that started the run wants no more of it."""

    @property
    def reached(self) -> bool:
        """The target is reached, or the plan is at its end; nothing went wrong."""
        return self.error is None and self.signum is None and not self.asked


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchView:
    """A batch as the live view shows it."""

    tag: str
    state: str
    lines: int
    done: int | None
    """None: its provider does not say before the end."""
    age_s: float
    next_look_s: float


@dataclass(slots=True, kw_only=True)
class Progress(Spent):
    """How far the run is and what it has used; what ``Display`` shows. Counts are of acknowledged
    (committed) rows.
    """

    target: int
    most_records: int = 19
    """That one answer can hold."""
    requests: int | None = None
    """Of the whole input; None: it has not been read to its end, or there is none."""
    before: dict[str, Progress] = field(default_factory=dict)
    """The stages before this one, by name in their order."""
    accepted: int = 0
    sent: int = 0
    answered: int = 0
    decided_answers: int = 0
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    unread: int = 0
    """Accepted records that the embedding model cannot read: not compared by meaning."""
    session_answered: int = 0
    """Answers that arrived since this process started."""
    session_completion_tokens: int = 0
    session_accepted: int = 0
    draining: bool = False
    calls: int = 0
    """Under way: from their slot to the commit of their answers."""
    calls_at_disk: int = 0
    """Of ``calls`` and the decisions: those that wait for a commit."""
    paid: bool = True
    """Answers cost money."""
    tokens_in_the_making: int = 0
    """Completion tokens of answers that are not finished, as far as their backends know."""
    learning: bool = False
    """A call goes alone, to learn the context length."""
    to_decide: int = 0
    """Answers that could be decided now."""
    deciding_s: float = 0.0
    """How long there have been such answers without any decision."""
    dropped: int = 0
    """Requests that were on the wire at a stop, and whose answers were not waited for."""
    batches: list[BatchView] = field(default_factory=list)
    """Batches whose answers may come."""
    drain_left_s: float | None = None
    """After a stop: how long the calls in flight will still be waited for."""

    @property
    def records_per_answer(self) -> float:
        """Accepted records an answer, estimated from above."""
        seen = self.accepted + self.most_records * PRIOR_ANSWERS
        return seen / (self.decided_answers + PRIOR_ANSWERS)


BEYOND_ALL = EVERY // 2**20
"""From here on a target stands for all rows there are, or a stage's share of that."""


def of_target(target: int) -> str:
    """For a line that names how many were accepted: of how many."""
    return "" if target >= BEYOND_ALL else f" of {target:,}"


class Display(Protocol):
    """Shows progress. ``refresh`` is called some times a second and must not block."""

    def refresh(self, progress: Progress, pool: Pool) -> None: ...

    def note(self, message: str) -> None:
        """One line that stays."""


class Owner:
    """Whoever started a run: is told what is committed, and may end it. This one does neither.

    All are called in the thread that the run is in.
    """

    def opened(self, target: int) -> None:
        """The store is open and what it holds belongs to this run, whose target is settled."""

    def committed(self, below: int) -> None:
        """Every request with a lower index than ``below`` is decided, for the store to read."""

    def ended(self) -> None:
        """Every request that there can be is decided."""

    def wants(self, requests: int) -> None:
        """The run would go on up to this request, if it had the input."""

    def running(self, stop: Callable[[], None]) -> None:
        """From now on ``stop`` ends the run in order; called once more, it leaves at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When to stop, and how much goes into one call."""

    target: int
    max_requests: int | None = None
    request_batch_size: int = 1
    max_barren_requests: int = 300
    max_refusals_in_a_row: int = 20
    """Answers without any text that end the run: its settings cannot be right."""
    drain_timeout_s: float = 120.0
    most_records: int = 19
    """That one answer can hold; paces the first requests."""
    at_least: int = 8
    """Requests to have outstanding before any decision says how many are needed."""
    feeds: bool = False
    """Its rows are the input of another stage, which says how many it wants."""
    by_meaning: bool = False
    """Records are compared by meaning too."""
    paid: bool = True
    """Answers cost money. If not (an engine in this process), ``at_least`` holds to the end, since
    a small batch takes almost as long as a large one, and at the target what is in flight is
    dropped. If so, it is waited for: it serves a higher target later.
    """
