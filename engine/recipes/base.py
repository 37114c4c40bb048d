"""The seam between the engine and what it is asked to make: a recipe, in four pure functions.

    Ask ──prompt──▶ Parts ──(fitted, sent, answered)──▶ Completion ──parse──▶ Pieces ──refuse──▶ rows
                                                                         └──compared──▶ near-duplicates

A recipe sees no clock, no network and no disk while it runs, and its only randomness is
``Ask.draw``: so the same request is made again after a crash, and stored answers can be parsed
again by a mended parser without asking anybody.

The code of a recipe is trusted as the settings are. Its mistakes are not: what it raises, and what
takes it too long, becomes the refusal ``recipe_error`` of one request and never ends a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar

from engine.records import NOT_ASKED, Completion, Record

__all__ = [
    "CUT",
    "MOST_PIECES",
    "NOT_ASKED",
    "RECIPE_ERROR",
    "Ask",
    "Part",
    "Piece",
    "Recipe",
    "Reference",
    "Refusal",
    "Role",
    "drawn",
]

Refusal = tuple[str, str]
"""The reason that reports count, and a detail for the person."""
Reference = tuple[str, str]
"""A text that rows are compared with, and its source as ``Neighbour.source`` names it."""
Role = Literal["system", "user", "assistant"]
T = TypeVar("T")

CUT = {
    "length": "the answer ended at its token limit",
    "unknown": "the host gives a reason for the answer's end that nobody knows",
}
"""Finish reasons after which the end of an answer may be missing; what stands before it is whole,
and paid.
"""
RECIPE_ERROR = "recipe_error"
"""The reason of what a recipe's own code failed at."""
MOST_PIECES = 10_000
"""Pieces that one answer can have: a bound for parsers that never end."""


