"""Continuous batching: rows leave when they finish, and others take their place at the next step.

The choice: an engine of our own in one thread, because transformers' has one seed and one set of
stop strings for all requests, and on a CPU computes every row against the keys of all. A step takes
one token of every decoding row and, up to ``step_tokens`` in all, prompts that are still being
read. A row is admitted when its whole length, prompt and ``max_tokens``, fits what is left of the
memory for keys and values: nothing is ever preempted or runs out half-way. The price is fewer rows
where ``max_tokens`` is generous and memory is short.

What prompts begin with in common is computed once. Which prefix pays is found by looking at the
prompts that wait and the last few that came: the one that spares the most tokens.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.backends.local.kv_cache import Chunk, Decode, Lane, Prefix, Slot
from engine.backends.local.sampling import Draw, StopText, Tokenizer, choose
from engine.records import Sampling

__all__ = ["ContinuousBatch", "Finished", "Request", "common_prefix"]

_WORTH_SHARING = 32
"""Tokens that a shared prefix must spare each row, at least."""

_MAX_PREFIXES = 8
"""Shared prefixes whose keys and values are kept. Past it, one that no row uses makes room; where
all are in use, no new one is computed."""
_RECENT = 8
"""Prompts remembered after their admission, as witnesses of what prompts have in common."""

_LANE_ROWS = 4
"""Rows a lane: more waste padding where lengths differ, fewer cost more calls."""

_NEWEST = 0.1
"""Weight of the newest step in the mean of how long steps take."""

_GATHER_S = 0.02
"""How long an idle engine waits for company after a prompt, so that the first already share."""


@dataclass(frozen=True, slots=True)
class Finished:
    """One row's outcome. ``completion_tokens`` includes the end-of-text token, as servers count."""

    text: str
    finish_reason: str
    completion_tokens: int
    ttft_s: float


