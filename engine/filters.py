"""Pure checks of one record: a reason to refuse it, or None.

All but the last are Stanford Alpaca's own, in its order and on the instruction only
(``post_process_gpt3_response`` in https://github.com/tatsu-lab/stanford_alpaca,
generate_instruction.py), so that the same text is refused for the same cause. The last one bounds
what a comparison with all other instructions can cost.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from itertools import islice

from engine.records import Record

__all__ = ["ALPACA_FILTERS", "BLOCKED_WORDS", "Refusal", "first_refusal"]

Refusal = tuple[str, str]
"""(reason, detail): the reason is a stable name, the detail is for the person."""

MIN_WORDS, MAX_WORDS = 4, 150
MAX_TOKENS = 1_000
"""Of an instruction. Without spaces, a text of 150 words can be of any length, and the time of a
comparison grows with the product of two lengths. Real instructions of 150 words have some 200."""
_TOKEN = re.compile(r"[A-Za-z0-9]{1,32}|[^\sA-Za-z0-9]")

# Things a text model can neither see nor make.
BLOCKED_WORDS = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps",
    "draw", "plot", "go to", "video", "audio", "music", "flowchart", "diagram",
)  # fmt: skip
_BLOCKED = re.compile(rf"\b({'|'.join(BLOCKED_WORDS)})\b", re.IGNORECASE)
# Nearly all instructions hold none of these even as a part, and that is seen five times sooner.
_STEMS = tuple(
    w for w in BLOCKED_WORDS if not any(w != o and w.startswith(o) for o in BLOCKED_WORDS)
)


def word_count(record: Record) -> Refusal | None:
    """At most 3 or more than 150 words, split at white space."""
    words = len(record.instruction.split())
    if words < MIN_WORDS:
        return "too_short", f"{words} words"
    return ("too_long", f"{words} words") if words > MAX_WORDS else None


def blocked_word(record: Record) -> Refusal | None:
    """Asks for something that text cannot be."""
    lower = record.instruction.lower()
    if lower.isascii() and not any(stem in lower for stem in _STEMS):
        return None
    found = _BLOCKED.search(record.instruction)
    return ("blocked_word", found.group(1).lower()) if found else None


def write_a_program(record: Record) -> Refusal | None:
    """The model puts these words before existing instructions; they say nothing of the program."""
    return ("write_a_program", "") if record.instruction.startswith("Write a program") else None


def first_character(record: Record) -> Refusal | None:
    """Starts with ASCII punctuation or outside ASCII. Runs behind ``word_count``: never empty."""
    first = record.instruction[0]
    if first in string.punctuation:
        return "punctuation_start", first
    return None if first.isascii() else ("not_ascii_start", first)


def token_count(record: Record) -> Refusal | None:
    """More than ``MAX_TOKENS`` tokens: up to 32 letters or digits in a row, or one other visible
    character. So the bound is one on the length as well.
    """
    text = record.instruction
    if len(text) <= MAX_TOKENS:
        return None
    more = next(islice(_TOKEN.finditer(text), MAX_TOKENS, None), None)
    return ("too_many_tokens", f"more than {MAX_TOKENS:,} tokens") if more else None


ALPACA_FILTERS: tuple[Callable[[Record], Refusal | None], ...] = (
    word_count,
    blocked_word,
    write_a_program,
    first_character,
    token_count,
)


def first_refusal(record: Record) -> Refusal | None:
    """What the first filter that objects says."""
    for check in ALPACA_FILTERS:
        if refusal := check(record):
            return refusal
    return None
