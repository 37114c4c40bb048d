"""The compiled inner loops of the ROUGE-L index: insert, and find what passes a threshold.

Plain Python over numpy arrays, compiled by numba at first use and cached on disk from then on: no
build step, and the GIL is free while they run. The price is numba as a dependency and some seconds
at the very first call.

Layout (``RougeIndex`` owns the arrays and makes room before each insert):

* A text is a sequence of token ids, ``tokens[starts[item]:starts[item + 1]]``. Its *signature* is
  56 bits of the bag of its tokens above 8 bits of length.
* A *posting* says that a token is in the prefix of an item; it is the item's id. A token's head is
  0 for none, ``ALONE | item`` where there is one, as for most words, and else the place of the
  first chunk of a chain, newest first. The two slots before a chunk's postings are its size,
  ``capacity << 16 | used``, and the place of the chunk before it (0: none).
* Prefixes hold the rarest tokens of a text, so all texts must agree on what is rare. The order is
  fixed for an *epoch* from the counts at its start, and each epoch has chains of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np
from numba.extending import intrinsic
from numpy.typing import NDArray

from engine.dedup.code_cache import compiled

__all__ = [
    "CHUNK",
    "EPOCHS",
    "LONG",
    "MOST",
    "compiled",
    "f_measure",
    "find",
    "freeze",
    "insert",
    "limits_of",
    "signed",
    "word",
]

LONG = 255
"""What the length in a signature says of all texts of so many tokens or more."""
EPOCHS = 3
"""One from the beginning, and one from each of ``rouge.EPOCH_STARTS`` on."""
CHUNK = 64
"""Postings of the largest chunk."""
FEW = 64
"""Tokens that are sorted fastest by putting each in its place."""
SIZE, BEFORE, FIRST = 0, 1, 2
"""Of a chunk: where its size, the place of the chunk before it and its first posting stand."""
ALONE = 1 << 31
"""The highest bit of a head of 32 says that the rest is an item, and no place in ``postings``. So
both stay below 2**31."""
MOST = ALONE
"""Elements that no array of the index may have more of, since they are numbered in 32 bits: tokens,
postings, items. English instructions come to this at some 170 million."""


def _popcount(_typing_context: Any, _word: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return numba.types.uint64(numba.types.uint64), generate


popcount = intrinsic(_popcount)

# numba takes the type of a mixed expression from its parts, and int64 with uint64 makes a float:
# each crossing is spelt out. (To a type checker these are plain integers.)
signed = cast("Callable[[Any], int]", np.int64)
word = cast("Callable[[Any], int]", np.uint64)


@compiled
def f_measure(lcs: int, m: int, n: int) -> float:
    """As ``rouge.f_measure``: the same operations in the same order, so the same bits."""
    if lcs == 0:
        return 0.0
    precision = lcs / m
    recall = lcs / n
    return 2 * precision * recall / (precision + recall)


@compiled
def least_lcs(m: int, n: int, threshold: float) -> int:
    """The smallest L with F(L, m, n) > threshold; above min(m, n) when there is none."""
    # F = 2 L / (m + n), so L is near this. The exact one is counted up to with ``f_measure``
    # itself, since the last bit decides here as it does in ``find``.
    lcs = max(1, int(threshold * (m + n) / 2) - 1)
    while lcs <= min(m, n) and f_measure(lcs, m, n) <= threshold:
        lcs += 1
    return lcs


@compiled
def least_shared(n: int, threshold: float) -> int:
    """The fewest tokens that a text of n shares with a text that passes; n + 1 when none can pass.

    F falls as the other text grows, so at best the other text is nothing but the shared tokens.
    """
    # F(s, s, n) = 2 s / (s + n); the rest as in ``least_lcs``.
    shared = max(1, int(threshold * n / (2 - threshold)) - 1)
    while shared <= n and f_measure(shared, shared, n) <= threshold:
        shared += 1
    return shared


@compiled
def limits_of(
    m: int, threshold: float, limits: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many tokens of a text of m, and of an item of n, may lack a partner in the other.

    Two arrays (LONG + 1,): -1 where no item of length n passes; at ``LONG`` stands what holds for
    all longer items. ``limits`` (LONG, 2, LONG + 1) keeps those of short texts; zeros at first.
    """
    own, other = limits[m] if m < LONG else np.empty((2, LONG + 1), np.int64)
    # The last number is never 0 once it is filled in, so it tells what was computed before.
    if m < LONG and other[LONG]:
        return own, other
    for n in range(LONG):
        lcs = least_lcs(m, n, threshold)
        passes = n > 0 and lcs <= min(m, n)
        own[n] = m - lcs if passes else -1
        other[n] = n - lcs if passes else -1
    own[LONG] = m - least_shared(m, threshold)
    # Of such an item the length is not known, only that it is long. A bag has fewer bits than this,
    # so no item is ruled out for what it has beyond the text.
    other[LONG] = 64
    return own, other