@dataclass(eq=False, slots=True)
class Request:
    """A prompt and what becomes of it.

    ``on_done`` is called once, in the engine's thread, unless the request was cancelled; it must
    return at once and not raise.
    """

    ids: Sequence[int]
    sampling: Sampling
    on_done: Callable[[Finished | Exception], None]
    clock: Callable[[], float]
    cancelled: bool = False
    arrived_s: float = 0.0
    begun: bool = False
    """It has a place among the rows."""
    made: int = 0
    """Tokens chosen so far."""

    def __post_init__(self) -> None:
        self.arrived_s = self.clock()

    @property
    def tokens(self) -> int:
        """Tokens that the row may come to."""
        return len(self.ids) + self.sampling.max_tokens

    def left(self, step_tokens: int) -> int:
        """Steps that the row may still take: one for each token, and those that read the prompt."""
        reading = 0 if self.made else -(-len(self.ids) // step_tokens)
        return reading + self.sampling.max_tokens - self.made


@dataclass(eq=False, slots=True)
class _Row:
    request: Request
    slot: Slot
    unread: Sequence[int]
    """Tokens not yet in the cache: the rest of the prompt, later the token chosen last."""
    draw: Draw
    text: StopText
    ttft_s: float = 0.0


@dataclass(eq=False)
class ContinuousBatch:
    """The rows being generated and those that wait, driven by one thread of its own.

    model: called as a causal language model; its attention is ``kv_cache.ATTENTION``.
    rows: how many are generated at once, at most.
    kv_tokens: tokens whose keys and values may be kept, at most; a request must fit it alone.
    step_tokens: new tokens in one forward pass, at most, while prompts are being read.
    """

    model: Any
    tokenizer: Tokenizer
    eos_ids: Sequence[int]
    device: torch.device
    rows: int
    kv_tokens: int
    step_tokens: int
    _arrivals: queue.SimpleQueue[Request | None] = field(default_factory=queue.SimpleQueue)
    _waiting: deque[Request] = field(default_factory=deque)
    _recent: deque[Sequence[int]] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _active: list[_Row] = field(default_factory=list)
    _prefixes: list[Prefix] = field(default_factory=list)
    _closed: bool = False
    step_s: float = 0.0
    """Seconds that a step takes, a mean of the last ones; 0 until there was one."""

    def __post_init__(self) -> None:
        self.rows = max(1, self.rows)
        lanes, rest = divmod(self.rows, _LANE_ROWS)
        self._lanes = [Lane(_LANE_ROWS) for _ in range(lanes)] + ([Lane(rest)] if rest else [])
        self._thread = threading.Thread(target=self._run, name="woolmill-generate", daemon=True)

    @property
    def longest(self) -> int:
        """Tokens that a row may come to at most, so that it can always be admitted in the end."""
        # A lane is as long as its longest row in every place, so one row costs as much as a full
        # lane.
        return self.kv_tokens // max(len(lane.slots) for lane in self._lanes)

    def start(self) -> None:
        """Begin to work on what is submitted."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request; from any thread."""
        self._arrivals.put(request)

    def close(self) -> None:
        """Drop all requests without an answer and wait for the step now running to end."""
        self._arrivals.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._collect():
                    self._admit()
                    began_s = time.monotonic()
                    self._step()
                    took_s = time.monotonic() - began_s
                    self.step_s += (took_s - self.step_s) * (_NEWEST if self.step_s else 1)
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody may wait for ever
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Hand ``error`` to everyone who waits, now and until the engine is closed."""
        # Requests go on arriving until somebody notices, and nobody else would answer them: so the
        # thread stays, and refuses each, until it is closed.
        for request in [row.request for row in self._active] + list(self._waiting):
            request.on_done(error)
        self._active.clear()
        self._waiting.clear()
        while (request_or_end := self._arrivals.get()) is not None:
            request_or_end.on_done(error)

    def _collect(self) -> bool:
        """Take what has arrived, waiting where there is nothing else to do; False at the end."""
        idle = not self._active and not self._waiting
        timeout: float | None = None if idle else 0
        while not self._closed:
            try:
                # Idle, it waits without end, and after a first arrival for a moment more; busy, it
                # only takes what is there, since the rows being generated wait for the next step.
                request = self._arrivals.get(block=timeout != 0, timeout=timeout or None)
            except queue.Empty:
                break
            if request is None:
                self._closed = True
                break
            self._waiting.append(request)
            timeout = _GATHER_S if idle and len(self._waiting) < self.rows else 0
        return not self._closed

    def _admit(self) -> None:
        """Give waiting requests, oldest first, the places that are free and that memory allows."""
        for row in [row for row in self._active if row.request.cancelled]:
            self._release(row)
        while self._waiting:
            request = self._waiting[0]
            if request.cancelled:
                self._waiting.popleft()
                continue
            slot = self._place(request)
            # Those behind it wait too: if shorter ones overtook it, a long one might never come in.
            if slot is None:
                return
            self._waiting.popleft()
            request.begun = True
            slot.prefix = self._prefix_for(request.ids)
            slot.prefix.rows += 1
            self._recent.append(request.ids)
            text = StopText(self.tokenizer, request.sampling.stop)
            unread = request.ids[len(slot.prefix.ids) :]
            draw = Draw.of(request.sampling, request.ids)
            self._active.append(_Row(request, slot, unread, draw, text))

    def _place(self, request: Request) -> Slot | None:
        """A free place in the lane of rows most like this one in length, if memory allows."""
        taken = {row.slot: row.request.tokens for row in self._active}

        def tokens(lane: Lane, more: int = 0) -> int:
            return len(lane.slots) * max([more, *(taken.get(slot, 0) for slot in lane.slots)])

        total = sum(tokens(lane) for lane in self._lanes)
        fitting = [
            lane
            for lane in self._lanes
            if any(slot not in taken for slot in lane.slots)
            # Not what the row takes, but what its lane comes to: a long row makes all its places
            # longer.
            and total - tokens(lane) + tokens(lane, request.tokens) <= self.kv_tokens
        ]
        if not fitting:
            return None
        length = len(request.ids)
        # Beside rows of like length there is the least padding to compute.
        lane = min(fitting, key=lambda lane: abs(length - max(s.position for s in lane.slots)))
        return next(slot for slot in lane.slots if slot not in taken)

    def _prefix_for(self, ids: Sequence[int]) -> Prefix:
        """The prefix of this prompt that is computed already, or now because it pays."""
        known = max(
            (p for p in self._prefixes if len(p.ids) < len(ids) and _starts(ids, p.ids)),
            key=lambda prefix: len(prefix.ids),
            default=Prefix(),
        )
        others = [request.ids for request in self._waiting] + list(self._recent)
        length = common_prefix(ids, others)
        # A prefix costs a pass of its own, during which all rows stand still.
        if length < len(known.ids) + _WORTH_SHARING:
            return known
        if len(self._prefixes) == _MAX_PREFIXES:
            unused = next((prefix for prefix in self._prefixes if not prefix.rows), None)
            if unused is None:
                return known
            self._prefixes.remove(unused)
        prefix = Prefix(tuple(ids[:length]))
        self._forward(list(prefix.ids), list(range(length)), [(length, prefix)], [length - 1])
        self._prefixes.append(prefix)
        return prefix

    def _step(self) -> None:
        """One forward pass over all rows; finished ones leave."""
        # Rows that decode come first, and all of them: a long prompt may take many steps to be
        # read, and must not hold up the answers of others.
        decoding = [row for row in self._active if len(row.unread) == 1]
        reading = [row for row in self._active if len(row.unread) > 1]
        if not decoding and not reading:
            return
        ids = [row.unread[0] for row in decoding]
        positions = [row.slot.position for row in decoding]
        answering = list(decoding)
        at = list(range(len(decoding)))
        parts: list[tuple[int, Any]] = []
        if decoding:
            parts.append((len(decoding), Decode([row.slot for row in decoding], self.device)))
        for row in reading:
            count = min(len(row.unread), max(self.step_tokens - len(ids), 0))
            if not count:
                break
            parts.append((count, Chunk(row.slot, count)))
            # Told before the pass, so that the lane makes room; it counts as length only
            # afterwards.
            row.slot.growth = count
            positions += range(row.slot.position, row.slot.position + count)
            ids += row.unread[:count]
            # Only what follows the prompt's last token is a choice; the rest of a prompt needs no
            # logits.
            if count == len(row.unread):
                answering.append(row)
                at.append(len(ids) - 1)
        for row in decoding:
            row.slot.growth = 1
        logits = self._forward(ids, positions, parts, at)
        for row in self._active:
            row.unread = row.unread[row.slot.growth :]
            row.slot.length += row.slot.growth
            row.slot.growth = 0
        if answering:
            tokens = choose(logits, [row.draw for row in answering], self.eos_ids)
            for row, token in zip(answering, tokens, strict=True):
                self._take(row, token)

    def _forward(
        self, ids: list[int], positions: list[int], parts: list[tuple[int, Any]], at: list[int]
    ) -> torch.Tensor:
        """Logits (len(at), V) after the tokens ``at``; keys and values go where ``parts`` say."""
        out = self.model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=torch.tensor([positions], device=self.device),
            # Of a type, as there may be none: the prompts that are read may all be longer.
            logits_to_keep=torch.tensor(at, dtype=torch.long, device=self.device),
            use_cache=False,
            parts=parts,
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    def _take(self, row: _Row, token: int) -> None:
        """Add the chosen token to a row, and finish the row where it ends."""
        request = row.request
        request.made += 1
        if request.made == 1:
            row.ttft_s = request.clock() - request.arrived_s
        reason = "length" if request.made == request.sampling.max_tokens else None
        row.draw.took(token)
        ends = token in self.eos_ids or token in row.draw.extra.stop_token_ids
        if ends or row.text.add(token):
            reason = "stop"
        if reason is None:
            row.unread = [token]
            return
        self._release(row)
        if not request.cancelled:
            request.on_done(Finished(row.text.finish(), reason, request.made, row.ttft_s))

    def _release(self, row: _Row) -> None:
        """Free the row's place."""
        self._active.remove(row)
        row.slot.prefix.rows -= 1
        row.slot.prefix = Prefix()
        row.slot.length = row.slot.growth = 0
        # Otherwise one very long row would leave its lane at that length for good.
        if not any(other.slot.lane is row.slot.lane for other in self._active):
            row.slot.lane.clear()


def common_prefix(ids: Sequence[int], others: Sequence[Sequence[int]]) -> int:
    """Length of the prefix of ``ids`` that spares the most tokens among ``others``.

    A long prefix shared with one of them may spare less than a shorter one shared with all. At
    least one token is left for the row itself.
    """
    lengths = sorted((_shared(ids, other) for other in others), reverse=True)
    spared = [(rows * length, length) for rows, length in enumerate(lengths, 1)]
    return min(max(spared, default=(0, 0))[1], len(ids) - 1)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with, leaving one to the shorter."""
    limit = min(len(one), len(other)) - 1
    for index in range(limit):
        if one[index] != other[index]:
            return index
    return max(limit, 0)


def _starts(ids: Sequence[int], prefix: Sequence[int]) -> bool:
    return tuple(ids[: len(prefix)]) == tuple(prefix)
