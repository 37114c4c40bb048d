r"""Reason: a question in; several traces, and of them the one whose final answer the most agree on.

Each input row has a ``question`` (or ``problem``, ``instruction``, ``prompt``), and may have an
``answer`` that is known to be right. A trace ends in ``\boxed{…}``, whose content is its answer.
``--set keep=`` says what becomes of the traces of a question:

* ``majority``: the first trace with the answer that more of them have than any other;
* ``verified``: the first trace whose answer is right; the question is refused where none is;
* ``all``: every trace is a row, with its verdict.

``--set verifier=`` says what is right: ``match``, the known answer but for how it is written;
``math-verify``, Math-Verify's word (an optional package); or ``FILE.py:FUNCTION``, called with the
input row, the final answer and the whole text. The last two run in a process that is killed after
``limit_s`` seconds; then there is no verdict. Rows say ``verified`` (null: nobody knows) and why in
``verdict``. Verdicts are part of a decision: they stay as they are while a run goes on, and
``woolmill redecide`` verifies again.

After self-consistency (Wang et al., arXiv 2203.11171) as Open-R1 and OpenThoughts make their data:
https://github.com/huggingface/open-r1, Apache-2.0, commit 1416fa0, scripts/generate_reasoning.py
(four traces, temperature 0.6, top_p 0.95, 8,192 tokens, Math-Verify);
https://github.com/open-thoughts/open-thoughts, Apache-2.0, commit e3ad6c9.

Departures from them:

* The prompt is in our own words.
* A trace that failed or was cut by the token limit costs that trace alone; Open-R1 drops the row.
* Code is run and models are asked as judges by nobody here: that is the user's function, and
  ``judge``.
* A tie of answers is no majority, and refuses the question.
* Answers vote by how they read after blanks, dollar signs and the like are taken off; Math-Verify
  is asked about the known answer alone.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from engine.errors import ConfigError
from engine.recipes.base import CUT, Ask, Part, Piece, Recipe, Refusal
from engine.recipes.guard import RecipeFault
from engine.recipes.respond import input_of, question_of
from engine.recipes.template_file import Option
from engine.recipes.verifier import MATH_VERIFY, Verdict, Verifier
from engine.records import Completion, Record

__all__ = ["CLOSING", "Reason", "boxed", "normalised"]

CLOSING = r"Think step by step. Then end with the final answer alone, written as \boxed{...}."
"""The last line of each question. The answer is looked for in the box that it asks for."""
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 8192}
"""DeepSeek's advice for its R1 models; at temperature 0 they repeat themselves, and all traces
would be one."""
SAMPLES = 4
"""Traces of each question unless ``--set samples=`` says otherwise."""
MATCH = "match"
"""The verifier that compares with the known answer, both normalised; the default."""
KEEP = ("majority", "verified", "all")
"""What may become of a question's traces; the head of this file says what each means."""
LIMIT_S = 10.0
"""How long one verdict may take. Math-Verify needs milliseconds, save for an answer that sends its
algebra astray."""
MOST_ANSWER = 2_000
"""Characters of a final answer; what is longer is none."""


class Reason(Recipe):
    """See the head of this file.

    Args:
        samples: traces for each question, where ``--samples`` does not say.
        keep: which of them become rows.
        verifier: what says whether an answer is right.
        limit_s: for one verdict of a verifier that is code.
        closing: what the question is followed by; empty: nothing.

    Raises ConfigError for a verifier that cannot be had.
    """

    name = "reason"
    fields = (
        *("question", "output", "reasoning", "answer", "expected"),
        *("verified", "verdict", "votes", "samples"),
    )
    needs_rows = True
    builtin = True
    OPTIONS: ClassVar[Mapping[str, Any]] = {
        "samples": SAMPLES,
        "keep": Option(default="majority", choices=KEEP),
        "verifier": MATCH,
        "limit_s": LIMIT_S,
        "closing": CLOSING,
    }

    def __init__(
        self,
        *,
        samples: int = SAMPLES,
        keep: str = "majority",
        verifier: str = MATCH,
        limit_s: float = LIMIT_S,
        closing: str = CLOSING,
    ) -> None:
        if not 1 <= samples <= 1000:
            raise ConfigError(f"--set samples={samples}: write a number from 1 to 1000")
        self.samples = samples
        self.reduces = keep != "all"
        self._keep = keep
        self._closing = closing
        self._verifier = None if verifier == MATCH else Verifier(verifier, limit_s)
        self._by_function = verifier not in (MATCH, MATH_VERIFY)
        if self._by_function:  # decisions follow from what it says
            code = Path(verifier.rpartition(":")[0]).read_bytes()
            self.source_sha256 = hashlib.sha256(code).hexdigest()

    def prompt(self, ask: Ask) -> list[Part]:
        if self._keep == "verified" and not self._by_function and not expected_of(ask):
            raise RecipeFault("the row has no answer to verify by; give it one, or a function")
        parts = [Part(_question(ask), "shorten")]
        return [*parts, Part(f"\n\n{self._closing}")] if self._closing.strip() else parts

    def sampling(self, ask: Ask) -> Mapping[str, Any]:
        return SAMPLING

    def parse(self, ask: Ask, answer: Completion) -> Iterator[Piece]:
        text = answer.text.strip()
        if answer.finish_reason in CUT:
            yield Piece(0, None, ("cut_off", CUT[answer.finish_reason]))
            return
        if not text:
            return
        final = boxed(text)
        if final is None and not self._by_function:
            yield Piece(0, None, ("no_answer", r"there is no \boxed{…}"))
            return
        expected = expected_of(ask)
        verified, verdict = self._verdict(ask, expected, final or "", text)
        record = {
            "question": _question(ask),
            "output": text,
            "reasoning": answer.reasoning,
            "answer": final or "",
            "expected": expected,
            "verified": verified,
            "verdict": verdict,
            "votes": 1,
            "samples": 1,
        }
        yield Piece(0, record)

    def _verdict(self, ask: Ask, expected: str, final: str, text: str) -> Verdict:
        if not self._by_function:
            if not expected:
                return None, "no answer is known"
            if normalised(final) == normalised(expected):
                return True, "the same as the known answer"
            if self._verifier is None:
                return False, "other than the known answer"
        assert self._verifier is not None
        verified, detail = self._verifier.verdict(ask.row or {}, expected, final, text)
        told = "by the function" if self._by_function else "by Math-Verify"
        return verified, detail or told

    def reduce(self, ask: Ask, rows: Sequence[Record | None]) -> Record | Refusal:
        there = [row for row in rows if row is not None]
        if self._keep != "verified":
            return majority(there, len(rows))
        if there:
            right = [row for row in there if row["verified"]]
            if not right:
                return "not_verified", f"of {len(there)} answers none is right"
            return {**right[0], "votes": len(right), "samples": len(rows)}
        return "no_answer", f"none of {len(rows)} traces has an answer"

    def sample_answer(self) -> str:
        """An answer as it is meant, for trying the recipe out."""
        return "Half of 12 is 6, and 6 and 1 are 7.\n\nThe answer is \\boxed{\\frac{14}{2}}."


