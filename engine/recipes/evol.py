"""Evol-Instruct: instructions in, harder or other ones out, round by round; then their answers.

    round-1 ──▶ … ──▶ round-R ──▶ answers        with --set judge=true: round-1 ▶ judge-1 ▶ round-2 …

After Xu et al., "WizardLM: Empowering Large Language Models to Follow Complex Instructions", arXiv
2304.12244; code: https://github.com/nlpxucan/WizardLM, Apache-2.0, folder Evol_Instruct, commit
cd4b4cc. Sampling is theirs: temperature 1, top_p 0.95, 2,048 tokens.

One row in, one row out: each round draws one of six operations for each row, five in depth (add a
constraint, deepen, concretise, ask for more reasoning, complicate the input) and one in breadth (a
rarer task of the same domain). What evolves takes the row's place, in breadth too; the paper's
whole set, all rounds together, is there as well: each round is a run of its own in
``OUT/stages``, and ``woolmill generate --recipe respond --rows OUT/stages/1-round-1`` answers one.
An evolution that fails leaves the row as it was for the next round. A finished row says in which
round it was made, by which operation, and from what.

The eliminator, in the places where its four cases can be told:

1. No more information: a model says so, where ``judge`` is set. The row goes back to what it was.
2. The answer says "sorry" in fewer than 80 words: the finished row is refused.
3. The answer is nothing but punctuation and stop words: the finished row is refused.
4. The evolved text holds words of the prompt that its parent does not: the row stays as it was. So
   it does where the text is the same again, apologises, or was cut by the token limit.

Departures:

* The prompts are in our own words.
* The code has one round, five operations and no eliminator. The paper's four rounds, its sixth
  operation (complicate the input) and its eliminator are built; case 2 and 3 refuse the row at the
  end, where the paper puts the old instruction back and answers it again.
* Whether a round gained anything is asked of a model only where ``judge`` is set, since it costs a
  call for each evolved row; what the judge says otherwise than "equal", or nothing, keeps the row.
* A failed request leaves the old row; the code stores an empty one.
* Instruction and input are joined by a blank line; the code joins them by a carriage return and a
  line feed.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from engine.errors import ConfigError
from engine.recipes.base import CUT, Ask, Part, Piece, Recipe, Refusal
from engine.recipes.guard import NotAsked
from engine.recipes.respond import input_of, question_of
from engine.records import Completion, Record

__all__ = ["Evol"]

SYSTEM = "You are a careful writer of tasks for language models."
"""Without a system turn, some chat templates add one of their own."""
DEPTH = """\
Make the task below a little harder, so that even strong models have to work for it. It must stay one task that a person can understand, and that can be answered with text alone. Keep its language, and any table, code or figures in it. {how} Add some 10 to 20 words, no more.

Write the new task alone. Do not answer it, and say neither "given task" nor "new task" in it, nor "#Given Task#" or "#New Task#".

#Given Task#:
{task}

#New Task#:
"""
BREADTH = """\
Take the task below as a sample of its subject, and write another one: of the same field but about something rarer, of about the same length and difficulty, in the same language. It must make sense by itself, and a person must be able to answer it with text alone.

Write the new task alone. Do not answer it, and say neither "given task" nor "new task" in it, nor "#Given Task#" or "#New Task#".

#Given Task#:
{task}

#New Task#:
"""
OPERATIONS = {
    "constrain": "Do so by one more condition or requirement that the answer has to meet.",
    "deepen": "Where it asks about a matter, ask about it in more depth and in more breadth.",
    "concretise": "Put something specific in the place of a general notion in it.",
    "reason": "Where a few simple steps would do, ask expressly for an answer that takes several steps of reasoning.",
    "complicate": "Give it material to work on, or more involved material than it has: a table, code, a formula, a message, data with a flaw.",
    "breadth": "",
}
"""By name; all but the last are in depth."""
JUDGE = """\
Here are two tasks. Do they have the same conditions and requirements, and ask for answers of the same depth and breadth? Say "Equal" if they do, else "Not equal", and nothing else.

First task:
{parent}

