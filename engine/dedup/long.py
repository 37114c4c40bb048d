"""Long texts by ROUGE-L, in a time that grows with their length and not with its square.

A subsequence of two texts of 16,000 tokens costs milliseconds, and a thousand such texts are half a
million pairs. So texts of more than ``LONG`` tokens are compared in two steps:

* A *sketch* of each text keeps, for runs of 3 and of 8 tokens, the least hash in each of ``BINS``
  parts (one permutation hashing: Li, Owen, Zhang 2012). The share of equal ones says how many runs
  two texts have in common; the ``FEW`` texts with the most are looked at.
* Their common subsequence is computed exactly as far as it never drifts by more than ``DRIFT``
  tokens, the difference of the lengths aside.

So nothing is refused wrongly: the F found is never above the true one. The price is a
near-duplicate that may be kept: where other texts share more runs with the new one, or where it
has both lost and gained more than ``DRIFT`` tokens. Texts of up to ``LONG`` tokens are compared
exactly, by the index of ``rouge``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.dedup.kernels import compiled, f_measure, popcount, signed, word
from engine.dedup.memory import Part, check_ends, reserve, room

__all__ = ["LONG", "LongTexts"]

LONG = 2_048
"""Tokens up to which a text is compared with all others exactly. Beyond, the square of the length
makes that too slow, and texts are rare enough for a sketch to be affordable."""
BINS = 256
"""Parts of a sketch, each with one hash: 1 kB a text for each length of run. Fewer would say less
surely how much two texts share. A power of two, since a mask chooses the part."""
RUNS = (3, 8)
"""Lengths of runs, in tokens. Short ones survive many small changes; long ones are seldom shared by
chance."""
FEW = 2
"""Candidates for each length of run."""
LEAST_EQUAL = 8
"""Parts of both sketches that must be equal. Of a text in which 30 % of the tokens, here and there,
have been replaced, some 60 of 512 are."""
DRIFT = 1_024
"""Half the width of the band in which a common subsequence is looked for, in tokens, the difference
of the lengths aside. The time grows with it; a pair of which one has both lost and gained more may
be kept."""
STRIP = 16
"""Words of 64 tokens that are worked on at a time, so that their masks stay in the cache."""
NONE = 0xFFFFFFFF
"""A part of a sketch into which no run has fallen. A real hash of this value is taken for none,
once in 2**32."""


class LongTexts:
    """Long texts by their tokens' numbers, found by ROUGE-L F above ``threshold``.

    Attributes:
        least: tokens that a text must have to resemble one of more than ``LONG``.
    """

    def __init__(self, threshold: float) -> None:
        self.least = int(LONG * threshold / (2 - threshold))
        self._threshold = threshold
        self._size = 0
        self._items: list[int] = []
        # The arrays are made with the first text: most datasets have none of such length.
        self._tokens: NDArray[np.uint32] | None = None
        self._starts = np.zeros(1, np.int64)
        self._sketches = np.empty((0, len(RUNS), BINS), np.uint32)

    def __len__(self) -> int:
        return self._size

    def add(self, item: int, ids: NDArray[np.uint32]) -> None:
        """Add a text of ``least`` tokens or more, known as ``item``: more than those before."""
        if self._tokens is None:
            self._tokens = reserve(np.uint32)
        start = int(self._starts[self._size])
        self._tokens = room(self._tokens, start + len(ids))
        self._tokens[start : start + len(ids)] = ids
        if self._size == len(self._sketches):
            more = max(64, self._size)
            self._sketches = np.concatenate(
                [self._sketches, np.empty((more, len(RUNS), BINS), np.uint32)]
            )
            self._starts = np.concatenate([self._starts, np.zeros(more, np.int64)])
        self._sketches[self._size] = _sketch(ids, np.array(RUNS))
        self._starts[self._size + 1] = start + len(ids)
        self._items.append(item)
        self._size += 1

    def find(self, ids: NDArray[np.uint32], rows: NDArray[np.uint32]) -> tuple[int, float]:
        """The item with the highest F above the threshold (ties: the earliest) and its F; -1 for
        none.

        ``rows`` is all zeros, with a place for each token of the items, and is left so.
        """
        best, best_f = -1, self._threshold
        if self._tokens is None:
            return best, best_f
        m = len(ids)
        lengths = np.diff(self._starts[: self._size + 1])
        fitting = np.flatnonzero(2 * np.minimum(lengths, m) > self._threshold * (lengths + m))
        equal = _equal(_sketch(ids, np.array(RUNS)), self._sketches, fitting)
        candidates: set[int] = set()
        for counts in equal.T:
            order = np.argsort(-counts, kind="stable")[:FEW]
            candidates.update(fitting[order[equal[order].sum(axis=1) >= LEAST_EQUAL]].tolist())
        for place in sorted(candidates):
            other = self._tokens[self._starts[place] : self._starts[place + 1]]
            f = _f(ids, other, rows)
            if f > best_f:
                best, best_f = self._items[place], f
        return best, best_f

    @property
    def last(self) -> int:
        """The item that was added last; -1: none was."""
        return self._items[-1] if self._items else -1

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that it holds as flat arrays, which stay as they are while texts are added."""
        starts = self._starts[: self._size + 1]
        tokens = np.empty(0, np.uint32) if self._tokens is None else self._tokens[: int(starts[-1])]
        items = np.array(self._items, np.int64)
        sketches = self._sketches[: self._size].reshape(-1)
        return {"tokens": tokens, "starts": starts, "items": items, "sketches": sketches}

    def take(self, arrays: Mapping[str, Part], items: int, known: int) -> None:
        """Hold what ``arrays`` gave, of so many items and different tokens in all. Raises
        ValueError where that cannot be.
        """
        tokens, starts, numbers, sketches = (
            arrays[f"long_{name}"] for name in ("tokens", "starts", "items", "sketches")
        )
        check_ends(starts.used, tokens.size)
        size = numbers.size
        order = np.concatenate([[-1], numbers.used, [items]])
        if (
            starts.size != size + 1
            or sketches.size != size * len(RUNS) * BINS
            or (np.diff(order) <= 0).any()
            or (tokens.size and int(tokens.used.max()) >= known)
        ):
            raise ValueError("its long texts are not in order")
        self._tokens = tokens.array if size else None
        self._starts = starts.used.copy()
        self._sketches = sketches.used.reshape(-1, len(RUNS), BINS).copy()
        self._items = numbers.used.tolist()
        self._size = size

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return int(self._starts[self._size]) * 4 + self._size * (len(RUNS) * BINS * 4 + 16)


