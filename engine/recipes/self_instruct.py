"""Self-Instruct: seed tasks in, instructions with their instances out, in three stages.

    instructions ──▶ classification ──▶ instances
    (seeds, pool)    (yes or no)        (output first for classification, else input first)

After Wang et al., "Self-Instruct: Aligning Language Models with Self-Generated Instructions", arXiv
2212.10560; code: https://github.com/yizhongw/self-instruct, Apache-2.0, commit 0b26cca
(bootstrap_instructions.py, identify_clf_or_not.py, generate_instances.py and
prepare_for_finetuning.py). Constants, filters, parsers and rules for instances are theirs; a model
is asked by completions or by chat. Each row is one instance.

Bugs of the code that are left out. ``--set faithful=true`` brings back those marked with *, which
change the data and can be had here:

* ``capitalize()`` writes all but the first letter of an instruction small, names too.*
* The stop text "16." ends every answer that holds it, such as a price, and the piece before it
  passes for a whole one; so do a blank line, and "Task" and a line feed in the second stage.* Here
  a list ends at "16." on a line of its own, and an instruction at a blank line.
* A list that the token limit cut is thrown away whole.* Here its last piece is.
* An answer to the second stage counts as Yes only as "Yes", "yes" or "YES" alone.* Here its first
  word decides.
* Five tasks share one call of the third stage, and all get 300 tokens instead of 350 where one is
  classification. Here it is the task's own kind that counts.
* A set's order, another in every process, decides which instances go beyond five. Here they are
  drawn by the run's seed, and stay in the order of the answer.
* A failed request of the second stage counts as No. Here the row is refused and says why.
* Draws repeat after a restart, answers are paid again unless all five of a call are known, and the
  target is overshot.

Other departures, in either mode:

* The prompts are in our own words; 12 tasks each stand for the 12 and 17 of the third stage.
* ``top_p`` is 1 where the code has 0: the temperature is 0 there, and hosts refuse 0.
* Of the rows made here those of all epochs but the last two are shown, so that what a request
  shows does not depend on how many are in flight; the code shows all.
* Instructions are compared with all seeds and all accepted ones by this engine, in plan order,
  above 0.7 by ROUGE-L as published, and by meaning where that is on.
* Filters are the run's ``[filters]`` with Self-Instruct's words; an underscore ends a word, and no
  instruction has more than 1,000 tokens. Without ``faithful`` its first letter is made a capital.
* In answers by chat, words before the first number and markup around labels are passed over
  (without ``faithful``).
* A seed's first instance alone is read, the header for classification seeds alone is not built, and
  the texts to train on (seven templates drawn per row, labels left out of half) are a matter of
  the export.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

from engine.languages import ENGLISH, MIXED, language_of
from engine.recipes import seeds
from engine.recipes.alpaca import Seeded
from engine.recipes.base import CUT, Ask, Part, Piece, Recipe, Reference, Refusal
from engine.recipes.filters import Filters, FilterSettings
from engine.recipes.self_instruct_prompts import (
    INPUT_FIRST,
    IS_CLASSIFICATION,
    LIST,
    OUTPUT_FIRST,
    Template,
)
from engine.records import Completion, Record

__all__ = ["SelfInstruct"]

SHOWN = 8
"""Tasks that a prompt shows, as in the paper: six seeds and two of the run's own."""
SHOWN_OF_POOL = 2
LAST_NUMBER = 15
"""Of the list, where eight are shown: seven new ones."""
MOST_INSTANCES = 5
BLOCKED_WORDS = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps",
    "draw", "plot", "go to",
)  # fmt: skip
LIST_SAMPLING = {"max_tokens": 1024, "temperature": 0.7, "top_p": 0.5, "presence_penalty": 2}
"""The published code's; the presence penalty keeps a list from repeating itself."""
LIST_STOP = (f"\n{LAST_NUMBER + 1}.", f"\n{LAST_NUMBER + 1} .")
"""Where the model goes on past the last number."""
PUBLISHED_LIST_STOP = ("\n\n", "\n16", "16.", "16 .")
"""The published code's. A blank line ends it after one task where a model sets them apart, and
"16." may be part of a task."""
JUDGED_SAMPLING = {"max_tokens": 3, "temperature": 0.0, "top_p": 1.0}
"""Three tokens are enough for Yes or No."""
JUDGED_STOP = ("\nTask",)
"""Where the model goes on to a task of its own."""
PUBLISHED_JUDGED_STOP = ("\n", "Task")
"""The published code's: an answer that begins with a line break is empty."""
INSTANCE_SAMPLING = {
    "temperature": 0.0,
    "top_p": 1.0,
    "presence_penalty": 1.5,
    "stop": (f"Example {MOST_INSTANCES + 1}", "Task:"),
}
"""The published code's. It stops before a sixth example or another task."""
INSTANCE_TOKENS = {True: 300, False: 350}
"""By whether the task is classification."""

