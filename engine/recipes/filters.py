"""Pure checks of one record: a reason to refuse it, or None.

In English they are Stanford Alpaca's own, in its order and on the instruction only
(``post_process_gpt3_response`` in https://github.com/tatsu-lab/stanford_alpaca,
generate_instruction.py), so that the same text is refused for the same cause. In other languages
they mean the same: lengths are counted in characters where words do not stand apart, and an
instruction may begin with any letter. The last check, the same for all, bounds what a comparison
with all other instructions can cost.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from engine.languages import ENGLISH, WORD_LETTER, language_of, measure, stands_alone
from engine.recipes.base import Refusal
from engine.records import Record

__all__ = [
    "ALPACA_FILTERS",
    "BLOCKED_WORDS",
    "FilterSettings",
    "Filters",
    "FirstCharacter",
    "first_refusal",
]

FirstCharacter = Literal["ascii", "letter", "any"]
"""What an instruction may begin with: ASCII but no punctuation; no punctuation but an opening
quote or bracket; anything."""

MIN_WORDS, MAX_WORDS = 4, 150
"""Alpaca's bounds of an instruction; both are still accepted."""
MIN_CHARACTERS, MAX_CHARACTERS = 4, 300
"""Of text without spaces between words; four Chinese characters are a whole instruction."""
MAX_TOKENS = 1_000
"""Of an instruction. Without spaces, a text of 150 words can be of any length, and the time of a
comparison grows with the product of two lengths. Real instructions of 150 words have some 200."""
_TOKEN = re.compile(r"[A-Za-z0-9]{1,32}|[^\sA-Za-z0-9]")
"""About a token of a model's: a stretch of a word, at most 32 letters, or one other sign."""

