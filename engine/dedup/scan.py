"""The compiled scan of the ROUGE-L index: some texts with every item, for the nearest and the mean.

Both need every pair, so the pairs must be cheap. ``LANES`` texts are compared with an item at once,
one in each lane of a vector register: a token of the item is looked up once, and its places in all
the texts are one load. numba cannot express that, so the two loops over the lanes are written in
LLVM's own terms (its vectors are compiled for whatever registers the machine has).

Most pairs share next to nothing. Lengths up to ``COUNTED`` are only counted, for each length of
item; F is computed from the counts at the end, and item by item only where a text comes among the
nearest.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from engine.dedup.kernels import LONG, compiled, f_measure, signed

__all__ = ["COUNTED", "LANES", "scan"]

LANES = 16
"""Texts compared with an item at once: the lanes of 32 bits in the widest registers of x86
(AVX-512). A machine with narrower ones takes two or four steps for the same."""
COUNTED = 8
"""Lengths of subsequences that are only counted. Longer ones are rare among random pairs, and each
more would add 16 kB to the table that every comparison updates."""

_I32, _I64 = ir.IntType(32), ir.IntType(64)
"""LLVM's types of a lane and of an index or place."""
_LANES = ir.VectorType(_I32, LANES)
"""The vector that holds a word of 32 tokens of each text."""


def _all_lanes(value: int) -> ir.Constant:
    return ir.Constant(_LANES, [value] * LANES)


_ONES = _all_lanes(0xFFFFFFFF)
"""All bits of all lanes set: where a comparison begins, and what turns zeros into ones to count."""


class _Arrays:
    """The memory of array arguments, as the code generators below address it."""

    def __init__(self, context: Any, builder: Any, types: Any, args: Any) -> None:
        self._context, self._builder, self._types, self._args = context, builder, types, args

    def at(self, argument: int, index: Any) -> Any:
        array = self._context.make_array(self._types[argument])
        data = array(self._context, self._builder, self._args[argument]).data
        return self._builder.gep(data, [index])

    def lanes_at(self, argument: int, index: Any) -> Any:
        return self._builder.bitcast(self.at(argument, index), _LANES.as_pointer())


def _ones_in(builder: Any, lanes: Any) -> Any:
    name = f"llvm.ctpop.v{LANES}i32"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_LANES, [_LANES]), name
    )
    return builder.call(function, [lanes])


def _compare(
    _typing_context: Any,
    tokens: Any,
    start: Any,
    end: Any,
    rows: Any,
    masks: Any,
    counts: Any,
    bounds: Any,
    length: Any,
    lcs: Any,
) -> Any:
    """Texts of at most 32 tokens, one a lane, with the item ``tokens[start:end]``.

    ``masks`` (R, LANES): bit p of a lane says that its text has the token of this row at place p.
    Writes the lengths to ``lcs`` (LANES,), counts them in ``counts`` (LONG + 1, COUNTED, LANES)
    under ``length``, and says whether one is above ``bounds`` (LONG + 1, LANES).
    """
    signature = numba.types.boolean(tokens, start, end, rows, masks, counts, bounds, length, lcs)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = _Arrays(context, builder, signature.args, args)
        entry = builder.block
        head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
        builder.branch(head)

        builder.position_at_end(head)
        place, bits = builder.phi(_I64), builder.phi(_LANES)
        builder.cbranch(builder.icmp_signed("<", place, args[2]), body, done)

        builder.position_at_end(body)
        token = builder.zext(builder.load(arrays.at(0, place)), _I64)
        # A token that no text has leads to row 0, which has no bit set and so changes nothing:
        # cheaper than a branch.
        row = builder.zext(builder.load(arrays.at(3, token)), _I64)
        # numpy aligns to the element. A vector's own alignment, which LLVM would assume, is larger.
        mask = builder.load(arrays.lanes_at(4, builder.mul(row, _I64(LANES))), align=4)
        match = builder.and_(bits, mask)
        # As in ``kernels._lcs``, in all lanes at once; no carry leaves its lane.
        moved = builder.or_(builder.add(bits, match), builder.sub(bits, match))
        place.add_incoming(args[1], entry)
        place.add_incoming(builder.add(place, _I64(1)), body)
        # A zero stands for a token of the subsequence, so a comparison begins with ones alone.
        bits.add_incoming(_ONES, entry)
        bits.add_incoming(moved, body)
        builder.branch(head)

        builder.position_at_end(done)
        found = _ones_in(builder, builder.xor(bits, _ONES))
        builder.store(found, arrays.lanes_at(8, _I64(0)), align=4)
        row = builder.mul(args[7], _I64(COUNTED * LANES))
        for value in range(1, COUNTED + 1):
            count = arrays.lanes_at(5, builder.add(row, _I64((value - 1) * LANES)))
            equal = builder.zext(builder.icmp_unsigned("==", found, _all_lanes(value)), _LANES)
            builder.store(builder.add(builder.load(count, align=4), equal), count, align=4)
        bound = builder.load(arrays.lanes_at(6, builder.mul(args[7], _I64(LANES))), align=4)
        # One bit a lane, read as one number: a single test says whether any text needs a closer
        # look.
        above = builder.bitcast(builder.icmp_unsigned(">", found, bound), ir.IntType(LANES))
        return builder.icmp_unsigned("!=", above, ir.IntType(LANES)(0))

    return signature, generate


