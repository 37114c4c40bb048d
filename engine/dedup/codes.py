"""Sign codes in lists: which vectors may be close to another, without looking at the vectors.

A vector is reduced to the signs of its components. The share of signs in which two vectors differ
tells their angle (Charikar 2002), so vectors of a high cosine differ in few bits, and a bit count
decides on each without its 1.5 kB being read. Codes are kept in lists by the nearest of the first
vectors' codes, and only the lists nearest to a query are read. Taking data for centres needs no
training, so the index grows without a pause; the price is that lists differ in size by a factor of
ten.

What this passes is a candidate, never a decision; and it misses a few in a thousand.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from engine.dedup.kernels import compiled, popcount, signed, word
from engine.dedup.memory import reserve, room

__all__ = ["SignLists"]

CHUNK = 64
"""Codes that lie together, word by word: word w of lane l is at (chunk * W + w) * CHUNK + l."""

AHEAD = 4
"""Chunks that are asked for while one is read."""
NOT_READ = -1
"""In place of a list's distance, which is never negative: it is too far from the query."""


class SignLists:
    """Codes of vectors, searched for those that may have a cosine above a floor.

    Args:
        vectors: the first items (N, D), which also become the centres of N lists.
        probes: how many lists are read for a query.
    """

    def __init__(self, vectors: NDArray[np.float32], probes: int = 128) -> None:
        lists = len(vectors)
        self._dimension = vectors.shape[1]
        self._centres = _codes(vectors)
        self._words: int = self._centres.shape[1]
        self._probes = min(probes, lists)
        self._previous = reserve(np.uint32)
        self._codes = reserve(np.uint64)
        self._items = reserve(np.uint32)
        self._distances = np.empty(lists, np.int64)
        self._found = np.empty(4_096, np.int64)
        # Each of the first items begins the list that it is the centre of; chunk 0 means none.
        self._chunks = lists + 1
        self._make_room()
        self._sizes = np.ones(lists, np.uint32)
        self._heads = np.arange(1, lists + 1, dtype=np.uint32)
        self._items[CHUNK : self._chunks * CHUNK : CHUNK] = np.arange(lists)
        codes = self._codes[: self._chunks * CHUNK * self._words]
        codes.reshape(self._chunks, self._words, CHUNK)[1:, :, 0] = self._centres

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        by_chunk = 4 + CHUNK * (4 + 8 * self._words)
        by_list = 4 + 4 + 8 + 8 * self._words
        return self._chunks * by_chunk + len(self._sizes) * by_list

    def add(self, vector: NDArray[np.float32], item: int) -> None:
        """Put the code of a vector (D,) into the list of the nearest centre."""
        self._make_room()
        self._chunks = _insert(
            _codes(vector[None])[0],
            item,
            self._centres,
            self._sizes,
            self._heads,
            self._chunks,
            self._previous,
            self._codes,
            self._items,
        )

    def candidates(self, vector: NDArray[np.float32], floor: float) -> NDArray[np.int64]:
        """Items that may have a cosine above ``floor`` to the vector (D,), the likeliest first."""
        share = math.acos(max(-1.0, min(1.0, floor))) / math.pi
        half = min(self._dimension, 64 * ((self._words + 1) // 2))
        count = _search(
            _codes(vector[None])[0],
            _radius(self._dimension, share, 3.6),
            _radius(half, share, 4.5),
            self._probes,
            self._centres,
            self._distances,
            self._sizes,
            self._heads,
            self._previous,
            self._codes,
            self._items,
            self._found,
        )
        if count > len(self._found):
            self._found = np.empty(2 * count, np.int64)
            return self.candidates(vector, floor)
        return np.sort(self._found[:count]) & 0xFFFFFFFF

    def _make_room(self) -> None:
        """Room for one more chunk."""
        chunks = self._chunks + 1
        self._previous = room(self._previous, chunks)
        self._codes = room(self._codes, chunks * CHUNK * self._words)
        self._items = room(self._items, chunks * CHUNK)


def _radius(bits: int, share: float, deviations: float) -> int:
    """How many of so many bits may differ, when each does with the probability ``share``.

    Binomial, as if the components were independent: 3.6 standard deviations keep 9,998 of 10,000.
    """
    return math.ceil(bits * share + deviations * math.sqrt(bits * share * (1 - share)))


def _codes(vectors: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Signs of the components, (N, D), 64 to a word: (N, W)."""
    n, dimension = vectors.shape
    bits = np.zeros((n, -(-dimension // 64) * 64), np.bool_)
    bits[:, :dimension] = vectors > 0
    return np.packbits(bits, axis=1, bitorder="little").view(np.uint64)


@compiled
def _distance(code: NDArray[np.uint64], codes: NDArray[np.uint64], at: int, stride: int) -> int:
    differ = 0
    for w in range(len(code)):
        differ += signed(popcount(code[w] ^ codes[at + w * stride]))
    return differ


@compiled
def _insert(
    code: NDArray[np.uint64],
    item: int,
    centres: NDArray[np.uint64],
    sizes: NDArray[np.uint32],
    heads: NDArray[np.uint32],
    chunks: int,
    previous: NDArray[np.uint32],
    codes: NDArray[np.uint64],
    items: NDArray[np.uint32],
) -> int:
    """Append to the list with the nearest centre; returns the number of chunks."""
    words = len(code)
    best, least = 0, 64 * words + 1
    for i in range(len(centres)):
        distance = _distance(code, centres[i], 0, 1)
        if distance < least:
            best, least = i, distance
    lane = signed(sizes[best]) % CHUNK
    if lane == 0:
        previous[chunks] = heads[best]
        heads[best] = chunks
        chunks += 1
    slot = signed(heads[best]) * CHUNK + lane
    items[slot] = item
    for w in range(words):
        codes[(slot // CHUNK * words + w) * CHUNK + lane] = code[w]
    sizes[best] += 1
    return chunks


def _prefetch(_typing_context: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of an element that will be read soon."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [address, flag(0), flag(2), flag(1)])  # read, keep for a while, data
        return context.get_dummy_value()

    return numba.types.void(array, index), generate


prefetch = intrinsic(_prefetch)


@compiled
def _search(
    code: NDArray[np.uint64],
    radius: int,
    half_radius: int,
    probes: int,
    centres: NDArray[np.uint64],
    distances: NDArray[np.int64],
    sizes: NDArray[np.uint32],
    heads: NDArray[np.uint32],
    previous: NDArray[np.uint32],
    codes: NDArray[np.uint64],
    items: NDArray[np.uint32],
    found: NDArray[np.int64],
) -> int:
    """Find the items within ``radius`` in the nearest lists; returns how many.

    Fills ``found``, as far as it goes: the distance above the 32 bits of the item. Half of a code
    tells most of those that are too far away: they differ in more than ``half_radius`` bits of it.
    """
    words = len(code)
    half = (words + 1) // 2
    at = np.zeros(64 * words + 1, np.int64)
    for i in range(len(centres)):
        distances[i] = _distance(code, centres[i], 0, 1)
        at[distances[i]] += 1
    # The distance up to which lists are read, and how many of those at just that distance.
    reach, left = 0, probes
    while at[reach] < left:
        left -= at[reach]
        reach += 1

    # Which chunks, in order, so that each can be asked for before it is needed.
    chosen = 0
    for i in range(len(centres)):
        if distances[i] < reach or (distances[i] == reach and left > 0):
            left -= distances[i] == reach
            chosen += (signed(sizes[i]) + CHUNK - 1) // CHUNK
        else:
            distances[i] = NOT_READ
    chunks = np.empty(chosen + AHEAD, np.int64)
    used = np.full(chosen, CHUNK, np.int64)
    n = 0
    for i in range(len(centres)):
        if distances[i] == NOT_READ:
            continue
        used[n] = (signed(sizes[i]) - 1) % CHUNK + 1
        chunk = signed(heads[i])
        while chunk:
            chunks[n] = chunk
            n += 1
            chunk = signed(previous[chunk])
    chunks[chosen:] = 0

    partial = np.empty(CHUNK, np.uint64)
    reachable = word(half_radius)
    count = 0
    for i in range(chosen):
        ahead = chunks[i + AHEAD] * words * CHUNK
        for line in range(0, half * CHUNK, 8):
            prefetch(codes, ahead + line)
        first = chunks[i] * words * CHUNK
        partial[:] = 0
        for w in range(half):
            plane = codes[first + w * CHUNK : first + (w + 1) * CHUNK]
            for lane in range(len(plane)):
                partial[lane] += popcount(code[w] ^ plane[lane])
        if partial.min() > reachable:
            continue
        for lane in range(used[i]):
            if partial[lane] <= reachable:
                distance = _distance(code, codes, first + lane, CHUNK)
                if distance <= radius:
                    if count < len(found):
                        slot = chunks[i] * CHUNK + lane
                        found[count] = (distance << 32) | signed(items[slot])
                    count += 1
    return count
