"""The state of a run as plain values: how far it is, how fast, what it has used. All that is shown
to a person, or to another program, is made of these.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from engine.limits import Pool
from engine.records import EVERY
from engine.run.progress import Progress
from engine.text import visible

__all__ = ["Speed", "told"]

WINDOW_S = 30.0
"""Rates are those of so long, so that they follow what a person has just changed."""
ENOUGH = 20
"""Answers in that time by which the time left can be told. Of fewer each would make it jump, so it
goes by all that came since the start."""
SAMPLE_S = 0.5
"""Least time between two looks at the counts."""


Look = tuple[float, tuple[int, int, int, int]]
"""When, and the counts of answers, accepted records, prompt and completion tokens."""


class Speed:
    """Rates over the last half minute, from counts that are only ever looked at now and then.

    Completion tokens are those of the answers that are here and of those in the making, so that an
    answer that takes minutes is not counted all at once at its end.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[Look] = deque()
        self._first: Look | None = None

    def note(self, progress: Progress) -> None:
        """Take the counts as they are now."""
        now = self._clock()
        if self._seen and now - self._seen[-1][0] < SAMPLE_S:
            return
        counts = (
            progress.answered,
            progress.accepted,
            progress.prompt_tokens,
            progress.completion_tokens + progress.tokens_in_the_making,
        )
        self._seen.append((now, counts))
        self._first = self._first or self._seen[0]
        while now - self._seen[0][0] > WINDOW_S and len(self._seen) > 2:
            self._seen.popleft()

    def per_s(self) -> tuple[float, float, float, float]:
        """Answers, accepted records, prompt and completion tokens a second; 0 until it is known."""
        if len(self._seen) < 2:
            return 0.0, 0.0, 0.0, 0.0
        return self._between(self._seen[0])

    def steady_per_s(self) -> tuple[float, float]:
        """Answers and accepted records a second, over as long as tells how long the rest takes."""
        if self._first is None or len(self._seen) < 2:
            return 0.0, 0.0
        came = self._seen[-1][1][0] - self._seen[0][1][0]
        answers, accepted, *_ = self._between(self._seen[0] if came >= ENOUGH else self._first)
        return answers, accepted

    def _between(self, look: Look) -> tuple[float, float, float, float]:
        """The rates from an earlier look to the latest."""
        (began, first), (ended, last) = look, self._seen[-1]
        seconds = ended - began
        # Never below 0: an answer that is dropped takes what was made of it with it.
        a, b, c, d = (max(0, new - old) / seconds for old, new in zip(first, last, strict=True))
        return a, b, c, d


def _way(
    progress: Progress, answers_per_s: float, accepted_per_s: float
) -> tuple[float | None, float | None]:
    """The share of the way that is done and the seconds that are left; None where nobody knows:
    an input that has not been read to its end may hold any number of rows.
    """
    if progress.target == EVERY:
        done, goal, per_s = progress.decided_answers, progress.requests, answers_per_s
    else:
        done, goal, per_s = progress.accepted, progress.target, accepted_per_s
    if goal is None:
        return None, None
    left_s = round(max(0, goal - done * _ahead(progress)) / per_s, 1) if per_s else None
    return done / goal if goal else 1.0, left_s


def _ahead(progress: Progress) -> float:
    """Answers there are for each that is decided: those that wait for an earlier one are paid too,
    and will give as many rows.
    """
    return max(1.0, progress.answered / max(1, progress.decided_answers))


def told(progress: Progress, pool: Pool, speed: Speed) -> dict[str, Any]:
    """The state of a run as plain JSON values; all displays show these."""
    answers, _, prompt_tokens, completion_tokens = speed.per_s()
    share, left_s = _way(progress, *speed.steady_per_s())
    tokens = progress.prompt_tokens + progress.completion_tokens
    cost = _cost(progress, pool)
    paid_for = None if share is None else min(1.0, share * _ahead(progress))
    return {
        "accepted": progress.accepted,
        "target": None if progress.target == EVERY else progress.target,
        "decided": progress.decided_answers,
        "requests": progress.requests,
        "share": share,
        "left_s": left_s,
        "sent": progress.sent,
        "answered": progress.answered,
        "failed": progress.failed,
        "calls": progress.calls,
        "calls_at_disk": progress.calls_at_disk,
        "undecided": progress.answered - progress.decided_answers,
        "to_decide": progress.to_decide,
        "deciding_s": round(progress.deciding_s, 1),
        "tokens_in_the_making": progress.tokens_in_the_making,
        "answers_per_s": round(answers, 2),
        "prompt_tokens": progress.prompt_tokens,
        "completion_tokens": progress.completion_tokens,
        "prompt_tokens_per_s": round(prompt_tokens, 1),
        "completion_tokens_per_s": round(completion_tokens, 1),
        "tokens_per_accepted": round(tokens / progress.accepted, 1) if progress.accepted else None,
        "cost": cost,
        "cost_at_end": round(cost / paid_for, 4) if cost is not None and paid_for else None,
        "not_compared_by_meaning": progress.unread,
        "refused": {visible(reason): n for reason, n in progress.reasons.most_common()},
        "stages": [
            {
                "name": name,
                "accepted": stage.accepted,
                "wanted": None if stage.target == EVERY else stage.target,
                "answered": stage.answered,
                "undecided": stage.answered - stage.decided_answers,
                "calls": stage.calls,
                "refused": sum(stage.reasons.values()),
            }
            for name, stage in progress.before.items()
        ],
        "batches": [
            {
                "state": visible(batch.state),
                "requests": batch.lines,
                "done": batch.done,
                "age_s": round(batch.age_s),
                "next_look_s": round(batch.next_look_s),
            }
            for batch in progress.batches
        ],
        "first_answers": progress.session_answered == 0,
        "learning_context": progress.learning,
        "draining": progress.draining,
        "drain_left_s": None if progress.drain_left_s is None else round(progress.drain_left_s, 1),
        "endpoints": [
            {
                "name": visible(endpoint.name),
                "in_flight": endpoint.in_flight,
                "limit": endpoint.limit,
                "state": endpoint.state,
                "binds": endpoint.binds,
                "failure": visible(endpoint.failure),
                "oldest_s": round(endpoint.oldest_s, 1),
                "limit_why": endpoint.history.why,
            }
            for endpoint in pool.snapshot()
        ],
    }


def _cost(progress: Progress, pool: Pool) -> float | None:
    """Money spent, as hosts state it or by the prices; None where there is neither."""
    cost = pool.settings.prices.cost_if_known(progress)
    return None if cost is None else round(cost, 4)
