"""From a text to numbers of its tokens, compiled: cut, hash, look up.

Python's own ``dict`` of strings would be simpler, and was: it takes 80 to 100 bytes a token where
this takes about 20, and whoever adds the word that makes it double waits for 5 ms. A linear hash
table (Litwin 1980) grows by one bucket a word instead.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.dedup.kernels import compiled, signed, word
from engine.dedup.memory import Part, check_ends, full, reserve, room
from engine.dedup.scripts import letters_of
from engine.languages import ENGLISH

__all__ = ["Vocabulary", "cut"]


MOST_LETTERS = (1 << 32) - 1
"""Bytes that all different tokens may have together: 32 bits say where each ends."""
Table = tuple[
    int, int, NDArray[np.uint8], NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32]
]
"""Seed, number of tokens, letters, ends, buckets and links."""


class Vocabulary:
    """Tokens of a language (``languages.tokens_of``), numbered as they come."""

    def __init__(self, language: str = ENGLISH) -> None:
        self.language = language
        self.size = 0
        # Token i is letters[ends[i]:ends[i + 1]]. Buckets and links hold i + 1; 0 ends a chain.
        self._letters = reserve(np.uint8)
        self._ends = reserve(np.uint32)
        self._buckets = reserve(np.uint32)
        self._links = reserve(np.uint32)
        self._seed = random.getrandbits(63)  # nobody can choose words that share a bucket

    def __len__(self) -> int:
        return self.size

    def letters(self, text: str) -> bytes:
        """What ``cut`` looks for tokens in."""
        return letters_of(text, self.language)

    def ids(self, text: str, learn: bool = False) -> NDArray[np.uint32]:
        """The numbers (n,) of the tokens of a text. New ones are kept only if ``learn``; else they
        get the numbers from ``len(self)`` on for this once.
        """
        data = np.frombuffer(self.letters(text), np.uint8)
        ids = np.empty((len(data) + 1) // 2, np.uint32)
        count, self.size = cut(data, learn, *self.table(len(data)), ids)
        return ids[:count]

    def table(self, nbytes: int) -> Table:
        """What ``cut`` needs of this, with room for the tokens of a text of ``nbytes``. Raises
        ConfigError where their places would not fit into 32 bits.
        """
        letters = int(self._ends[self.size]) + nbytes
        if letters > MOST_LETTERS:
            raise full(f"{self.size:,} different words")
        self._letters = room(self._letters, letters, letters - nbytes)
        if (size := self.size + (nbytes + 1) // 2 + 1) > len(self._links):
            self._ends = room(self._ends, size)
            self._buckets = room(self._buckets, size)
            self._links = room(self._links, size)
        return self._seed, self.size, self._letters, self._ends, self._buckets, self._links

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The tokens as flat arrays, which stay as they are while others are added."""
        ends = self._ends[: self.size + 1]
        return {"letters": self._letters[: int(ends[-1])], "ends": ends}

    def take(self, letters: Part, ends: Part) -> None:
        """Hold the tokens of such arrays instead. Raises ValueError where they cannot be tokens."""
        check_ends(ends.used, letters.size)
        size = ends.size - 1
        self._letters = letters.array
        self._ends = room(ends.array, size + 2)
        # As long as each other: ``table`` looks at the links alone.
        nbytes = self._ends.nbytes
        self._buckets, self._links = reserve(np.uint32, 0, nbytes), reserve(np.uint32, 0, nbytes)
        _lay(size, self._seed, self._letters, self._ends, self._buckets, self._links)
        self.size = size

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        by_token = self._ends.itemsize + self._buckets.itemsize + self._links.itemsize
        return int(self._ends[self.size]) + self.size * by_token


@compiled
def _in_token(letter: int) -> bool:
    # a-z, 0-9, and the bytes of UTF-8 for whatever else is part of a token.
    return 97 <= letter <= 122 or 48 <= letter <= 57 or letter >= 128


