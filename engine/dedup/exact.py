"""Exact text: two texts are the same when their normalised forms are.

The first and cheapest stage of the cascade, and the only one besides the embedding that sees a text
without Latin letters or digits: ROUGE-L has no tokens there. Only a 16-byte digest of each text is
kept.
"""

from __future__ import annotations

import hashlib
import unicodedata
from functools import lru_cache

__all__ = ["ExactIndex", "digest", "normalise"]


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
    """Finds the first item with the same normalised text (by 128-bit digests of it)."""

    def __init__(self) -> None:
        self._first: dict[bytes, int] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def find(self, text: str) -> int | None:
        """Id of the first item with this text, or None."""
        return self._first.get(digest(text))

    def add(self, text: str) -> int:
        """Add one text, known or not; returns its id, counted from 0."""
        item = self._size
        self._first.setdefault(digest(text), item)
        self._size += 1
        return item
