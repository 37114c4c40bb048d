r"""CoT-Self-Instruct: seeds in; a new question that the model first reasons about, and its answer,
which a majority of fresh answers has to agree with.

    questions ──▶ answers (n for each question, reduced to one row)

After Yu et al., "CoT-Self-Instruct: Building high-quality synthetic prompts for reasoning and
non-reasoning tasks", arXiv 2507.23751. There is no official code; the method is built from the
paper's text, under this package's licence (Apache-2.0).

What is built is its first kind, tasks whose answer can be checked: two seeds are shown, the model
thinks about their field and level, plans a new question, and writes it with its final answer
between tags. Filter: *answer consistency*. The question is answered afresh ``samples`` times; the
answer that most come to must be the one that it was written with, or the question is refused as
``inconsistent``. The row has the first of the fresh traces with that answer.

Departures:

* The prompts are in our own words, and the tags are ours.
* The filter of the second kind (RIP: the lowest reward of n answers must lie above a quantile of
  all) is not built: a quantile is known only when all questions are, and needs a reward model.
* Questions are compared with the seeds and with each other, as in Self-Instruct.
* A tie of fresh answers is no majority; answers are compared as recipe ``reason`` does.
* The bundled seeds are of all kinds; give ``--seeds`` of the kind that is wanted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from engine.recipes import seeds
from engine.recipes.alpaca import Seeded
from engine.recipes.base import CUT, Ask, Part, Recipe, Reference, Refusal
from engine.recipes.reason import CLOSING, Reason, boxed, normalised
from engine.records import Completion, Record, SeedTask

__all__ = ["CotSelfInstruct"]

SHOWN = 2
"""Seeds in a prompt, as in the paper."""
SAMPLES = 8
"""Answers to each question, among which a majority is looked for. Each more costs as much as the
question; fewer make agreement by chance likelier."""
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 4096}
"""Of questions; the answers are sampled as ``reason`` does."""
HEADER = """\
Below are some tasks. Think first: what field are they from, what do they demand, how hard are they? Then plan a new task of the same kind and level that is none of these with other names or numbers: say what it asks, why it has exactly one right answer, and work the answer out to the end.

Then write the new task, complete and understandable by itself, as <question>…</question>, and below it the final answer alone, as short as can be and without its derivation, as <answer>…</answer>.
"""
"""In our own words. It asks for thought first, as the paper's prompt does, and for tags, so that
what was only tried out in the thoughts can be told from the result."""
_TAGS = re.compile(r"<(question|answer)>((?:(?!</?(?:question|answer)>).)*+)</\1>", re.DOTALL)
"""``<question>…</question>`` or ``<answer>…</answer>``; what is within has no such tag, so a tag
that was opened twice counts from the second one."""


class CotSelfInstruct(Recipe):
    """The two stages; see the head of this file.

    Args:
        seeded: its seed tasks and language.
        samples: fresh answers to each question.
    """

    name = "cot-self-instruct"
    fields = Reason.fields
    builtin = True
    takes_seeds = True
    OPTIONS: ClassVar[Mapping[str, Any]] = {"samples": SAMPLES}

    def __init__(self, seeded: Seeded, *, samples: int = SAMPLES) -> None:
        self._stages = (Questions(seeded), Consistent(samples=samples))

    @property
    def stages(self) -> Sequence[Recipe]:
        return self._stages


class Questions(Recipe):
    """The first stage: a question and its answer, after some thought."""

    name = "cot-self-instruct/questions"
    fields = ("question", "answer")
    builtin = True
    takes_seeds = True

    def __init__(self, seeded: Seeded) -> None:
        self._tasks = seeded.tasks

    def prompt(self, ask: Ask) -> list[Part]:
        shown = ask.choose(self._tasks, SHOWN, "seeds")
        return [
            Part(HEADER),
            *(
                Part(f"\nTask {number}:\n{_task(task)}\n", "drop", source=task.id)
                for number, task in enumerate(shown, 1)
            ),
        ]

    def sampling(self, ask: Ask) -> Mapping[str, Any]:
        return SAMPLING

    def recurring(self) -> Iterator[str]:
        yield HEADER

    def parse(self, ask: Ask, answer: Completion) -> Iterator[Record | Refusal]:
        if not answer.text.strip():
            return
        # The last of each: the thoughts before may try some out.
        found = {match[1]: match[2].strip() for match in _TAGS.finditer(answer.text)}
        missing = [name for name in self.fields if not found.get(name)]
        if not missing:
            final = boxed(found["answer"])
            yield {"question": found["question"], "answer": final or found["answer"]}
        elif answer.finish_reason in CUT:
            yield "cut_off", CUT[answer.finish_reason]
        else:
            yield "bad_format", f"there is no <{missing[0]}>…</{missing[0]}>"

    def compared(self, row: Record) -> str:
        text: str = row["question"]
        return text

    def references(self) -> Iterator[Reference]:
        return seeds.references(self._tasks)

    def sample_answer(self) -> str:
        """An answer as it is meant, for trying the recipe out."""
        return (
            "These are about counting. 3 · 4 = 12.\n\n<question>How many pairs of a shirt and a hat "
            "can be made of 3 shirts and 4 hats?</question>\n<answer>12</answer>\n"
        )


class Consistent(Reason):
    """The second stage: fresh answers, which must agree with the question's own."""

    name = "cot-self-instruct/answers"

    def __init__(self, *, samples: int = SAMPLES) -> None:
        super().__init__(samples=samples, closing=CLOSING)

    def reduce(self, ask: Ask, rows: Sequence[Record | None]) -> Record | Refusal:
        found = super().reduce(ask, rows)
        if isinstance(found, dict) and normalised(found["answer"]) != normalised(found["expected"]):
            told = f"{found['votes']} of {found['samples']} say {found['answer'][:80]!r}"
            return (
                "inconsistent",
                f"{told}, the question was written with {found['expected'][:80]!r}",
            )
        return found


def _task(task: SeedTask) -> str:
    return f"{task.instruction}\n\n{task.input}" if task.input else task.instruction