def drawn(*keys: int | str) -> int:
    """64 random bits, a function of the keys. A hash, not a generator: seeding one costs more."""
    text = " ".join(map(str, keys)).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest())


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What request ``index`` of a run is about."""

    index: int
    seed: int = 0
    """The run's seed."""
    row: Record | None = None
    """The input row; None where the run has none."""
    sample: int = 0
    """Which of several requests for the same row this is, from 0."""
    pool: Sequence[Record] = ()
    """Rows that were accepted earlier in this run, for recipes that show some; in plan order."""
    shown: tuple[str, ...] = ()
    """For ``parse``: the sources of the parts that the request showed, in order."""

    def draw(self, *keys: int | str) -> int:
        """64 random bits, a function of the run's seed, the index and the keys."""
        return drawn(self.seed, self.index, *keys)

    def choose(self, items: Sequence[T], count: int, *keys: int | str) -> list[T]:
        """``count`` of the items, or as many as there are: without replacement, in drawn order.

        The bias of taking a 64-bit number modulo the number of items is below 1e-13.
        """
        taken: list[int] = []
        for place in range(min(count, len(items))):
            at = self.draw(*keys, place) % (len(items) - place)
            for earlier in sorted(taken):  # the at-th of those that are left
                at += earlier <= at
            taken.append(at)
        return [items[at] for at in taken]


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a prompt. Neighbours of the same role become one message."""

    text: str | Callable[[int], str]
    """Or a function of how many droppable parts are left, as for the number of the next item."""
    gives_way: Literal["never", "drop", "shorten"] = "never"
    """Where the context is too short: parts to ``drop`` go from the last to the first, and one of
    them stays; then what may be shortened is.
    """
    source: str = ""
    """Where it comes from, as ``seed:ID``; kept with the answer."""
    role: Role = "user"
    core: tuple[int, int] | None = None
    """The stretch of ``text`` that is shortened; None: all of a part that gives way by it."""

    def render(self, left: int) -> str:
        """The text, with ``left`` droppable parts in the prompt."""
        return self.text if isinstance(self.text, str) else self.text(left)


@dataclass(frozen=True, slots=True)
class Piece:
    """What a parser found at ``position`` of an answer: a row, or why there is none."""

    position: int
    record: Record | None
    refusal: Refusal | None = None


class Recipe:
    """How to ask, and what to make of the answer. Subclass it and override what differs.

    Attributes:
        name: as reports and the manifest have it.
        version: raise it whenever a prompt changes. A run only goes on with the same one.
        fields: of a row, in order.
        asks: the API that prompts are made for: ``chat``, raw ``completions``, or ``any`` of them.
        raw: prompts are a model's own chat template, begun by hand: only engines that continue a
            text as it stands can be asked.
        most: rows that one answer can hold at most; paces the first requests of a run.
        needs_rows: there is a request for each input row, and none without one.
        rows_path: input rows that it names itself, where the person names none.
        samples: requests for each input row, where the person does not say.
        model: the table ``[models.NAME]`` of the settings that says who answers; empty: the run's.
        model_settings: what that table says where the person's does not.
        keeps_parent: where none of an answer's rows is accepted, its input row is, ``unchanged``.
        reduces: the samples of an input row become one row, by ``reduce``.
        pooled: prompts show rows that were accepted earlier; see ``Ask.pool``.
        takes_seeds: it, or one of its stages, is made with seed tasks: its constructor takes a
            ``Seeded``, and ``--seeds`` names them.
        OPTIONS: what ``--set`` can replace, by name; a value, or an ``Option`` with its choices.
        language: ISO 639 code of its rows, where it says; empty: several.
        builtin: its code is this package's, which needs no time limit and no checks.
        source_sha256: of the file that it was loaded from; decisions follow from it.
        asks_sha256: of what its prompts follow from, where that can be told apart.
    """

    name: str = ""
    version: str = "1"
    fields: tuple[str, ...] = ()
    asks: Literal["any", "chat", "completions"] = "chat"
    raw: bool = False
    most: int = 1
    needs_rows: bool = False
    rows_path: Path | None = None
    samples: int = 1
    model: str = ""
    model_settings: Mapping[str, Any] = MappingProxyType({})
    keeps_parent: bool = False
    reduces: bool = False
    pooled: bool = False
    takes_seeds: ClassVar[bool] = False
    OPTIONS: ClassVar[Mapping[str, Any]] = {}
    language: str = ""
    builtin: ClassVar[bool] = False
    source_sha256: str = ""
    asks_sha256: str = ""

    @property
    def stages(self) -> Sequence[Recipe]:
        """The recipes that make a row one after the other: each asks about the rows that the one
        before it gave, and the last one's are the run's. Their names differ.
        """
        return (self,)

    def prompt(self, ask: Ask) -> Sequence[Part]:
        """The parts of a request's prompt, in order. Raises whatever it likes: see ``parse``."""
        raise NotImplementedError

    def parse(self, ask: Ask, answer: Completion) -> Iterable[Record | Refusal | Piece]:
        """Rows, and reasons for what is none, in the order of the answer.

        ``answer`` has its thoughts apart (``reasoning``) and ended by ``stop``, or as ``CUT`` says.
        What it raises becomes the refusal ``recipe_error`` with the line that raised it.
        """
        raise NotImplementedError

    def refuse(self, row: Record) -> Refusal | None:
        """Why a row is not wanted; None: it is."""
        return None

    def reduce(self, ask: Ask, rows: Sequence[Record | None]) -> Record | Refusal:
        """One row of the samples of an input row, for recipes that ``reduces``.

        ``rows`` holds the first row of each sample in order; None: it gave none.
        """
        raise NotImplementedError

    def unchanged(self, row: Record) -> Record:
        """An input row as it goes on where no answer improves it, for recipes that
        ``keeps_parent``. Here: those of ``fields`` that it has.
        """
        return {name: row[name] for name in self.fields if name in row}

    def compared(self, row: Record) -> str | None:
        """The text by which near-duplicates are told; None: the row is not compared."""
        return None

    @property
    def compares(self) -> bool:
        """Whether any row is compared."""
        return type(self).compared is not Recipe.compared

    def references(self) -> Iterable[Reference]:
        """Texts that the first row is compared with already, such as seeds."""
        return ()

    def sampling(self, ask: Ask) -> Mapping[str, Any]:
        """Fields of the request's body, under the user's own: ``max_tokens``, ``temperature``,
        ``top_p``, ``stop`` (a tuple), ``forbid_eos``, and any others as the host documents them.
        """
        return {}

    def recurring(self) -> Iterable[str]:
        """Texts of parts that come again and again: their tokens are counted once, exactly."""
        return ()

    def messages(self, row: Record) -> list[dict[str, str]] | None:
        """A row as the turns of a chat to train on, ``role`` and ``content`` each; None: it is none.

        Here: what the names of its fields say.
        """
        return chat_of(row)


QUESTIONS = ("instruction", "question", "prompt", "problem", "query")
"""Names of the field that asks, in the datasets in use; the first that a row has is taken."""
ANSWERS = ("output", "answer", "response", "completion", "solution")
"""Likewise of the field that answers."""


def telling_text(row: Record) -> str | None:
    """The text that a row is told by in lists, as the names of its fields say: what it asks, else
    its first text that is no id; None: it has no text.
    """
    texts = {name: value for name, value in row.items() if isinstance(value, str)}
    usual = next((name for name in QUESTIONS if texts.get(name)), None)
    first = next((name for name in texts if name != "id"), None)
    name = usual or first or next(iter(texts), None)
    return None if name is None else texts[name]


def chat_of(row: Record) -> list[dict[str, str]] | None:
    """The turns that a row's usual field names make; None where they make none."""
    turns = row.get("messages")
    if isinstance(turns, list) and turns:
        return turns
    asked = next((name for name in QUESTIONS if isinstance(row.get(name), str)), None)
    answered = next((name for name in ANSWERS if isinstance(row.get(name), str)), None)
    if asked is None or answered is None:
        return None
    question, given = row[asked], row.get("input")
    if isinstance(given, str) and given:
        question = f"{question}\n\n{given}"
    system = row.get("system")
    before = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    return [
        *before,
        {"role": "user", "content": question},
        {"role": "assistant", "content": row[answered]},
    ]