# Repetitions are possessive, so that a run of blanks or digits takes time in proportion to its
# length; they match what the published ones match.
_NUMBER = re.compile(r"\n\d++\s?\. ")
_BLANK_LINE = re.compile(r"\n[ \t\r]*+\n")
"""A line of nothing but blanks: what is below belongs to no task of the list."""
_EXAMPLE = re.compile(r"Example\s?\d*\.?")
"""``Example 2``, before each instance."""
_OUTPUT = re.compile(r"Output\s*+\d*+\s*+:")
"""``Output:`` or ``Output 2:``, between the input of an instance and its output."""
_INPUT = re.compile(r"Input\s*+\d*+\s*+:")
"""``Input:`` likewise. One within an output begins an instance that has no ``Example``."""
_CLASS_LABEL = "Class label:"
"""Before each instance of a classification task, whose label comes first."""
_MARKED_UP = re.compile(
    r"^[ \t#*]*+(?:(Example[ \t]?\d*+)|(Class label|(?:In|Out)put(?:[ \t]\d++)?+))[ \t*]*+(:?)\**+",
    re.MULTILINE,
)
_YES = re.compile(r"\W*+yes\b", re.IGNORECASE)
"""An answer that begins with yes, whatever stands around it: ``**Yes**, since …``."""


class SelfInstruct(Recipe):
    """The three stages; see the head of this file.

    Args:
        seeded: its seed tasks, language and filters.
        faithful: with the published code's bugs that change the data, as far as they can be had.
    """

    name = "self-instruct"
    fields = ("instruction", "input", "output", "is_classification")
    asks = "any"
    builtin = True
    takes_seeds = True
    OPTIONS: ClassVar[Mapping[str, Any]] = {"faithful": False}

    def __init__(self, seeded: Seeded, *, faithful: bool = False) -> None:
        self._stages = (
            Instructions(seeded, faithful=faithful),
            Classification(faithful=faithful),
            Instances(faithful=faithful),
        )

    @property
    def stages(self) -> Sequence[Recipe]:
        return self._stages

    @property
    def compares(self) -> bool:
        return self._stages[0].compares


class Instructions(Recipe):
    """The first stage: a numbered list of seeds and of rows made here, which the model continues."""

    name = "self-instruct/instructions"
    fields = ("instruction",)
    asks = "any"
    most = LAST_NUMBER - SHOWN
    pooled = True
    builtin = True
    takes_seeds = True

    def __init__(self, seeded: Seeded, *, faithful: bool = False) -> None:
        self._tasks = seeded.tasks
        self._faithful = faithful
        self._header = Part(_list_header(seeded.language))
        settings = seeded.filters.settings if seeded.filters else FilterSettings()
        if seeded.language == ENGLISH and settings.blocked_words is None:
            settings = replace(settings, blocked_words=BLOCKED_WORDS)
        self._filters = Filters(seeded.language, settings)

    def prompt(self, ask: Ask) -> list[Part]:
        pool = ask.pool
        own = ask.choose(range(len(pool)), SHOWN_OF_POOL, "pool")
        shown = [(pool[rank]["instruction"], f"pool:{rank}") for rank in own]
        tasks = ask.choose(self._tasks, SHOWN - len(shown), "seeds")
        shown += [(task.instruction, task.id) for task in tasks]
        parts = [self._header]
        for number, (text, source) in enumerate(ask.choose(shown, len(shown), "order"), 1):
            line = " ".join(text.split()).rstrip(":")
            parts.append(Part(f"{number}. {line}\n", "drop", source=source))
        return [*parts, Part(lambda left: f"{left + 1}.")]

    def sampling(self, ask: Ask) -> Mapping[str, Any]:
        return {**LIST_SAMPLING, "stop": PUBLISHED_LIST_STOP if self._faithful else LIST_STOP}

    def recurring(self) -> Iterable[str]:
        return (self._header.render(0),)

    def parse(self, ask: Ask, answer: Completion) -> Iterator[Piece]:
        cut = CUT.get(answer.finish_reason)
        if cut and self._faithful:
            yield Piece(0, None, ("cut_off", cut))
            return
        text = answer.text
        if answer.api == "chat" and not self._faithful:
            text = _from_number(text, len(ask.shown) + 1)
        pieces = _NUMBER.split(text)
        for position, piece in enumerate(pieces):
            if not self._faithful:
                piece = _BLANK_LINE.split(piece.lstrip(), maxsplit=1)[0]
            instruction = " ".join(piece.split())
            if self._faithful:
                instruction = instruction.capitalize()
            else:
                instruction = instruction[:1].upper() + instruction[1:]
            if not instruction:
                continue
            # What a blank line ends is whole, whatever came behind it.
            if cut and position == len(pieces) - 1 and not _BLANK_LINE.search(pieces[-1].lstrip()):
                yield Piece(position, None, ("cut_off", cut))
            else:
                yield Piece(position, {"instruction": instruction})

    def refuse(self, row: Record) -> Refusal | None:
        return self._filters.refusal(row)

    def compared(self, row: Record) -> str:
        text: str = row["instruction"]
        return text

    def references(self) -> Iterator[Reference]:
        return seeds.references(self._tasks)

    def sample_answer(self) -> str:
        """An answer as it is meant, for trying the recipe out."""
        return (
            " Describe a market on a rainy morning.\n10. Which of the two words is the verb?\n"
            "11. Explain how a lock on a canal works, step by step.\n"
        )