@compiled
def rarest_first(
    ids: NDArray[np.uint32],
    known: int,
    epoch: int,
    levels: NDArray[np.uint8],
    keys: NDArray[np.int64],
) -> None:
    """Sort the tokens by level, within a level the youngest first. ``token_of`` undoes a key."""
    few = len(ids) <= FEW
    for i in range(len(ids)):
        level = signed(levels[epoch, ids[i]]) if ids[i] < known else 0
        # One integer sorts by both: the level above, and below it the id, inverted because ids grow
        # with time and the youngest token comes first.
        key = (level << 32) | (0xFFFFFFFF - signed(ids[i]))
        if not few:
            keys[i] = key
            continue
        j = i - 1
        while j >= 0 and keys[j] > key:
            keys[j + 1] = keys[j]
            j -= 1
        keys[j + 1] = key
    if not few:
        keys.sort()


@compiled
def token_of(key: int) -> int:
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@compiled
def signature_of(keys: NDArray[np.int64]) -> int:
    """Bits of the bag of tokens, above the length; each repeat of a token has a bit of its own.

    Ids count up with the first occurrence, so the most frequent tokens fall on different bits.
    """
    bits = word(min(len(keys), LONG))
    repeat = 0
    for i in range(len(keys)):
        repeat = repeat + 1 if i > 0 and keys[i] == keys[i - 1] else 0
        # 23 has no factor in common with 56, so that repeats go through all bits before one comes
        # again.
        bits |= word(1) << word(8 + (token_of(keys[i]) + 23 * repeat) % 56)
    return bits


@compiled
def freeze(epoch: int, counts: NDArray[np.uint32], known: int, levels: NDArray[np.uint8]) -> None:
    """Fix the order of an epoch from the tokens' counts so far: four levels an octave."""
    for token in range(known):
        count = signed(counts[token])
        octave = 0
        # From 8 on the three highest bits are kept, 4 to 7 in each octave, so that small changes of
        # a count seldom change the order. 32 bits of count stay below 124, within a byte.
        while count >> octave >= 8:
            octave += 1
        levels[epoch, token] = 4 * octave + (count >> octave)


