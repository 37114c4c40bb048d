"""From a text in any language to the bytes that a vocabulary cuts: its tokens with spaces between.

``languages.tokens_of`` says what the tokens are. Unifying and folding a text in Python takes longer
than the search for its near-duplicates, so what each character becomes is looked up in a table, in
compiled code. Some texts cannot be folded character by character (marks that join a letter, ``½``):
the code says so, and they go the long way.
"""

from __future__ import annotations

import unicodedata
from functools import cache

import numpy as np
from numpy.typing import NDArray

from engine.dedup.kernels import compiled, signed
from engine.languages import ENGLISH, folded, stands_alone, tokens_of

__all__ = ["letters_of"]

SEPARATOR, DROPPED, TOGETHER = 0, 0x3FFFFFFE, 0x3FFFFFFF
"""What a character may become beside another one: the end of a token, nothing, or what only its
neighbours tell."""
ALONE = 1 << 30
"""Beside the character: it is a token by itself."""
IN_TABLE, LETTERS = 0x20000, 0x40000
"""Codes in the table, and below which others may be letters: rare Han characters, which go the long
way."""


def letters_of(text: str, language: str) -> bytes:
    """The tokens in UTF-8, apart; bytes other than letters, digits and those above 127 are none."""
    if language == ENGLISH or text.isascii():
        # Lone surrogates are legal in JSON strings, and no part of a token.
        return text.lower().encode("ascii", "replace")
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    letters = np.empty(5 * len(codes), np.uint8)
    size = _spread(codes, _table(), letters)
    if size < 0:
        return " ".join(tokens_of(text, language)).encode()
    return letters[:size].tobytes()


@cache
def _table() -> NDArray[np.uint32]:
    """What each character becomes, by its code."""
    table = np.zeros(IN_TABLE, np.uint32)
    for code in range(len(table)):
        table[code] = _folded(chr(code))
    return table


def _folded(letter: str) -> int:
    text = folded(letter)
    if not text:
        return DROPPED
    if not any(c.isalnum() or unicodedata.category(c) in ("Mn", "Mc") for c in text):
        return SEPARATOR
    if len(text) > 1 or not text.isalnum() or 0x1100 <= ord(text) < 0x1200:  # Hangul's parts join
        return TOGETHER
    return ord(text) | ALONE * stands_alone(text)


@compiled
def _spread(
    codes: NDArray[np.uint32], table: NDArray[np.uint32], letters: NDArray[np.uint8]
) -> int:
    """Write the tokens of ``codes`` to ``letters``; returns the bytes written, or -1 where a
    character cannot be folded by itself. ``letters`` has room for five bytes a character.
    """
    size = 0
    for code in codes:
        if code < len(table):
            folded = signed(table[code])
        elif code < LETTERS:
            return -1
        else:
            folded = SEPARATOR
        if folded == DROPPED:
            continue
        if folded == TOGETHER:
            return -1
        alone = folded >= ALONE
        if (alone or folded == SEPARATOR) and size > 0 and letters[size - 1] != 32:
            letters[size] = 32
            size += 1
        if folded == SEPARATOR:
            continue
        letter = folded & (ALONE - 1)
        if letter < 0x80:
            letters[size] = letter
            size += 1
        elif letter < 0x800:
            letters[size] = 0xC0 | letter >> 6
            letters[size + 1] = 0x80 | letter & 0x3F
            size += 2
        elif letter < 0x10000:
            letters[size] = 0xE0 | letter >> 12
            letters[size + 1] = 0x80 | letter >> 6 & 0x3F
            letters[size + 2] = 0x80 | letter & 0x3F
            size += 3
        else:
            letters[size] = 0xF0 | letter >> 18
            letters[size + 1] = 0x80 | letter >> 12 & 0x3F
            letters[size + 2] = 0x80 | letter >> 6 & 0x3F
            letters[size + 3] = 0x80 | letter & 0x3F
            size += 4
        if alone:
            letters[size] = 32
            size += 1
    return size
