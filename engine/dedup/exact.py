"""Exact text: two texts are the same when their normalised forms are.

The first and cheapest stage of the cascade, and the only one besides the embedding that sees a text
without Latin letters or digits: ROUGE-L has no tokens there. Only a 16-byte digest of each text is
kept.
"""

from __future__ import annotations

import hashlib
import random
import struct
import unicodedata
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.dedup.memory import Part, reserve, room

__all__ = ["ExactIndex", "digest", "normalise"]

SPARE = 256
"""Slots past the last of the table, for those that find theirs taken. While half of the slots are
free, a run of so many that are taken has a chance of one in 10**21."""
_PAIR = struct.Struct("=QQ")
_WORD = (1 << 64) - 1


def normalise(text: str) -> str:
    """The text with compatible characters unified (NFKC), case folded and whitespace collapsed.

    Case folding can undo the composition (it decomposes ``ǰ``), so the form is composed once more
    after it.
    """
    if text.isascii():
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


@lru_cache(maxsize=1024)  # a text that is not found may be added soon
def digest(text: str) -> bytes:
    """16 bytes of the normalised text."""
    # Lone surrogates are legal in JSON strings, and must not stop a run.
    return hashlib.blake2b(
        normalise(text).encode("utf-8", "surrogatepass"), digest_size=16
    ).digest()


class ExactIndex:
    """Finds the first item with the same normalised text (by 128-bit digests of it).

    The digests lie in one array, and a hash table of item numbers says where to look: 24 to 32
    bytes an item, where a ``dict`` takes some 170.
    """

    def __init__(self) -> None:
        self._size = 0
        self._digests = reserve(np.uint64)
        self._in_digests = self._digests.data
        # Nobody can choose texts that share a slot, since this is secret.
        self._odd = random.getrandbits(64) | 1
        self._firsts = 0
        self._lay(np.empty(0, np.uint32), 1 << 10)

    def __len__(self) -> int:
        return self._size

    def find(self, text: str) -> int | None:
        """Id of the first item with this text, or None."""
        item = self._table[self._slot(*_PAIR.unpack(digest(text)))]
        return item - 1 if item else None

    def add(self, text: str) -> int:
        """Add one text, known or not; returns its id, counted from 0."""
        item = self._size
        low, high = _PAIR.unpack(digest(text))
        self._make_room(item + 1)
        self._in_digests[2 * item], self._in_digests[2 * item + 1] = low, high
        self._size += 1
        slot = self._slot(low, high)
        if not self._table[slot]:
            self._table[slot] = item + 1
            self._firsts += 1
            if 2 * self._firsts > self._slots or slot >= len(self._table) - 2:
                self._lay(self._in_table[self._in_table > 0], 2 * self._slots)
        return item

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return self._size * 16 + self._in_table.nbytes

    def _slot(self, low: int, high: int) -> int:
        """Where the digest is in the table, or would be: the slot there is 0 then."""
        table, digests = self._table, self._in_digests
        slot = ((low ^ high) * self._odd & _WORD) >> self._shift
        while item := table[slot]:
            if digests[2 * item - 2] == low and digests[2 * item - 1] == high:
                break
            slot += 1
        return slot

    def _lay(self, numbers: NDArray[np.uint32], slots: int) -> None:
        """Make the table anew, a power of two of ``slots``, for the items of ``numbers`` (each one
        more than the item), of which no two have the same digest.

        A slot that is taken leads to the next one; past the last there are ``SPARE`` more.
        """
        pairs = self._digests[: 2 * self._size].reshape(-1, 2)
        while True:
            shift = 64 - (slots.bit_length() - 1)
            mixed = np.bitwise_xor(*pairs[numbers.astype(np.int64) - 1].T)
            wanted = ((mixed * np.uint64(self._odd)) >> np.uint64(shift)).astype(np.int64)
            order = np.argsort(wanted, kind="stable")
            # Each takes its own slot, or the one after its predecessor's.
            place = np.arange(len(order))
            taken = np.maximum.accumulate(wanted[order] - place) + place
            if (taken - wanted[order]).max(initial=0) < SPARE - 2:
                break
            if slots > 64 * max(len(numbers), 1 << 10):
                raise ValueError("two items have the same digest")
            slots *= 2
        self._slots, self._shift = slots, shift
        self._in_table = np.zeros(slots + SPARE, np.uint32)
        self._in_table[taken] = numbers[order]
        self._table = self._in_table.data

    def _make_room(self, items: int) -> None:
        if 2 * items > len(self._digests):
            self._digests = room(self._digests, 2 * items, 2 * self._size)
            self._in_digests = self._digests.data

    def digests(self) -> NDArray[np.uint64]:
        """Two words for each item. They stay as they are while others are added."""
        return self._digests[: 2 * self._size]

    def take(self, digests: Part) -> None:
        """Hold items by their digests instead: those here now, and behind them others, of which no
        text is the same as another's. Raises ValueError where these are not the first.
        """
        if digests.size % 2 or not np.array_equal(digests.used[: 2 * self._size], self.digests()):
            raise ValueError("other digests come first")
        more = np.arange(self._size + 1, digests.size // 2 + 1, dtype=np.uint32)
        numbers = np.concatenate([self._in_table[self._in_table > 0], more])
        self._size, self._firsts = digests.size // 2, len(numbers)
        self._digests = digests.array
        self._in_digests = self._digests.data
        slots = self._slots
        while slots < 2 * self._firsts:
            slots *= 2
        self._lay(numbers, slots)
