"""Whether arrays from a file can be a ROUGE-L index, since compiled code trusts its numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from engine.dedup.kernels import ALONE, BEFORE, CHUNK, EPOCHS, FIRST, MOST, SIZE, compiled, signed
from engine.dedup.memory import Part, check_ends

__all__ = ["check"]


def check(arrays: Mapping[str, Part], items: int, known: int, epochs: int) -> None:
    """Raises ValueError where the arrays are not those of so many items and different tokens, and a
    number in them leads out of one, or for ever around. ``kernels`` says how they lie.
    """
    tokens, postings, heads = arrays["tokens"], arrays["postings"], arrays["heads"]
    check_ends(arrays["starts"].used, tokens.size)
    sizes = {name: arrays[name].size for name in ("starts", "counts", "levels", "heads")}
    if (
        sizes
        != {"starts": items + 1, "counts": known, "levels": epochs * known}
        | {"heads": epochs * known}
        or not 1 <= epochs <= EPOCHS
        or max(tokens.size, postings.size, known, items + 1) > MOST
    ):
        raise ValueError("its arrays are not of one size")
    if tokens.size and int(tokens.used.max()) >= known:
        raise ValueError("a text has tokens that there are not")
    begins = np.zeros(postings.size, np.bool_)
    if not _chained(postings.used, items, begins) or not _headed(heads.used, items, begins):
        raise ValueError("its postings are not in order")


@compiled
def _chained(postings: NDArray[np.uint32], items: int, begins: NDArray[np.bool_]) -> bool:
    """Whether postings from 1 on are nothing but chunks of items, each with one before it or none.
    Notes where chunks begin.
    """
    place = 1
    while place < len(postings):
        if place + FIRST > len(postings):
            return False
        size, before = signed(postings[place + SIZE]), signed(postings[place + BEFORE])
        capacity, used = size >> 16, size & 0xFFFF
        following = place + FIRST + capacity
        if used > capacity or capacity > CHUNK or following > len(postings):
            return False
        # Earlier ones only, so that every chain has an end.
        if before >= place or (before and not begins[before]):
            return False
        for posting in postings[place + FIRST : place + FIRST + used]:
            if posting >= items:
                return False
        begins[place] = True
        place = following
    return len(postings) > 0


@compiled
def _headed(heads: NDArray[np.uint32], items: int, begins: NDArray[np.bool_]) -> bool:
    """Whether each token has no head, an item, or a chunk."""
    for word in heads:
        head = signed(word)
        if head & ALONE:
            if head & ~ALONE >= items:
                return False
        elif head >= len(begins) or (head and not begins[head]):
            return False
    return True
