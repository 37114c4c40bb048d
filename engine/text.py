"""Text of models and seeds, made harmless to look at."""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["as_word", "counted", "in_money", "nearest", "shorten", "visible"]

_KEPT = "\n\t"
"""Control characters that text may have: they move the cursor where a reader expects it."""


def visible(text: str) -> str:
    """``text`` with every control, bidirectional and other invisible character as a name.

    Terminal codes, right-to-left overrides and zero-width characters could otherwise change what
    the text around them looks like. Line feeds and tabs stay.
    """
    if text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(
        f"⟨U+{ord(char):04X}⟩"
        if unicodedata.category(char)[0] == "C" and char not in _KEPT
        else char
        for char in text
    )


def as_word(value: object) -> str:
    """A path, or another value, as one word of a command that a person may copy."""
    return shlex.quote(str(value))


def counted(count: int, noun: str) -> str:
    """``1 record``, ``2,000 records``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def in_money(cost: float) -> str:
    """``cost`` for a person: with two decimals, or two digits where those would show nothing."""
    return f"{cost:,.2f}" if cost >= 0.1 or not cost else f"{cost:.2g}"


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """For a person who gave a name that is not among the ``known``: the one that looks like it, as
    a question for the end of a message. Where none does, ``otherwise``, or else all there are.
    """
    known = list(known)
    if near := get_close_matches(name, known, n=1):
        return f"did you mean {near[0]!r}?"
    return otherwise or f"there are {', '.join(known) or 'none'}"


def shorten(text: str, most: int) -> str:
    """At most ``most`` characters on one line, visible."""
    line = " ".join(text[: 4 * most].split())
    return visible(line if len(line) <= most else line[: most - 1] + "…")
