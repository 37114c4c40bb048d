"""Text of models and seeds, made harmless to look at."""

from __future__ import annotations

import unicodedata

__all__ = ["counted", "shorten", "visible"]

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


def counted(count: int, noun: str) -> str:
    """``1 record``, ``2,000 records``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shorten(text: str, most: int) -> str:
    """At most ``most`` characters on one line, visible."""
    line = " ".join(text[: 4 * most].split())
    return visible(line if len(line) <= most else line[: most - 1] + "…")
