"""Pairwise: an instruction with two answers in; which one is better out, judged in both orders.

An input row has an ``instruction`` (or ``question``, ``prompt``, …) and the answers in two of its
fields, ``answer_a`` and ``answer_b`` where ``--set a=`` and ``--set b=`` do not name others. A
judge sees them twice, once in each order, since models favour a place. Where both judgements name
the same answer it is ``chosen`` and the other ``rejected``; else the pair is a tie, which is
refused unless ``--set keep_ties=true``.

After MT-Bench's judge (Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena",
arXiv 2306.05685; code: https://github.com/lm-sys/FastChat, Apache-2.0, llm_judge), which asks in
both orders and takes two different verdicts for a tie.

Departures: the prompt is in our own words, and the verdict is JSON by a schema in the place of
``[[A]]``; a judgement that failed leaves no verdict, and the pair is refused as ``no_judgement``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from engine.recipes.base import CUT, Ask, Part, Recipe, Refusal
from engine.recipes.guard import RecipeFault
from engine.recipes.json_answers import JsonAnswer
from engine.recipes.respond import input_of, question_of
from engine.records import Completion, Record

__all__ = ["Pairwise"]

SYSTEM = "You compare two answers to the same instruction: which one would serve whoever asked better? Correctness comes first, then completeness, then clarity. Neither the order of the answers nor their length counts."
"""In our own words; like MT-Bench's it warns of order and length, which judges favour."""
REQUEST = 'Say in one or two sentences what decides it, as "reason", and then which is "better": "first", "second" or "tie". Answer with a JSON object that has reason and better.'
"""The reason is asked for before the verdict, so that the verdict can follow from it."""
SCHEMA = {
    "type": "object",
    "properties": {
        "reason": {"type": "string"},
        "better": {"type": "string", "enum": ["first", "second", "tie"]},
    },
    "required": ["reason", "better"],
}
"""By place and not by name: which answer is first changes from one order to the other."""
FORM = {
    "type": "json_schema",
    "json_schema": {"name": "pairwise", "schema": SCHEMA, "strict": True},
}
"""The schema as servers take it to constrain an answer; it is checked here too."""
SAMPLING = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 512, "response_format": FORM}
"""At temperature 0 the two orders differ only in the order."""


class Pairwise(Recipe):
    """See the head of this file.

    Args:
        a: the field of the input row that holds one answer.
        b: the field that holds the other.
        keep_ties: ties are rows too, without ``chosen`` and ``rejected``.
    """

    name = "pairwise"
    fields = ("instruction", "chosen", "rejected", "winner", "reason")
    needs_rows = True
    samples = 2
    reduces = True
    builtin = True
    OPTIONS: ClassVar[Mapping[str, Any]] = {"a": "answer_a", "b": "answer_b", "keep_ties": False}

    def __init__(
        self, *, a: str = "answer_a", b: str = "answer_b", keep_ties: bool = False
    ) -> None:
        self._names = (a, b)
        self._keep_ties = keep_ties

    def prompt(self, ask: Ask) -> list[Part]:
        first, second = self._answers(ask)
        if ask.sample % 2:
            first, second = second, first
        return [
            Part(SYSTEM, role="system"),
            Part("Instruction:\n"),
            Part(_instruction(ask), "shorten"),
            Part("\n\nFirst answer:\n"),
            Part(first, "shorten"),
            Part("\n\nSecond answer:\n"),
            Part(second, "shorten"),
            Part(f"\n\n{REQUEST}"),
        ]

    def sampling(self, ask: Ask) -> Mapping[str, Any]:
        return SAMPLING

    @cached_property
    def _format(self) -> JsonAnswer:
        return JsonAnswer(SCHEMA)

    def parse(self, ask: Ask, answer: Completion) -> Iterator[Record | Refusal]:
        for found in self._format.read(answer.text, CUT.get(answer.finish_reason)):
            if isinstance(found, tuple):
                yield found
                continue
            place = {"first": "a", "second": "b"}.get(found["better"], "tie")
            if ask.sample % 2:
                place = {"a": "b", "b": "a"}.get(place, place)
            yield self._row(ask, place, found["reason"])

    def _row(self, ask: Ask, winner: str, reason: str) -> Record:
        a, b = self._answers(ask)
        chosen, rejected = {"a": (a, b), "b": (b, a)}.get(winner, (None, None))
        return {
            "instruction": _instruction(ask),
            "chosen": chosen,
            "rejected": rejected,
            "winner": winner,
            "reason": reason,
        }

    def reduce(self, ask: Ask, rows: Sequence[Record | None]) -> Record | Refusal:
        there = [row for row in rows if row is not None]
        if len(there) < len(rows):
            return "no_judgement", f"{len(there)} of {len(rows)} judgements were made"
        said = [row["winner"] for row in there]
        if "tie" not in said and len(set(said)) == 1:
            return there[0]
        if self._keep_ties:
            return self._row(ask, "tie", " / ".join(row["reason"] for row in there))
        return "tie", f"judged {', '.join(said)}"

    def _answers(self, ask: Ask) -> tuple[str, str]:
        """Raises RecipeFault where the row lacks one."""
        row = ask.row or {}
        for name in self._names:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise RecipeFault(
                    f"the row has no text {name!r}, but {', '.join(row) or 'nothing'}; name the "
                    "fields of the two answers by --set a=… and --set b=…"
                )
        return row[self._names[0]], row[self._names[1]]

    def sample_answer(self) -> str:
        """An answer as it is meant, for trying the recipe out."""
        return '{"reason": "The first one is right.", "better": "first"}'


def _instruction(ask: Ask) -> str:
    row = ask.row or {}
    question, given = question_of(row), input_of(row)
    return f"{question}\n\n{given}" if given else question