# Things a text model can neither see nor make.
BLOCKED_WORDS = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps",
    "draw", "plot", "go to", "video", "audio", "music", "flowchart", "diagram",
)  # fmt: skip
BLOCKED: dict[str, tuple[str, ...]] = {
    ENGLISH: BLOCKED_WORDS,
    "zh": (
        "图片", "图像", "图表", "照片", "截图", "插图", "附件", "文件", "地图", "绘制", "绘图",
        "画一", "画出", "视频", "音频", "录音", "音乐", "流程图", "示意图", "思维导图", "点击",
        "圖片", "圖像", "圖表", "地圖", "檔案", "繪製", "影片", "音訊", "音樂", "流程圖",
    ),
}  # fmt: skip
"""By language; those that are not here have none of their own."""
BLOCKED_OPENINGS = {
    ENGLISH: ("Write a program",),
    "zh": ("编写一个程序", "写一个程序", "编写程序", "写一段程序"),
}
"""What models put before existing tasks; it says nothing of the program."""
# Nearly all instructions hold none of these even as a part, and that is seen five times sooner.
_STEMS = tuple(
    w for w in BLOCKED_WORDS if not any(w != o and w.startswith(o) for o in BLOCKED_WORDS)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterSettings:
    """What a person has set; None: as the language has it."""

    min_length: int | None = None
    max_length: int | None = None
    blocked_words: tuple[str, ...] | None = None
    blocked_openings: tuple[str, ...] | None = None
    first_character: FirstCharacter | None = None


@dataclass(frozen=True, slots=True)
class Filters:
    """The checks for records in one language, under a person's settings.

    >>> Filters("zh").refusal({"instruction": "写诗", "input": "", "output": "…"})
    ('too_short', '2 characters')
    """

    language: str = ENGLISH
    settings: FilterSettings = field(default_factory=FilterSettings)
    _checks: tuple[Callable[[Record], Refusal | None], ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        language_of(self.language)
        checks: tuple[Callable[[Record], Refusal | None], ...]
        if self.language == ENGLISH and self.settings == FilterSettings():
            checks = ALPACA_FILTERS
        else:
            checks = (
                self._length,
                _blocked_word(self.blocked_words),
                self._opening,
                self._first_character,
                token_count,
            )
        object.__setattr__(self, "_checks", checks)

    def refusal(self, record: Record) -> Refusal | None:
        """What the first check that objects says."""
        for check in self._checks:
            if refusal := check(record):
                return refusal
        return None

    @property
    def blocked_words(self) -> tuple[str, ...]:
        given = self.settings.blocked_words
        return BLOCKED.get(self.language, ()) if given is None else given

    @property
    def blocked_openings(self) -> tuple[str, ...]:
        given = self.settings.blocked_openings
        return BLOCKED_OPENINGS.get(self.language, ()) if given is None else given

    @property
    def first_character(self) -> FirstCharacter:
        usual: FirstCharacter = "ascii" if self.language == ENGLISH else "letter"
        return self.settings.first_character or usual

    def bounds(self, unit: str) -> tuple[int, int]:
        """The least and the greatest length, in ``words`` or ``characters``."""
        least, most = MIN_WORDS, MAX_WORDS
        if unit == "characters":
            least, most = MIN_CHARACTERS, MAX_CHARACTERS
        given = self.settings
        return (
            least if given.min_length is None else given.min_length,
            most if given.max_length is None else given.max_length,
        )

    def __str__(self) -> str:
        """For the person: what is refused."""
        unit = "words" if language_of(self.language).spaced else "characters"
        least, most = self.bounds(unit)
        first = {"ascii": "ASCII first", "letter": "no punctuation first", "any": "any beginning"}
        return (
            f"{least} to {most} {unit}, {len(self.blocked_words)} blocked words, "
            f"{len(self.blocked_openings)} blocked openings, {first[self.first_character]}"
        )

    def _length(self, record: Record) -> Refusal | None:
        text = record["instruction"]
        length, unit = (len(text.split()), "words")
        if self.language != ENGLISH:
            length, unit = measure(text)
        least, most = self.bounds(unit)
        # Of nothing there is no first character either.
        if length < max(least, 1):
            return "too_short", f"{length} {unit}"
        return ("too_long", f"{length} {unit}") if length > most else None

    def _opening(self, record: Record) -> Refusal | None:
        refused = record["instruction"].startswith(self.blocked_openings)
        return ("write_a_program", "") if refused else None

    def _first_character(self, record: Record) -> Refusal | None:
        rule = self.first_character
        if rule == "ascii":
            return first_character(record)
        first = record["instruction"].lstrip()[0]
        kind = unicodedata.category(first)
        opening = kind in ("Ps", "Pi") or first in "¿¡"
        if rule == "letter" and kind.startswith("P") and not opening:
            return "punctuation_start", first
        return None


def _blocked_word(words: tuple[str, ...]) -> Callable[[Record], Refusal | None]:
    """A check for words that stand by themselves; of scripts without spaces, anywhere."""
    if words == BLOCKED_WORDS:
        return blocked_word
    if not words:
        return lambda _record: None
    longest_first = sorted(words, key=len, reverse=True)
    pattern = re.compile("|".join(map(_standing, longest_first)), re.IGNORECASE)

    def check(record: Record) -> Refusal | None:
        found = pattern.search(record["instruction"])
        return ("blocked_word", found.group().lower()) if found else None

    return check


def _standing(word: str) -> str:
    # Beside a letter of a script without spaces, a word stands by itself.
    before = "" if stands_alone(word[0]) else f"(?<!{WORD_LETTER})"
    after = "" if stands_alone(word[-1]) else f"(?!{WORD_LETTER})"
    return f"{before}{re.escape(word)}{after}"


# -- Alpaca's -------------------------------------------------------------------------------------

_BLOCKED = re.compile(rf"\b({'|'.join(BLOCKED_WORDS)})\b", re.IGNORECASE)
"""Alpaca's search: whole words, whatever their case. "Photograph" has no ``graph``."""


def word_count(record: Record) -> Refusal | None:
    """At most 3 or more than 150 words, split at white space."""
    words = len(record["instruction"].split())
    if words < MIN_WORDS:
        return "too_short", f"{words} words"
    return ("too_long", f"{words} words") if words > MAX_WORDS else None


def blocked_word(record: Record) -> Refusal | None:
    """Asks for something that text cannot be."""
    lower = record["instruction"].lower()
    if lower.isascii() and not any(stem in lower for stem in _STEMS):
        return None
    found = _BLOCKED.search(record["instruction"])
    return ("blocked_word", found.group(1).lower()) if found else None


def write_a_program(record: Record) -> Refusal | None:
    """The model puts these words before existing instructions; they say nothing of the program."""
    return ("write_a_program", "") if record["instruction"].startswith("Write a program") else None


def first_character(record: Record) -> Refusal | None:
    """Starts with ASCII punctuation or outside ASCII. Runs behind ``word_count``: never empty."""
    first = record["instruction"][0]
    if first in string.punctuation:
        return "punctuation_start", first
    return None if first.isascii() else ("not_ascii_start", first)


def token_count(record: Record) -> Refusal | None:
    """More than ``MAX_TOKENS`` tokens: up to 32 letters or digits in a row, or one other visible
    character. So the bound is one on the length as well.
    """
    text = record["instruction"]
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
"""In Alpaca's order, so that the reason of a refusal is the same as there."""


_ALPACA = Filters()
"""With all settings as Alpaca has them."""


def first_refusal(record: Record) -> Refusal | None:
    """What the first of Alpaca's filters that objects says."""
    return _ALPACA.refusal(record)
