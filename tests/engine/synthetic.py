"""Runs made through the real pipeline and store, with varied answers and no model.

``synthetic_run`` fills a folder the way ``woolmill generate`` would. Its texts come from a small
grammar that is wide enough for some 100,000 rows to stay clear of each other, and holds on purpose
what a real run holds: near-duplicates, blocked words, pieces in a bad format. ``BagEncoder`` stands
in for the embedding model: texts that share words are close.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
import numpy as np
import pytest
from numpy.typing import NDArray

from engine.backends.scripted import ScriptedBackend
from engine.dedup import semantic
from engine.dedup.encoder import Precision
from engine.dedup.rouge import tokenize
from engine.records import Prompt, Record
from engine.run import generate as generate_module
from engine.run.display import SilentDisplay
from engine.run.generate import generate
from engine.settings import RunConfig

__all__ = ["BagEncoder", "records_text", "synthetic_run"]

VERBS = (
    "write describe explain compare list plan summarise rewrite translate classify suggest draft "
    "review outline design evaluate propose convert identify calculate invent analyse define "
    "recommend edit justify estimate predict organise imagine compose correct simplify expand"
).split()
OBJECTS = (
    "letter recipe poem schedule budget speech story argument report email proverb menu contract "
    "riddle headline policy lesson dialogue summary survey question sentence paragraph timeline "
    "checklist strategy experiment theorem joke review toast resume plan sonnet slogan biography "
    "glossary analogy hypothesis routine petition memo obituary prophecy blurb preface quiz outline"
).split()
FIELDS = (
    "astronomy beekeeping chess cooking sailing geology medicine finance gardening carpentry law "
    "music painting cycling forestry history grammar algebra poetry plumbing weather fishing opera "
    "archaeology logistics nutrition knitting diplomacy robotics farming theatre journalism "
    "photography volcanoes insurance recycling migration taxation philosophy origami baking "
    "swimming pottery electricity encryption democracy glaciers jazz rainfall vaccines"
).split()
PEOPLE = (
    "teacher nurse pilot farmer student lawyer baker tourist widow mayor soldier painter plumber "
    "chemist tailor grandmother referee librarian fisherman apprentice diplomat beekeeper actor "
    "neighbour engineer judge gardener translator driver dentist"
).split()
EXTRAS = (
    "angry brisk careful daring eager fragile gentle humble icy jolly keen lively mellow noisy "
    "odd patient quiet rustic sober tender urgent vivid weary young zealous ancient bitter "
    "clever dusty elegant foggy grumpy hollow idle jagged kind lonely modest narrow ornate "
    "plain quaint rough shy tidy upbeat vast witty"
).split()
OPENINGS = (
    "{verb} a {extra} {object} about {field}",
    "{verb} how {field} changed {field2}",
    "{verb} one {object} of a {extra} {person}",
    "{verb} this {extra} {object}",
    "{verb} what {person}s think of {field}",
    "{verb} the {object} of a {person}",
)
CLAUSES = (
    "for a {extra} {person}", "without naming {field}", "as if {field} were {extra}",
    "in the voice of a {person}", "using one {extra} {object}", "and end with a {object}",
    "so that any {person} understands", "with {field} in mind", "before the {object} is due",
    "while {field} stays {extra}", "that mentions {field} twice", "but keep every {object} {extra}",
    "from {field} to {field2}", "like a {extra} {object}", "unless {field2} forbids it",
    "to calm some {extra} {person}s", "against {field2}", "during {field} lessons",
)  # fmt: skip


class BagEncoder:
    """Each word has a direction, a text the mean of its words': (N, 64), of unit length."""

    dimension = 64
    precision: Precision = "float32"

    def __init__(self) -> None:
        self._words: dict[str, NDArray[np.float32]] = {}

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.stack([self._text(text) for text in texts])
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)

    def _text(self, text: str) -> NDArray[np.float32]:
        words = tokenize(text) or [""]
        return np.asarray(np.sum([self._word(word) for word in words], axis=0), np.float32)

    def _word(self, word: str) -> NDArray[np.float32]:
        if word not in self._words:
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
            self._words[word] = np.random.default_rng(seed).standard_normal(64, np.float32)
        return self._words[word]


def varied(draw: random.Random) -> Record:
    """One record; about one in ten is there to be refused."""

    def often(words: list[str]) -> str:
        """The first words far more often than the last, as in any language."""
        return words[int(len(words) * draw.random() ** 2.5)]

    def chosen(frame: str) -> str:
        return frame.format(
            verb=often(VERBS), object=often(OBJECTS), field=draw.choice(FIELDS),
            field2=draw.choice(FIELDS), person=draw.choice(PEOPLE), extra=draw.choice(EXTRAS),
        )  # fmt: skip

    frames = [draw.choice(OPENINGS), *draw.sample(CLAUSES, draw.randint(2, 4))]
    instruction = " ".join(map(chosen, frames)).capitalize() + "."
    kind = draw.random()
    if kind < 0.03:
        instruction = chosen("Draw a picture of {field}")
    elif kind < 0.05:
        instruction = chosen("Name {object}s")
    elif kind < 0.10:
        instruction = f"Tell the {draw.choice(PEOPLE[:6])} a story about the sea and its creatures."
    given = chosen("A {extra} {object} from the {person}.")
    sentences = [
        chosen("The {person} knows {field} and keeps a {extra} {object}.")
        for _ in range(draw.randint(1, 6))
    ]
    return Record(
        instruction=instruction,
        input=given if draw.random() < 0.4 else "",
        output=" ".join(sentences),
    )


def records_text(records: Sequence[Record], first: int) -> str:
    """An answer that Alpaca's parser reads as ``records``; the prompt ends with ``first``."""
    entries = []
    for number, record in enumerate(records, first):
        head = "" if number == first else f"{number}. Instruction:"
        entries.append(
            f"{head} {record['instruction']}\n{number}. Input:\n{record['input'] or '<noinput>'}\n"
            f"{number}. Output:\n{record['output']}\n###\n"
        )
    return "".join(entries)


def answer_of(prompt: Prompt) -> str:
    draw = random.Random(prompt.index)
    records = [varied(draw) for _ in range(4)]
    text = records_text(records, len(prompt.demonstrations) + 1)
    return text.replace("Output:", "Answer:", 1) if draw.random() < 0.1 else text


def synthetic_run(
    folder: Path,
    target: int,
    answer: Callable[[Prompt], str] = answer_of,
    *,
    vectors: bool = True,
    **settings: object,
) -> Path:
    """A finished run of ``target`` accepted rows in ``folder``; ``vectors`` by ``BagEncoder``."""
    config = RunConfig.model_validate(
        {"backend": "scripted", "out": folder, "target": target, "semantic": vectors, **settings}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_module, "make_backends", lambda _: [ScriptedBackend(answer)])
        patch.setattr(semantic, "SentenceEncoder", lambda *_, **_options: BagEncoder())
        result = anyio.run(generate, config, SilentDisplay())
    assert result.stop.reached, result.stop.error
    return folder