def _list_header(language: str) -> str:
    if language == ENGLISH:
        return LIST
    spoken = f"Everything is in {language_of(language).name}."
    if language == MIXED:
        spoken = "Each task is in the language of one of those that are listed."
    return f"{LIST.rstrip()} {spoken}\n\n"


def _from_number(text: str, number: int) -> str:
    """The answer of a chat model from the item ``number`` on, or from 1 where it counts anew; all
    of it where it has neither.
    """
    for wanted in (number, 1):
        found = re.search(rf"^[ \t]*+{wanted}\s?\. ", text, re.MULTILINE)
        if found:
            return "\n" + text[found.start() :].lstrip()
    return text


class Classification(Recipe):
    """The second stage: whether an instruction is classification."""

    name = "self-instruct/classification"
    fields = ("instruction", "is_classification")
    asks = "any"
    needs_rows = True
    builtin = True

    def __init__(self, *, faithful: bool = False) -> None:
        self._faithful = faithful

    def prompt(self, ask: Ask) -> list[Part]:
        instruction = _of(ask)["instruction"]
        return [
            *_parts(IS_CLASSIFICATION),
            Part(f"Task: {instruction}\nIs it classification?"),
        ]

    def sampling(self, ask: Ask) -> Mapping[str, Any]:
        stop = PUBLISHED_JUDGED_STOP if self._faithful else JUDGED_STOP
        return {**JUDGED_SAMPLING, "stop": stop}

    def recurring(self) -> Iterable[str]:
        return _texts(IS_CLASSIFICATION)

    def parse(self, ask: Ask, answer: Completion) -> Iterator[Record]:
        said = answer.text.strip()
        yes = said in ("Yes", "yes", "YES") if self._faithful else bool(_YES.match(said))
        yield {"instruction": _of(ask)["instruction"], "is_classification": yes}

    def sample_answer(self) -> str:
        """An answer as it is meant, for trying the recipe out."""
        return " No"


