"""A run of a recipe that is not Alpaca: rows with numbers, lists, objects and nothing at all."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from engine.backends.scripted import ScriptedBackend
from engine.records import Prompt
from engine.run import generate as generate_module
from engine.run.display import SilentDisplay
from engine.run.generate import generate
from engine.settings import RunConfig

__all__ = ["RECIPE", "answer_to", "answering", "any_run", "topics"]

RECIPE = '''
import json

from engine.recipes.base import Part, Recipe


class Quiz(Recipe):
    name = "quiz"
    fields = ("id", "question", "answer", "score", "tags", "source")

    def prompt(self, ask):
        topic = ask.row["topic"] if ask.row else f"topic {ask.draw('topic') % 1000}"
        system = Part("You write quizzes.", role="system")
        return [system, Part(f"Ask about {topic}, take {ask.index}.", source=f"topic:{topic}")]

    def parse(self, ask, answer):
        if not answer.text.startswith("{"):
            return [("no_json", f"begins with {answer.text[:8]!r}")]
        return [json.loads(answer.text)]

    def refuse(self, row):
        return ("too_easy", f"score {row['score']}") if row["score"] == 0 else None

    def compared(self, row):
        return row["question"]


class Uncompared(Quiz):
    """The same without a comparison, and with a chat of its own."""

    compared = Recipe.compared

    def messages(self, row):
        return [
            {"role": "system", "content": "Quiz."},
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]


class Poem(Recipe):
    """Rows that make no chat."""

    fields = ("verse",)

    def prompt(self, ask):
        return [Part(f"Verse {ask.index}")]

    def parse(self, ask, answer):
        return [{"verse": answer.text}]
'''


def source_of(n: int) -> dict[str, Any] | None:
    """Where a question is from: an object of two shapes, or nothing."""
    if n % 2 == 0:
        return None
    page = {"page": n, "title": f"Bändchen {n}\u2028"}
    return page if n % 4 == 1 else {**page, "edition": 2}


def answer_to(prompt: Prompt) -> str:
    """A row that is different for each request; every seventh answer is none, every fifth row is
    refused.
    """
    n = prompt.index
    if n % 7 == 6:
        return "Sorry, no."
    words = random.Random(n).choices("abcdefghijklmnopqrst", k=48)
    said = " ".join("".join(words[at : at + 6]) for at in range(0, 48, 6))
    word = said[:6]
    row = {
        "id": n,
        "question": f"What means {said}?",
        "answer": f"=It means {n} to those who know {word}, whoever may ask",
        "score": n % 5,
        "tags": ["a", word][: n % 3],
        "source": source_of(n),
    }
    return f"<think>about {n}</think>{json.dumps(row)}"


def topics(folder: Path, count: int = 20) -> Path:
    """Input rows, as JSON Lines."""
    path = folder / "topics.jsonl"
    rows = ({"topic": f"topic {n}", "extra": {"n": n}} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextmanager
def answering(answer: Callable[[Prompt], str] = answer_to) -> Iterator[None]:
    """Runs of this process are answered by ``answer``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_module, "make_backends", lambda _: [ScriptedBackend(answer)])
        yield


def any_run(
    folder: Path,
    answer: Callable[[Prompt], str] = answer_to,
    *,
    kind: str = "Quiz",
    **settings: object,
) -> Path:
    """A run of the recipe above, which lies beside it; 30 rows without input rows."""
    recipe = folder.parent / "quiz.py"
    recipe.write_text(RECIPE)
    given = {"backend": "scripted", "out": folder, "semantic": False}
    given |= {"recipe": f"{recipe}:{kind}"} | ({} if "rows" in settings else {"target": 30})
    config = RunConfig.model_validate({**given, **settings})
    with answering(answer):
        result = anyio.run(generate, config, SilentDisplay())
    assert result.stop.reached, result.stop.error
    return folder
