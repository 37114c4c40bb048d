"""Languages: how a text is cut into tokens, what a set of texts is written in, and what follows.

English is cut exactly as Alpaca's ``rouge_score`` cuts it. Every other language is cut by script:
compatible characters are unified (NFKC) and case is folded; a letter of a script without spaces
(Han, Kana, Thai, Lao, Khmer, Burmese) is a token together with the marks on it; elsewhere a run of
letters, marks and digits is one. So digits and Latin words stay whole in any text, and a text that
is all ASCII has the same tokens either way.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Literal, TypeAlias

__all__ = [
    "ENGLISH",
    "LANGUAGES",
    "MIXED",
    "WORD_LETTER",
    "Language",
    "Unit",
    "detect",
    "folded",
    "has_tokens",
    "language_of",
    "measure",
    "opening",
    "spread",
    "stands_alone",
    "tokens_of",
    "unit_of",
]

ENGLISH = "en"
"""The language in which everything is as Alpaca has it; the default of all that takes one."""
MIXED = "mul"
"""Several languages, or one that its script does not tell."""
Unit: TypeAlias = Literal["words", "characters"]
"""What most tokens of a text are."""


@dataclass(frozen=True, slots=True)
class Language:
    """A language by its ISO 639 code.

    Attributes:
        name: in English, as prompts and messages use it.
        script: the script by which ``detect`` knows it; empty: not by its script alone.
        spaced: whether words stand apart, so that lengths are counted in words.
    """

    code: str
    name: str
    script: str = ""
    spaced: bool = True

    @property
    def rouge_threshold(self) -> float:
        """The ROUGE-L F above which instructions are near-duplicates, unless a person sets it.

        Alpaca's 0.7 is one of words. Characters are smaller: of four, as many instructions have,
        three are alike though the two tell apart a poem and a song. One word changed in a sentence
        of nine characters or more is still found.
        """
        return 0.7 if self.spaced else 0.75


LANGUAGES = {
    language.code: language
    for language in (
        Language(ENGLISH, "English"),
        Language("zh", "Chinese", "Han", spaced=False),
        Language("ja", "Japanese", "Kana", spaced=False),
        Language("ko", "Korean", "Hangul"),
        Language("th", "Thai", "Thai", spaced=False),
        Language("lo", "Lao", "Lao", spaced=False),
        Language("km", "Khmer", "Khmer", spaced=False),
        Language("my", "Burmese", "Myanmar", spaced=False),
        Language("ar", "Arabic", "Arabic"),
        Language("hi", "Hindi", "Devanagari"),
        Language("ru", "Russian", "Cyrillic"),
        Language("el", "Greek", "Greek"),
        Language("he", "Hebrew", "Hebrew"),
        Language("am", "Amharic", "Ethiopic"),
        Language("bn", "Bengali", "Bengali"),
        Language("ta", "Tamil", "Tamil"),
        Language("te", "Telugu", "Telugu"),
        Language("ka", "Georgian", "Georgian"),
        Language("hy", "Armenian", "Armenian"),
        Language("fa", "Persian"),
        Language("ur", "Urdu"),
        Language("mr", "Marathi"),
        Language("uk", "Ukrainian"),
        Language("bg", "Bulgarian"),
        Language("cs", "Czech"),
        Language("da", "Danish"),
        Language("de", "German"),
        Language("es", "Spanish"),
        Language("fi", "Finnish"),
        Language("fr", "French"),
        Language("hu", "Hungarian"),
        Language("id", "Indonesian"),
        Language("it", "Italian"),
        Language("nl", "Dutch"),
        Language("no", "Norwegian"),
        Language("pl", "Polish"),
        Language("pt", "Portuguese"),
        Language("ro", "Romanian"),
        Language("sv", "Swedish"),
        Language("sw", "Swahili"),
        Language("tr", "Turkish"),
        Language("vi", "Vietnamese"),
        Language(MIXED, "several languages", spaced=False),
    )
}
"""Languages that have a name here, by code."""


def language_of(code: str) -> Language:
    """Raises ValueError for a code that is not in ``LANGUAGES``."""
    if code not in LANGUAGES:
        known = ", ".join(LANGUAGES)
        raise ValueError(f"{code!r} is no language known here; take auto or one of {known}")
    return LANGUAGES[code]


# -- tokens ---------------------------------------------------------------------------------------

_RANGES = {
    "Han": "\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3105-\u312f\u31a0-\u31bf"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "Kana": "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    "\U0001aff0-\U0001b16f",
    "Thai": "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46",
    "Lao": "\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd\u0ec0-\u0ec6\u0edc-\u0edf",
    "Khmer": "\u1780-\u17b3\u17d7\u17dc",
    "Myanmar": "\u1000-\u102a\u103f\u1050-\u1055\u105a-\u105d\u1061\u1065\u1066\u106e-\u1070"
    "\u1075-\u1081\u108e\ua9e0-\ua9e4\ua9e6-\ua9ef\ua9fa-\ua9fe\uaa60-\uaa76\uaa7a\uaa7e\uaa7f",
    "Hangul": "\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7fb",
    "Arabic": "\u0620-\u065f\u066e-\u06d3\u06d5-\u06dc\u06fa-\u06ff\u0750-\u077f\u08a0-\u08ff",
    "Devanagari": "\u0900-\u0963\u0971-\u097f",
    "Cyrillic": "\u0400-\u0481\u048a-\u052f",
    "Greek": "\u0370-\u0373\u0376-\u03ff\u1f00-\u1fff",
    "Hebrew": "\u05d0-\u05ea\u05b0-\u05c7",
    "Ethiopic": "\u1200-\u135a\u1380-\u138f",
    "Bengali": "\u0980-\u09e3",
    "Tamil": "\u0b80-\u0bd7",
    "Telugu": "\u0c00-\u0c63",
    "Georgian": "\u10a0-\u10ff",
    "Armenian": "\u0531-\u0587",
}
"""Letters of scripts, as the inside of a class of a regular expression; with places between them
that are no letters yet."""
UNSPACED = ("Han", "Kana", "Thai", "Lao", "Khmer", "Myanmar")
"""Scripts without spaces between words, in which each letter is a token. Hangul has spaces."""
_ALONE = "".join(_RANGES[script] for script in UNSPACED)
"""All their letters, as the inside of a class of a regular expression."""
WORD_LETTER = rf"[^\W_{_ALONE}]"
"""A regular expression for a letter or digit that is part of a word."""
# They join letters or steer how text is shown, and are no part of what it says.
_UNSEEN = dict.fromkeys(map(ord, "\u00ad\u061c\u200c\u200d\u200e\u200f\u2060\ufeff"))


@cache
def _marks() -> str:
    """Marks that stand on a letter, as the inside of a class: no variation selectors and no
    enclosing marks, which turn what they follow into a picture of it.
    """
    ranges: list[list[int]] = []
    for code in range(0x300, 0x1F000):
        if unicodedata.category(chr(code)) not in ("Mn", "Mc"):
            continue
        if "VARIATION SELECTOR" not in unicodedata.name(chr(code), ""):
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


@cache
def _token() -> re.Pattern[str]:
    marks = _marks()
    return re.compile(rf"(?!\W)[{_ALONE}][{marks}]*+|{WORD_LETTER}(?:{WORD_LETTER}|[{marks}])*+")


def tokens_of(text: str, language: str) -> list[str]:
    """The tokens of a text, in their order."""
    if language == ENGLISH or text.isascii():
        return _ALPACA_TOKEN.findall(text.lower())
    return _token().findall(folded(text))


def has_tokens(text: str, language: str) -> bool:
    """Whether a text has any token; without making all of them."""
    if language == ENGLISH:
        return _ALPACA_TOKEN.search(text.lower()) is not None
    return _LETTER.search(text) is not None or bool(tokens_of(text, language))


def folded(text: str) -> str:
    """The text as it is cut outside English: compatible characters unified, without case."""
    text = unicodedata.normalize("NFKC", text.translate(_UNSEEN)).casefold()
    return unicodedata.normalize("NFKC", text)


def stands_alone(letter: str) -> bool:
    """Whether a folded character is of a script without spaces."""
    return _LETTER_ALONE.match(letter) is not None


def spread(text: str) -> str:
    """The text with spaces around letters of scripts without them, for what searches by words."""
    return text if text.isascii() else _LETTER_ALONE.sub(r" \g<0> ", text)


def opening(text: str, words: int) -> str:
    """The first words of a text; where they do not stand apart, twice as many characters."""
    if measure(text)[1] == "characters":
        return "".join(text.split())[: 2 * words]
    return " ".join(text.split()[:words]).lower()


def measure(text: str) -> tuple[int, str]:
    """The length of a text and its unit: characters where most of it is written without spaces,
    else words.
    """
    alone = len(_LETTER_ALONE.findall(text))
    words = len(text.split())
    if alone > words:
        return sum(not letter.isspace() for letter in text), "characters"
    return words, "words"


def unit_of(text: str) -> tuple[bool, Unit]:
    """How a text is cut by itself: whether at least half of its words and characters are of Latin
    letters, and of which unit most others are.
    """
    if text.isascii():
        return True, "words"
    tokens = [token for token in _token().findall(text) if token[0].isalpha()]
    others = [token for token in tokens if not _LATIN_WORD.match(token)]
    if 2 * len(others) <= len(tokens):
        return True, "words"
    alone = sum(map(stands_alone, others))
    return False, "characters" if 2 * alone >= len(others) else "words"


# -- detection ------------------------------------------------------------------------------------

LOOKED_AT = 2_000
"""Texts that ``detect`` looks at, and characters of each."""
CHARACTERS_A_WORD = 2
"""Of a script without spaces, for a fair share beside words."""
OTHER_SCRIPTS = 0.1
"""Of the words; above it, a set that is mostly Latin is not taken for English."""
OTHER_LETTERS = 0.05
"""Of the Latin words with a letter that English lacks, likewise: about 8 % of German and Spanish
words have one, 15 % of French, hardly any of English."""


def detect(texts: Iterable[str]) -> str:
    """The code of the language that texts are written in, as far as their scripts tell it.

    Latin letters alone are taken for English unless a fair share of the words has others.
    """
    counts: Counter[str] = Counter()
    accented = 0
    for text in islice(texts, LOOKED_AT):
        part = unicodedata.normalize("NFKC", text[:LOOKED_AT])
        latin = _LATIN_WORD.findall(part)
        counts["Latin"] += len(latin)
        if part.isascii():
            continue
        accented += sum(not word.isascii() for word in latin)
        for script in _RANGES:
            found = len(_script(script).findall(part))
            counts[script] += found // CHARACTERS_A_WORD if script in UNSPACED else found
    if counts["Kana"] > 0.1 * counts["Han"]:  # Japanese is written in both
        counts["Kana"] += counts.pop("Han")
    total = counts.total()
    if not total:
        return ENGLISH
    script, count = counts.most_common(1)[0]
    if script == "Latin":
        foreign = accented > OTHER_LETTERS * count or total - count > OTHER_SCRIPTS * total
        return MIXED if foreign else ENGLISH
    return _OF_SCRIPT[script] if count > total / 2 else MIXED


_ALPACA_TOKEN = re.compile("[a-z0-9]+")
"""As in ``rouge_score``, on the text in lower case: "It's 5%" has ``it``, ``s`` and ``5``."""
_LETTER = re.compile(r"[^\W_]")
"""A letter or digit of any script, where only its presence is asked for."""
_LETTER_ALONE = re.compile(rf"(?!\W)[{_ALONE}]")
"""A letter that is a token by itself, as 猫. Marks and signs of these scripts are none."""
_LATIN_WORD = re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+")
"""A run of Latin letters with their accents: ``naïve`` is one."""
_OF_SCRIPT = {language.script: code for code, language in LANGUAGES.items() if language.script}
"""The language that a script stands for where one language uses it almost alone."""


@cache
def _script(name: str) -> re.Pattern[str]:
    return re.compile(f"[{_RANGES[name]}]" + ("" if name in UNSPACED else "+"))