@compiled
def _hash(letters: NDArray[np.uint8], start: int, end: int, seed: int) -> int:
    """FNV-1a from a secret start, its high half folded into the low one."""
    mixed = word(seed)
    for p in range(start, end):
        mixed = (mixed ^ word(letters[p])) * word(0x100000001B3)
    return signed((mixed ^ (mixed >> word(32))) & word(0x7FFFFFFF))


@compiled
def _full(count: int) -> int:
    """The largest power of two among ``count`` buckets."""
    full = 1
    while 2 * full <= count:
        full *= 2
    return full


@compiled
def _bucket(hashed: int, count: int, full: int) -> int:
    """Of ``count`` buckets, the largest power of two among them being ``full``."""
    bucket = hashed & (2 * full - 1)
    return bucket if bucket < count else hashed & (full - 1)


@compiled
def _split(
    count: int,
    full: int,
    seed: int,
    letters: NDArray[np.uint8],
    ends: NDArray[np.uint32],
    buckets: NDArray[np.uint32],
    links: NDArray[np.uint32],
) -> None:
    """Add bucket number ``count``: it takes its own out of the one that held them so far."""
    token = signed(buckets[count - full])
    buckets[count - full] = 0
    while token:
        following = signed(links[token - 1])
        hashed = _hash(letters, signed(ends[token - 1]), signed(ends[token]), seed)
        bucket = _bucket(hashed, count + 1, full)
        links[token - 1] = buckets[bucket]
        buckets[bucket] = token
        token = following


@compiled
def _lay(
    size: int,
    seed: int,
    letters: NDArray[np.uint8],
    ends: NDArray[np.uint32],
    buckets: NDArray[np.uint32],
    links: NDArray[np.uint32],
) -> None:
    """Fill an empty table of as many buckets as there are tokens with all of them."""
    count = max(1, size)
    full = _full(count)
    for token in range(size):
        hashed = _hash(letters, signed(ends[token]), signed(ends[token + 1]), seed)
        bucket = _bucket(hashed, count, full)
        links[token] = buckets[bucket]
        buckets[bucket] = token + 1


@compiled
def cut(
    data: NDArray[np.uint8],
    learn: bool,
    seed: int,
    known: int,
    letters: NDArray[np.uint8],
    ends: NDArray[np.uint32],
    buckets: NDArray[np.uint32],
    links: NDArray[np.uint32],
    ids: NDArray[np.uint32],
) -> tuple[int, int]:
    """Fill ``ids`` with the tokens of ``data``; returns how many, and the size from now on.

    New tokens enter the table in any case, so that one that comes twice is one; unless ``learn``,
    they leave it again, the last first, as each stands at the head of its chain.
    """
    size = known
    count = max(1, size)
    full = _full(count)
    found = 0
    p = 0
    while p < len(data):
        start = p
        while p < len(data) and _in_token(data[p]):
            p += 1
        if p == start:
            p += 1
            continue
        hashed = _hash(data, start, p, seed)
        token = signed(buckets[_bucket(hashed, count, full)])
        while token and not _same(data, start, p, letters, ends, token):
            token = signed(links[token - 1])
        if not token:
            if learn and size >= count:
                _split(count, full, seed, letters, ends, buckets, links)
                count += 1
                if count == 2 * full:
                    full = count
            end = signed(ends[size])
            for i in range(p - start):
                letters[end + i] = data[start + i]
            ends[size + 1] = end + p - start
            bucket = _bucket(hashed, count, full)
            links[size] = buckets[bucket]
            size += 1
            buckets[bucket] = token = size
        ids[found] = token - 1
        found += 1
    if learn:
        return found, size
    while size > known:
        hashed = _hash(letters, signed(ends[size - 1]), signed(ends[size]), seed)
        size -= 1
        buckets[_bucket(hashed, count, full)] = links[size]
    return found, known


@compiled
def _same(
    data: NDArray[np.uint8],
    start: int,
    end: int,
    letters: NDArray[np.uint8],
    ends: NDArray[np.uint32],
    token: int,
) -> bool:
    first = signed(ends[token - 1])
    if signed(ends[token]) - first != end - start:
        return False
    for i in range(end - start):
        if letters[first + i] != data[start + i]:
            return False
    return True