def majority(rows: Sequence[Record], samples: int) -> Record | Refusal:
    """The first row with the answer that more have than any other, and how many have it."""
    rows = [row for row in rows if row["answer"]]
    if not rows:
        return "no_answer", f"none of {samples} traces has an answer"
    answers = [normalised(row["answer"]) for row in rows]
    (best, votes), *others = Counter(answers).most_common(2)
    if others and others[0][1] == votes:
        tied = sum(count == votes for count in Counter(answers).values())
        return "no_majority", f"{tied} answers have {votes} of {samples} votes each"
    return {**rows[answers.index(best)], "votes": votes, "samples": samples}


def expected_of(ask: Ask) -> str:
    r"""The known answer of a row: of a worked solution what is boxed, or stands behind ``####``."""
    known = (ask.row or {}).get("answer")
    if isinstance(known, bool) or not isinstance(known, str | int | float):
        return ""
    text = str(known).strip()
    found = boxed(text)
    return text.rpartition("####")[2].strip() if found is None else found


def _question(ask: Ask) -> str:
    """Raises RecipeFault where the row has none."""
    row = ask.row or {}
    question, given = question_of(row), input_of(row)
    return f"{question}\n\n{given}" if given else question


_BOX = re.compile(r"\\f?boxed\s*+\{")
r"""``\boxed{``, with ``\fboxed{`` and blanks before the brace, as models write it too."""
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
r"""A brace, or an escaped character, so that ``\{`` is not taken for a brace."""


def boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{…}`` that is closed, braces within it matched; None: there
    is none, or it is blank. Time linear in the length of the text.

    >>> boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    opened: list[int | None] = []  # where each open brace's content begins; None: no box
    last: str | None = None
    boxes = {match.end() - 1: match.end() for match in _BOX.finditer(text)}
    for brace in _BRACE.finditer(text):
        place = brace.start()
        if brace[0] == "{":
            opened.append(boxes.get(place))
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start is not None and place - start <= MOST_ANSWER:
                # Of a box within another, the outer one is closed later and holds the whole.
                last = text[start:place].strip() or last
    return last


_LEFT_OUT = re.compile(
    r"\\(?:left|right|displaystyle|limits|quad|qquad)(?![A-Za-z])|\\[!,;:> ]|[\s$]+|\\[()\[\]]"
)
r"""LaTeX that changes how an answer looks and not what it is: ``\left``, ``\,``, ``$``, blanks."""
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|operatorname)\s*+\{([^{}]*+)\}")
r"""``\text{even}``, of which the content stays."""
_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
r"""``\dfrac``, ``\tfrac`` and ``\cfrac``, which are ``\frac`` at other sizes."""
_NUMBER = re.compile(r"([+-]?)([0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+|[0-9]+)(\.[0-9]*+)?")
"""A decimal, perhaps with thousands set apart: ``-1,234.50``, ``1{,}000``. Not ``1,23``, which may
be two numbers."""


def normalised(answer: str) -> str:
    r"""An answer without what does not change its value: blanks, dollar signs, ``\left``, the text
    around words, a full stop, thousands marks, zeros behind a point.

    >>> normalised(r"$\dfrac{1}{2}$."), normalised("1,000.0"), normalised(r"\text{Even}")
    ('\\frac{1}{2}', '1000', 'even')
    """
    text = _TEXT.sub(r"\1", answer)
    text = _FRACTION.sub(r"\\frac", _LEFT_OUT.sub("", text)).replace(r"\%", "%")
    text = text.rstrip(".").casefold()
    number = _NUMBER.fullmatch(text)
    if number is None:
        return text
    sign, whole, fraction = number[1], re.sub(r"[{},]", "", number[2]), number[3] or ""
    whole = whole.lstrip("0") or "0"
    value = whole + fraction.rstrip("0").rstrip(".")
    return value if sign != "-" or value == "0" else f"-{value}"