def _advance(_typing_context: Any, state: Any, masks: Any, row: Any, words: Any) -> Any:
    """One token of an item against texts of any length: ``words`` words of 32 tokens in each lane.

    ``state`` (words, LANES) moves on by ``masks`` (R, words, LANES) at ``row``.
    """
    signature = numba.types.void(state, masks, row, words)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = _Arrays(context, builder, signature.args, args)
        first = builder.mul(args[2], args[3])
        none = _all_lanes(0)
        carry = cgutils.alloca_once_value(builder, none)
        with cgutils.for_range(builder, args[3]) as loop:
            at = arrays.lanes_at(0, builder.mul(loop.index, _I64(LANES)))
            mask_row = builder.mul(builder.add(first, loop.index), _I64(LANES))
            bits = builder.load(at, align=4)
            match = builder.and_(bits, builder.load(arrays.lanes_at(1, mask_row), align=4))
            before = builder.load(carry)
            total = builder.add(bits, match)
            moved = builder.add(total, before)
            # A sum that wrapped is smaller than what was added; at most one of the two can wrap.
            over = builder.or_(
                builder.icmp_unsigned("<", total, match), builder.icmp_unsigned("<", moved, before)
            )
            builder.store(builder.zext(over, _LANES), carry)
            builder.store(builder.or_(moved, builder.sub(bits, match)), at, align=4)
        return context.get_dummy_value()

    return signature, generate


def _found(_typing_context: Any, state: Any, words: Any, lcs: Any) -> Any:
    """Lengths (LANES,) of the subsequences that ``state`` (words, LANES) has come to."""
    signature = numba.types.void(state, words, lcs)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = _Arrays(context, builder, signature.args, args)
        found = cgutils.alloca_once_value(builder, _all_lanes(0))
        with cgutils.for_range(builder, args[1]) as loop:
            at = arrays.lanes_at(0, builder.mul(loop.index, _I64(LANES)))
            zeros = _ones_in(builder, builder.xor(builder.load(at, align=4), _ONES))
            builder.store(builder.add(builder.load(found), zeros), found)
        builder.store(builder.load(found), arrays.lanes_at(2, _I64(0)), align=4)
        return context.get_dummy_value()

    return signature, generate


compare = intrinsic(_compare)
advance = intrinsic(_advance)
found = intrinsic(_found)