class Instances(Recipe):
    """The third stage: inputs and outputs of an instruction."""

    name = "self-instruct/instances"
    fields = ("instruction", "input", "output", "is_classification")
    asks = "any"
    most = MOST_INSTANCES
    needs_rows = True
    builtin = True

    def __init__(self, *, faithful: bool = False) -> None:
        self._faithful = faithful

    def prompt(self, ask: Ask) -> list[Part]:
        row = _of(ask)
        template = OUTPUT_FIRST if row["is_classification"] else INPUT_FIRST
        return [*_parts(template), Part(f"Task: {row['instruction']}\n")]

    def sampling(self, ask: Ask) -> Mapping[str, Any]:
        tokens = INSTANCE_TOKENS[bool(_of(ask)["is_classification"])]
        return {**INSTANCE_SAMPLING, "max_tokens": tokens}

    def recurring(self) -> Iterable[str]:
        return (*_texts(INPUT_FIRST), *_texts(OUTPUT_FIRST))

    def parse(self, ask: Ask, answer: Completion) -> Iterator[Piece]:
        row, text = _of(ask), answer.text
        if answer.api == "chat" and not self._faithful:
            text = _MARKED_UP.sub(_label, text)
        found = instances(text, classification=row["is_classification"])
        if not found:
            wanted = _CLASS_LABEL if row["is_classification"] else "Example or Output:"
            yield Piece(0, None, ("bad_format", f"there is no {wanted}"))
            return
        refusals = refused(found, CUT.get(answer.finish_reason))
        whole = [place for place in range(len(found)) if place not in refusals]
        taken = set(ask.choose(whole, MOST_INSTANCES, "instances"))
        for place in whole:
            if place not in taken:
                refusals[place] = ("beyond_five", f"one of {len(whole)} instances")
        for place, (given, output) in enumerate(found):
            record = {
                "instruction": row["instruction"],
                "input": given,
                "output": output,
                "is_classification": row["is_classification"],
            }
            yield Piece(place, record, refusals.get(place))

    def sample_answer(self) -> str:
        """An answer as it is meant, for trying the recipe out."""
        return (
            "Example 1\nSentence: The cat slept.\nOutput: slept\n"
            "Example 2\nInput: Rain fell all night.\nOutput: fell\n"
        )


class Instance(NamedTuple):
    """An input, which may be empty, and its output."""

    input: str
    output: str


def instances(text: str, *, classification: bool) -> list[Instance]:
    """What an answer holds, as prepare_for_finetuning.py reads it; none where it lacks the labels.

    Time linear in the length of the answer.
    """
    if classification:
        if _CLASS_LABEL not in text:
            return []
        pieces = [piece.strip() for piece in text.split(_CLASS_LABEL)[1:]]
        around = [piece.partition("\n") for piece in pieces]
        return [Instance(given.strip(), label.strip()) for label, _, given in around]
    text = text.strip()
    if _EXAMPLE.search(text):
        return [_pair(piece) for piece in map(str.strip, _EXAMPLE.split(text)) if piece]
    return [_pair(text)] if _OUTPUT.search(text) else []


def _pair(piece: str) -> Instance:
    around = _OUTPUT.split(piece, maxsplit=2)
    given, output = around[:2] if len(around) > 1 else ("", piece)
    given, output = given.strip(), output.strip()
    output = _INPUT.split(output, maxsplit=1)[0].strip()
    if label := _INPUT.match(given):
        given = given[label.end() :].strip()
    return Instance(given, output)


def refused(found: Sequence[Instance], cut: str | None) -> dict[int, Refusal]:
    """Which instances are not taken, and why; those of one input with two outputs take all others
    with them.
    """
    refusals: dict[int, Refusal] = {}
    outputs: dict[str, str] = {}
    seen: set[Instance] = set()
    contradiction = ""
    for place, instance in enumerate(found):
        if cut and place == len(found) - 1:
            refusals[place] = ("cut_off", cut)
        elif instance.input == instance.output:
            refusals[place] = ("input_is_output", "")
        elif not instance.output:
            refusals[place] = ("empty_output", "")
        elif instance.input.endswith(":") or instance.output.endswith(":"):
            refusals[place] = ("ends_with_colon", "")
        elif instance in seen:
            refusals[place] = ("repeated", "the same instance again")
        else:
            seen.add(instance)
            if instance.input and outputs.setdefault(instance.input, instance.output) != (
                instance.output
            ):
                contradiction = instance.input
    if contradiction:
        told = ("contradiction", f"two outputs for the input {contradiction[:80]!r}")
        for place in range(len(found)):
            refusals.setdefault(place, told)
    return refusals


def _label(found: re.Match[str]) -> str:
    """A label without the markup around it."""
    return found[1] or f"{found[2]}{found[3]}"


def _of(ask: Ask) -> Record:
    assert ask.row is not None  # it needs rows
    return ask.row


def _parts(template: Template) -> list[Part]:
    examples = [
        Part(text, "drop", source=f"example:{number}")
        for number, text in enumerate(template.examples, 1)
    ]
    return [Part(template.header), *examples]


def _texts(template: Template) -> tuple[str, ...]:
    return (template.header, *template.examples)