Second task:
{task}
"""
"""Asked of each evolved row. What is "Equal" to the row before has not evolved, and the old one
stays."""
SAMPLING = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 2048}
"""WizardLM's: the same temperature for evolving and answering."""
LEAKS = (
    "given task",
    "new task#",
    "given prompt",
    "rewritten prompt",
    "created prompt",
    "new prompt#",
)
"""What evolved texts hold that repeat the prompt; ours and the published ones."""
_APOLOGY = re.compile(
    r"\W*+(?:i(?:'|\u2019| a)m|we(?:'|\u2019| a)re) (?:very |so )?sorry\b", re.IGNORECASE
)
"""An evolved task that is a refusal: "I'm sorry, but …". Matched at its beginning only, since a
task may well be about an apology."""
SHORT_WORDS = 80
"""An answer with "sorry" that is shorter than this is none."""
STOP_WORDS = frozenset(
    """a about above after again against all am an and any are as at be because been before being
    below between both but by can could did do does doing down during each few for from further
    had has have having he her here hers herself him himself his how i if in into is it its itself
    just me more most my myself no nor not now of off on once only or other our ours ourselves out
    over own same she should so some such than that the their theirs them themselves then there
    these they this those through to too under until up very was we were what when where which
    while who whom why will with would you your yours yourself yourselves i'm you're it's that's we're they're don't isn't""".split()
)
"""NLTK's English list without its fragments of contractions. An answer of these alone says nothing,
in WizardLM's rules."""
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
"""A word with its contractions in one: ``don't``."""


class Evol(Recipe):
    """The rounds and the answers; see the head of this file.

    Args:
        rounds: how often every row is evolved.
        operations: which of ``OPERATIONS`` are drawn from.
        judge: ask a model after each round whether the evolved task asks for more.
    """

    name = "evol"
    fields = ("instruction", "output", "reasoning", "round", "operation", "parent")
    needs_rows = True
    builtin = True
    OPTIONS: ClassVar[Mapping[str, Any]] = {
        "rounds": 4,
        "operations": list(OPERATIONS),
        "judge": False,
    }

    def __init__(
        self, *, rounds: int = 4, operations: Sequence[str] = tuple(OPERATIONS), judge: bool = False
    ) -> None:
        if not 1 <= rounds <= 20:
            raise ConfigError(f"--set rounds={rounds}: write a number from 1 to 20")
        unknown = [name for name in operations if name not in OPERATIONS]
        if unknown or not operations:
            raise ConfigError(
                f"--set operations: {unknown[0] if unknown else 'none'}: choose some of "
                f"{', '.join(OPERATIONS)}"
            )
        stages: list[Recipe] = []
        for number in range(1, rounds + 1):
            stages.append(Evolve(number, operations))
            stages += [Compare(number)] * judge
        self._stages = (*stages, Answers())

    @property
    def stages(self) -> Sequence[Recipe]:
        return self._stages


class Evolve(Recipe):
    """One round."""

    fields = ("instruction", "round", "operation", "parent", "before")
    needs_rows = True
    keeps_parent = True
    builtin = True

    def __init__(self, number: int, operations: Sequence[str] = tuple(OPERATIONS)) -> None:
        self.name = f"evol/round-{number}"
        self._number = number
        self._operations = tuple(operations)

    def _operation(self, ask: Ask) -> str:
        # A row keeps its number in all rounds: the round makes the draw another.
        return self._operations[ask.draw("operation", self._number) % len(self._operations)]

    def prompt(self, ask: Ask) -> list[Part]:
        operation = self._operation(ask)
        template = BREADTH if operation == "breadth" else DEPTH
        before, after = template.replace("{how}", OPERATIONS[operation]).split("{task}")
        return [
            Part(SYSTEM, role="system"),
            Part(before),
            Part(_task(ask.row or {}), "shorten"),
            Part(after),
        ]

    def sampling(self, ask: Ask) -> Mapping[str, Any]:
        return SAMPLING

    def parse(self, ask: Ask, answer: Completion) -> Iterator[Record | Refusal]:
        parent, evolved = _task(ask.row or {}), answer.text.strip()
        if answer.finish_reason in CUT:
            yield "cut_off", CUT[answer.finish_reason]
        elif evolved:
            if refusal := eliminated(evolved, parent):
                yield refusal
                return
            before = self.unchanged(ask.row or {})
            del before["before"]
            yield {
                "instruction": evolved,
                "round": self._number,
                "operation": self._operation(ask),
                "parent": parent,
                "before": before,
            }

    def unchanged(self, row: Record) -> Record:
        lineage = {"round": 0, "operation": "", "parent": "", "before": None}
        if self._number > 1:  # what came in before may have fields of these names
            lineage |= {name: row[name] for name in lineage if name in row}
        return {"instruction": _task(row), **lineage}

    def sample_answer(self) -> str:
        """An answer as it is meant, for trying the recipe out."""
        return "Compare three ways to store solar energy overnight, and say which suits a farm."