@compiled
def _mark(
    ids: NDArray[np.uint32],
    offsets: NDArray[np.int64],
    known: int,
    rows: NDArray[np.uint32],
    masks: NDArray[np.uint32],
    words: int,
) -> None:
    """Give each token of the texts a row, and note in it where the token stands in each text."""
    used = 0
    for lane in range(len(offsets) - 1):
        for p in range(offsets[lane + 1] - offsets[lane]):
            token = ids[offsets[lane] + p]
            if token >= known:
                continue
            if rows[token] == 0:
                used += 1
                rows[token] = used
            at = (signed(rows[token]) * words + p // 32) * LANES + lane
            masks[at] |= np.uint32(1 << (p % 32))


@compiled
def _add(sums: NDArray[np.int64], lane: int, f: float, times: int) -> None:
    """Add F to an exact sum: F is a multiple of 2**-70 as long as it is above 2**-18."""
    scaled = f * 2.0**35
    # Two integers instead of a float: the sum has the same bits in whatever order and batches the
    # items were added.
    whole = signed(scaled)
    sums[lane, 0] += times * whole
    sums[lane, 1] += times * signed((scaled - whole) * 2.0**35)


@compiled
def _place(f: float, item: int, nearest: NDArray[np.int64], nearest_f: NDArray[np.float64]) -> bool:
    """Put an item among the nearest, behind those of equal F; False where it is not one of them."""
    j = len(nearest) - 1
    # Items come in order, so the one that is there already is the earlier, and stays in front.
    if f <= nearest_f[j]:
        return False
    while j > 0 and f > nearest_f[j - 1]:
        nearest[j] = nearest[j - 1]
        nearest_f[j] = nearest_f[j - 1]
        j -= 1
    nearest[j] = item
    nearest_f[j] = f
    return True


@compiled
def scan(
    ids: NDArray[np.uint32],
    offsets: NDArray[np.int64],
    visible: NDArray[np.int64],
    known: int,
    tokens: NDArray[np.uint32],
    starts: NDArray[np.uint32],
    rows: NDArray[np.uint32],
    masks: NDArray[np.uint32],
    words: int,
    nearest: NDArray[np.int64],
    nearest_f: NDArray[np.float64],
    sums: NDArray[np.int64],
) -> None:
    """The nearest items of each text, best first (ties: the earliest), and the sum of F over all.

    Text q is ``ids[offsets[q]:offsets[q + 1]]``, at most 32 * ``words`` tokens, and sees the first
    ``visible[q]`` items. Fills ``nearest`` and ``nearest_f`` (Q, K), -1 where there are fewer
    items, and ``sums`` (Q, 2): the exact sum in units of 2**-70 is sums[q, 0] * 2**35 + sums[q, 1].
    ``rows`` (V,) is all zeros, and is left so; ``masks`` are zeros for ``_mark`` to fill.
    """
    texts = len(visible)
    k = nearest.shape[1]
    nearest[:] = -1
    nearest_f[:] = -1.0
    sums[:] = 0
    _mark(ids, offsets, known, rows, masks, words)
    counts = np.zeros((LONG + 1) * COUNTED * LANES, np.uint32)
    bounds = np.zeros((LONG + 1) * LANES, np.uint32)
    lcs = np.empty(LANES, np.uint32)
    state = np.empty(words * LANES, np.uint32)
    longest = 0
    # The first K items are among the nearest whatever they share, and the last are not seen by all.
    first, last = k, visible.min()

    for item in range(visible.max()):
        start, end = signed(starts[item]), signed(starts[item + 1])
        n = end - start
        counted = words == 1 and n < LONG and first <= item < last
        if words == 1:
            # An item that must not be counted goes into row LONG, which nobody reads: the compiled
            # comparison counts always, because a branch would cost more than a sum in vain.
            length = n if counted else LONG
            if (
                not compare(tokens, start, end, rows, masks, counts, bounds, length, lcs)
                and counted
            ):
                longest = max(longest, n)
                continue
        else:
            # More than 32 tokens: there are no counts and no bounds, each item is compared in full.
            state[:] = 0xFFFFFFFF
            for p in range(start, end):
                row = signed(rows[tokens[p]])
                if row:
                    advance(state, masks, row, words)
            found(state, words, lcs)
        if counted:
            longest = max(longest, n)
        for q in range(texts):
            if item >= visible[q]:
                continue
            shared = signed(lcs[q])
            if counted and shared <= bounds[n * LANES + q]:
                continue  # it is another text that comes closer
            m = offsets[q + 1] - offsets[q]
            f = f_measure(shared, m, n)
            # Shorter ones are in ``counts`` already, and are added at the end.
            if not (counted and shared <= COUNTED):
                _add(sums, q, f, 1)
            if _place(f, item, nearest[q], nearest_f[q]) and words == 1 and item >= first - 1:
                # What cannot be above the last of the nearest need not come here any more.
                for other in range(LONG):
                    if bounds[other * LANES + q] == COUNTED:
                        break  # as are those of all longer items, since the bound grows with them
                    # F = 2 L / (m + n). Rounded down: a bound too low costs a look, one too high an
                    # item.
                    bound = int(nearest_f[q, k - 1] * (m + other) / 2 - 1e-6)
                    bounds[other * LANES + q] = min(bound, COUNTED)

    for n in range(1, longest + 1):
        for value in range(1, COUNTED + 1):
            for q in range(texts):
                times = signed(counts[(n * COUNTED + value - 1) * LANES + q])
                if times:
                    _add(sums, q, f_measure(value, offsets[q + 1] - offsets[q], n), times)
    # Only what ``_mark`` has set: to clear all rows would cost the vocabulary's size at each call.
    for token in ids:
        if token < known:
            rows[token] = 0