@compiled
def _push(
    token: int, item: int, heads: NDArray[np.uint32], postings: NDArray[np.uint32], end: int
) -> int:
    """Add a posting of ``token``, whose head is one of ``heads`` (V,); returns the new end."""
    head = signed(heads[token])
    if head == 0:
        heads[token] = ALONE | item
        return end
    # The second item of a token: a chunk begins, and takes over the one that was in the head.
    if head & ALONE:
        size, before = 2 << 16, 0
    else:
        size, before = signed(postings[head + SIZE]), head
    capacity, used = size >> 16, size & 0xFFFF
    if before == 0 or used == capacity:
        # Half as large again each time: most tokens are rare and waste no room, frequent ones need
        # few hops to follow.
        capacity = 2 if before == 0 else min(capacity + (capacity + 1) // 2, CHUNK)
        used = 0
        # The newest chunk is the head, so that adding never walks the chain.
        heads[token] = end
        postings[end + BEFORE] = before
        if before == 0:
            postings[end + FIRST] = head & ~ALONE
            used = 1
        head = end
        end += FIRST + capacity
    postings[head + FIRST + used] = item
    postings[head + SIZE] = capacity << 16 | (used + 1)
    return end


@compiled
def insert(
    ids: NDArray[np.uint32],
    item: int,
    epoch: int,
    threshold: float,
    tokens: NDArray[np.uint32],
    starts: NDArray[np.uint32],
    counts: NDArray[np.uint32],
    levels: NDArray[np.uint8],
    heads: NDArray[np.uint32],
    signatures: NDArray[np.uint64],
    postings: NDArray[np.uint32],
    end: int,
) -> int:
    """Store a text as item ``item`` and add its postings; returns where the postings end."""
    n = len(ids)
    start = signed(starts[item])
    starts[item + 1] = start + n
    for p in range(n):
        tokens[start + p] = ids[p]
        counts[ids[p]] += 1

    keys = np.empty(n, np.int64)
    rarest_first(ids, len(counts), epoch, levels, keys)
    signatures[item] = signature_of(keys)
    # Prefix filtering: two texts that share s tokens or more have in common one of the n - s + 1
    # rarest of each, provided that both order tokens alike. So the frequent ones need no postings.
    for i in range(n - least_shared(n, threshold) + 1):
        if i == 0 or keys[i] != keys[i - 1]:
            end = _push(token_of(keys[i]), item, heads[epoch], postings, end)
    return end


@compiled
def _mark(ids: NDArray[np.uint32], known: int, rows: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Give each token of the text a row, and note in the row (words,) where it stands in the text.

    Row 0 stays empty, for tokens that the text has not. ``rows`` (V,) is all zeros before.
    """
    used = 0
    for token in ids:
        if token < known and rows[token] == 0:
            used += 1
            rows[token] = used
    masks = np.zeros((used + 1, (len(ids) + 63) // 64), np.uint64)
    for p in range(len(ids)):
        if ids[p] < known:
            masks[signed(rows[ids[p]]), p // 64] |= word(1) << word(p % 64)
    return masks


@compiled
def _lcs(
    item: NDArray[np.uint32],
    rows: NDArray[np.uint32],
    masks: NDArray[np.uint64],
    row: NDArray[np.uint64],
) -> int:
    """Length of the longest common subsequence of the marked text and an item.

    Bit-parallel (Hyyrö 2004): a zero at position i of ``row`` says that the i-th token of the text
    ends a longer subsequence, and one addition moves all of them on.
    """
    if len(row) == 1:
        bits = ~word(0)
        for token in item:
            # In each run of ones the addition clears the lowest match and all above it, and fills
            # the zero that ends the run: the zero has moved down to the match. ``bits - match``
            # puts back the ones in between.
            match = bits & masks[signed(rows[token]), 0]
            bits = (bits + match) | (bits - match)
        return signed(popcount(~bits))
    row[:] = ~word(0)
    for token in item:
        r = signed(rows[token])
        if r == 0:
            continue
        carry = word(0)
        for w in range(len(row)):
            match = row[w] & masks[r, w]
            total = row[w] + match
            carried = total + carry
            # A sum that wrapped is smaller than what was added; at most one of the two can wrap.
            carry = word(total < match) | word(carried < carry)
            row[w] = carried | (row[w] - match)
    zeros = 0
    for w in range(len(row)):
        zeros += signed(popcount(~row[w]))
    return zeros


@compiled
def find(
    ids: NDArray[np.uint32],
    known: int,
    epochs: int,
    threshold: float,
    limits: NDArray[np.int64],
    tokens: NDArray[np.uint32],
    starts: NDArray[np.uint32],
    levels: NDArray[np.uint8],
    heads: NDArray[np.uint32],
    signatures: NDArray[np.uint64],
    postings: NDArray[np.uint32],
    rows: NDArray[np.uint32],
    seen: NDArray[np.uint32],
    since: int,
) -> tuple[int, float]:
    """Of the items from ``since`` on the one with the highest F above the threshold (ties: the
    earliest) and its F; -1 for none.

    Two texts that pass share a token among the ``own[LONG] + 1`` rarest of each. ``ids`` from
    ``known`` on are tokens that no item has. ``limits`` is as ``limits_of`` keeps it. ``rows``
    (V,) is all zeros, and is left so. ``seen`` counts the calls, at 0, and says in which one item i
    was compared last, at i + 1: texts over a small vocabulary share hundreds of rare tokens.
    """
    best, best_f = -1, threshold
    m = len(ids)
    if m == 0:
        return best, best_f
    # The number of the call marks what was seen: nothing is cleared but once in 2**32 calls.
    seen[0] += np.uint32(1)
    if seen[0] == 0:
        seen[:] = 0
        seen[0] = 1
    own, other = limits_of(m, threshold, limits)
    keys = np.empty(m, np.int64)
    length_bits = word(0xFF)
    bag = word(0)
    alone = np.empty(1, np.uint32)
    masks = _mark(ids, known, rows)
    row = np.empty(masks.shape[1], np.uint64)
    for epoch in range(epochs):
        rarest_first(ids, known, epoch, levels, keys)
        if epoch == 0:
            # The same in every epoch: equal tokens are neighbours in any order.
            bag = signature_of(keys) & ~length_bits
        # ``own[LONG]`` is the most that this text may lack, whatever the length of the other.
        for i in range(own[LONG] + 1):
            token = token_of(keys[i])
            if token >= known or (i > 0 and keys[i] == keys[i - 1]):
                continue
            place = signed(heads[epoch, token])
            while place:
                if place & ALONE:
                    alone[0] = place & ~ALONE
                    chunk, place = alone, 0
                else:
                    used = signed(postings[place + SIZE]) & 0xFFFF
                    chunk = postings[place + FIRST : place + FIRST + used]
                    place = signed(postings[place + BEFORE])
                if signed(chunk[-1]) < since:
                    break  # newer items come later in a chunk, and newer chunks first
                for posting in chunk:
                    item = signed(posting)
                    signature = signatures[item]
                    n = signed(signature & length_bits)
                    if (
                        item < since
                        # A bit that the other has not is at least one token without a partner.
                        # Tokens that fall on one bit hide each other, so this only ever lets too
                        # many through. It goes before ``seen`` since it ends nearly all, and a
                        # signature is one load.
                        or signed(popcount(bag & ~signature)) > own[n]
                        or signed(popcount(signature & ~bag & ~length_bits)) > other[n]
                        or seen[item + 1] == seen[0]
                    ):
                        continue
                    seen[item + 1] = seen[0]
                    text = tokens[signed(starts[item]) : signed(starts[item + 1])]
                    f = f_measure(_lcs(text, rows, masks, row), m, len(text))
                    # Chains give items out of order, so the earliest of equals is looked for here.
                    # At the beginning ``best`` is -1, so that an F at the threshold does not pass.
                    if f > best_f or (f == best_f and item < best):
                        best, best_f = item, f
    for token in ids:
        if token < known:
            rows[token] = 0
    return best, best_f
