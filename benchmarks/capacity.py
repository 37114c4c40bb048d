"""How servers behave under load: what the loopback server and the simulations are made of.

``Batching`` is a continuously batching engine as vLLM is one. With n sequences running, a step
takes ``step_s + per_sequence_s * n`` and gives each of them one token, so tokens per second rise
steeply up to a knee and slowly beyond it. More than ``max_num_seqs`` wait in its queue; it never
refuses. When the running sequences outgrow ``kv_tokens``, the engine throws some out and computes
them anew: the preemption storm that a client should not cause.

``Slots`` is a hosted API as its users see it: the same speed for everyone, and 429 beyond a number
in flight. ``TokenBucket`` is the other kind of refusal: so many requests or tokens a minute.

All are driven by the running loop's clock, so they work on real and on virtual time.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable

__all__ = ["Batching", "Job", "Slots", "TokenBucket"]

Done = Callable[[], None]


class Job:
    """One sequence in an engine. ``cancel`` is what an engine does when the client hangs up."""

    __slots__ = ("cancelled", "done", "finish", "prompt_tokens", "running", "tokens")

    def __init__(self, tokens: int, prompt_tokens: int, done: Done) -> None:
        self.tokens = tokens
        self.prompt_tokens = prompt_tokens
        self.done = done
        self.finish = 0.0
        self.running = False
        self.cancelled = False


class Batching:
    """Processor sharing with a knee, exact between events.

    ``_served`` counts the tokens that a sequence running since the beginning would have; a sequence
    ends when it has grown by its own tokens. So an arrival or an end costs O(log n), not O(n).
    """

    def __init__(
        self,
        *,
        step_s: float = 0.02,
        per_sequence_s: float = 0.0004,
        max_num_seqs: int = 256,
        kv_tokens: int | None = None,
    ) -> None:
        self.step_s = step_s
        self.per_sequence_s = per_sequence_s
        self.max_num_seqs = max_num_seqs
        self.kv_tokens = kv_tokens
        self.preemptions = 0.0
        self.tokens_out = 0
        self._order = itertools.count()
        self._heap: list[tuple[float, int, Job]] = []
        self._queue: deque[Job] = deque()
        self._running = 0
        self._held_tokens = (
            0  # prompts and half the outputs of what runs: the mean use of the cache
        )
        self._served = 0.0
        self._then = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> int:
        return self._running

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def submit(self, tokens: int, prompt_tokens: int, done: Done) -> Job:
        """``done`` is called when ``tokens`` have been generated."""
        self._advance()
        job = Job(tokens, prompt_tokens, done)
        self._queue.append(job)
        self._arrange()
        return job

    def cancel(self, job: Job) -> None:
        self._advance()
        if job.running:
            self._leave(job)
        elif not job.cancelled and job in self._queue:
            self._queue.remove(job)
        job.cancelled = True
        self._arrange()

    def rescale(self, factor: float) -> None:
        """The machine becomes ``factor`` times as fast and as wide."""
        self._advance()
        self.per_sequence_s /= factor
        self.max_num_seqs = max(1, round(self.max_num_seqs * factor))
        if self.kv_tokens is not None:
            self.kv_tokens = round(self.kv_tokens * factor)
        self._arrange()

    def rate(self) -> float:
        """Tokens per second of each running sequence."""
        if not self._running:
            return 0.0
        rate = 1.0 / (self.step_s + self.per_sequence_s * self._running)
        if self.kv_tokens is not None and self._held_tokens > self.kv_tokens:
            rate *= (self.kv_tokens / self._held_tokens) ** 2
        return rate

    def best_tokens_per_s(self, tokens: float, prompt_tokens: float) -> float:
        """The most that any number in flight reaches with sequences of this mean size."""
        widest = self.max_num_seqs
        if self.kv_tokens is not None:
            widest = min(widest, max(1, int(self.kv_tokens / (prompt_tokens + tokens / 2))))
        return widest / (self.step_s + self.per_sequence_s * widest)

    def _advance(self) -> None:
        now = asyncio.get_running_loop().time()
        passed_s, self._then = now - self._then, now
        if self._running:
            self._served += passed_s * self.rate()
            if self.kv_tokens is not None and self._held_tokens > self.kv_tokens:
                self.preemptions += (
                    passed_s * self._running * (1 - self.kv_tokens / self._held_tokens)
                )

    def _arrange(self) -> None:
        """Start what fits, and wake at the next end."""
        while self._queue and self._running < self.max_num_seqs:
            job = self._queue.popleft()
            job.running = True
            job.finish = self._served + job.tokens
            self._running += 1
            self._held_tokens += job.prompt_tokens + job.tokens // 2
            heapq.heappush(self._heap, (job.finish, next(self._order), job))
        while self._heap and self._heap[0][2].cancelled:
            heapq.heappop(self._heap)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._heap:
            left_s = max(self._heap[0][0] - self._served, 0.0) / self.rate()
            self._timer = asyncio.get_running_loop().call_later(left_s, self._end)

    def _end(self) -> None:
        self._timer = None
        self._advance()
        ended = []
        while self._heap and self._heap[0][0] <= self._served + 1e-6:
            job = heapq.heappop(self._heap)[2]
            if not job.cancelled:
                self._leave(job)
                self.tokens_out += job.tokens
                ended.append(job)
        self._arrange()
        for job in ended:
            job.done()

    def _leave(self, job: Job) -> None:
        job.running = False
        self._running -= 1
        self._held_tokens -= job.prompt_tokens + job.tokens // 2


class Slots:
    """At most ``limit`` in flight, each ``latency_s`` long whatever the others do."""

    def __init__(self, *, limit: int, latency_s: float = 1.0) -> None:
        self.limit = limit
        self.latency_s = latency_s
        self.running = 0

    def admit(self) -> bool:
        return self.running < self.limit


class TokenBucket:
    """``per_min`` units a minute, at most ``burst`` at once (by default a minute's worth)."""

    def __init__(self, per_min: float, *, burst: float | None = None) -> None:
        self.per_min = per_min
        self.burst = per_min if burst is None else burst
        self._level = self.burst
        self._then = asyncio.get_running_loop().time()

    def level(self) -> float:
        now = asyncio.get_running_loop().time()
        grown = (now - self._then) * self.per_min / 60
        self._level, self._then = min(self._level + grown, self.burst), now
        return self._level

    def take(self, units: float) -> bool:
        if self.level() < units:
            return False
        self._level -= units
        return True

    def wait_s(self, units: float) -> float:
        """How long until ``units`` can be taken."""
        return max(units - self.level(), 0.0) * 60 / self.per_min