class Compare(Recipe):
    """Whether a round made a task that asks for more; else the row goes back to what it was."""

    fields = ("instruction", "round", "operation", "parent")
    needs_rows = True
    keeps_parent = True
    builtin = True

    def __init__(self, number: int) -> None:
        self.name = f"evol/judge-{number}"
        self._number = number

    def prompt(self, ask: Ask) -> list[Part]:
        row = ask.row or {}
        if row["round"] != self._number:
            raise NotAsked("this round left the row as it was")
        before, between, after = re.split(r"\{parent\}|\{task\}", JUDGE)
        return [Part(f"{before}{row['parent']}{between}{row['instruction']}{after}")]

    def sampling(self, ask: Ask) -> Mapping[str, Any]:
        return {"temperature": 0.0, "top_p": 1.0}

    def parse(self, ask: Ask, answer: Completion) -> Iterator[Record | Refusal]:
        row = ask.row or {}
        words = _WORD.findall(answer.text.lower())[:1]
        if words == ["equal"]:
            yield dict(row["before"])
        elif words:
            yield {name: row[name] for name in self.fields}

    def sample_answer(self) -> str:
        """An answer as it is meant, for trying the recipe out."""
        return "Not equal"


class Answers(Recipe):
    """The last stage: what has evolved is answered, and what cannot be is refused."""

    name = "evol/answers"
    fields = Evol.fields
    needs_rows = True
    builtin = True

    def prompt(self, ask: Ask) -> list[Part]:
        return [Part(_task(ask.row or {}), "shorten")]

    def sampling(self, ask: Ask) -> Mapping[str, Any]:
        return SAMPLING

    def parse(self, ask: Ask, answer: Completion) -> Iterator[Piece]:
        if answer.finish_reason in CUT:
            yield Piece(0, None, ("cut_off", CUT[answer.finish_reason]))
        elif output := answer.text.strip():
            row = ask.row or {}
            record = {
                "instruction": row["instruction"],
                "output": output,
                "reasoning": answer.reasoning,
                **{name: row[name] for name in ("round", "operation", "parent")},
            }
            yield Piece(0, record, unanswered(output))

    def sample_answer(self) -> str:
        """An answer as it is meant, for trying the recipe out."""
        return "Batteries suit small farms, pumped water suits hilly ones, and heat suits dairies."


def eliminated(evolved: str, parent: str) -> Refusal | None:
    """Why an evolved text is no evolution of its parent, as far as that can be told without its
    answer.
    """
    lower, before = evolved.casefold(), parent.casefold()
    if lower.split() == before.split():
        return "unchanged", "the same text again"
    if leaked := [leak for leak in LEAKS if leak in lower and leak not in before]:
        return "copied_prompt", leaked[0]
    if _APOLOGY.match(evolved):
        return "apology", "it apologises in the place of a task"
    return None


def unanswered(output: str) -> Refusal | None:
    """Why an answer shows that its task cannot be answered."""
    words = len(output.split())
    if "sorry" in output.lower() and words < SHORT_WORDS:
        return "apology", f"sorry, in {words} words"
    said = [word.replace("\u2019", "'").lower() for word in _WORD.findall(output)]
    if all(word in STOP_WORDS for word in said) and not _has_signs(output):
        return "says_nothing", "punctuation and stop words alone"
    return None


def _has_signs(text: str) -> bool:
    """Whether there is something that is neither a word nor ASCII punctuation, as in formulas and
    pictographs.
    """
    left = _WORD.sub("", text)
    return any(not sign.isspace() and sign not in string.punctuation for sign in left)


def _task(row: Record) -> str:
    """The task of a row. Raises RecipeFault where it has none."""
    task, given = question_of(row), input_of(row)
    return f"{task}\n\n{given}" if given else task