@compiled
def _sketch(ids: NDArray[np.uint32], runs: NDArray[np.int64]) -> NDArray[np.uint32]:
    """For each length of run and each part of the hashes, the least one: (R, BINS)."""
    least = np.full((len(runs), BINS), NONE, np.uint32)
    for r in range(len(runs)):
        for start in range(len(ids) - runs[r] + 1):
            mixed = word(0xCBF29CE484222325)
            for p in range(start, start + runs[r]):
                mixed = (mixed ^ word(ids[p])) * word(0x9E3779B97F4A7C15)
                mixed ^= mixed >> word(29)
            part = signed(mixed & word(BINS - 1))
            value = np.uint32(mixed >> word(32))
            if value < least[r, part]:
                least[r, part] = value
    return least


@compiled
def _equal(
    sketch: NDArray[np.uint32], sketches: NDArray[np.uint32], chosen: NDArray[np.int64]
) -> NDArray[np.int64]:
    """How many parts of each chosen sketch equal those of ``sketch``: (C, R)."""
    equal = np.zeros((len(chosen), sketch.shape[0]), np.int64)
    for c in range(len(chosen)):
        for r in range(sketch.shape[0]):
            filled = same = 0
            for part in range(BINS):
                one, other = sketch[r, part], sketches[chosen[c], r, part]
                same += (one == other) & (one != NONE)
                filled += (one != NONE) | (other != NONE)
            # As many as there would be in full sketches: a text that says one thing over and over
            # has few runs.
            equal[c, r] = same * BINS // max(filled, 1)
    return equal


@compiled
def _f(a: NDArray[np.uint32], b: NDArray[np.uint32], rows: NDArray[np.uint32]) -> float:
    """ROUGE-L F of two texts, or less where their subsequence would have to drift too far."""
    first = 0
    shorter = min(len(a), len(b))
    while first < shorter and a[first] == b[first]:
        first += 1
    last = 0
    while last < shorter - first and a[len(a) - 1 - last] == b[len(b) - 1 - last]:
        last += 1
    middle = _lcs(a[first : len(a) - last], b[first : len(b) - last], rows)
    return f_measure(first + middle + last, len(a), len(b))


@compiled
def _lcs(a: NDArray[np.uint32], b: NDArray[np.uint32], rows: NDArray[np.uint32]) -> int:
    """Length of the longest common subsequence within the band.

    Bit-parallel as ``kernels._lcs``, strip by strip of ``a``; what a strip carries over to the next
    one at each token of ``b`` is kept. Outside the band nothing is taken to match, which can only
    make the subsequence shorter.
    """
    m, n = len(a), len(b)
    before, behind = DRIFT + max(0, n - m), DRIFT + max(0, m - n)
    carries = np.zeros(n, np.uint8)
    masks = np.empty((STRIP * 64 + 1, STRIP), np.uint64)
    state = np.empty(STRIP, np.uint64)
    found = 0
    for start in range(0, m, STRIP * 64):
        end = min(m, start + STRIP * 64)
        _mark(a[start:end], rows, masks)
        state[:] = ~word(0)
        for j in range(max(0, start - behind), min(n, end + before)):
            row = signed(rows[b[j]]) if b[j] < len(rows) else 0
            carry = word(carries[j])
            if row == 0 and carry == word(0):
                continue
            for w in range(STRIP):
                match = state[w] & masks[row, w]
                total = state[w] + match
                carried = total + carry
                carry = word(total < match) | word(carried < carry)
                state[w] = carried | (state[w] - match)
            carries[j] = np.uint8(carry)
        for w in range(STRIP):
            found += signed(popcount(~state[w]))
        for p in range(start, end):
            if a[p] < len(rows):
                rows[a[p]] = 0
    return found


@compiled
def _mark(ids: NDArray[np.uint32], rows: NDArray[np.uint32], masks: NDArray[np.uint64]) -> None:
    """Give each token of a strip a row, and note in the row where it stands. Row 0 stays empty."""
    used = 0
    masks[0] = word(0)
    for p in range(len(ids)):
        if ids[p] < len(rows):
            if rows[ids[p]] == 0:
                used += 1
                rows[ids[p]] = used
                masks[used] = word(0)
            masks[signed(rows[ids[p]]), p // 64] |= word(1) << word(p % 64)
