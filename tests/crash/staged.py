"""Recipes of several stages, of rounds, of samples and of a pool, to be killed.

Their rows have Alpaca's fields, which the checker reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

from engine.recipes.base import Ask, Part, Recipe, Refusal
from engine.records import Completion, Record

FIELDS = ("instruction", "input", "output")


def words(prompt: str, _nth: int = 1) -> str:
    """The server's answer: eight words that follow from the prompt."""
    drawn = blake2b(prompt.encode(), digest_size=32).digest()
    return " ".join(f"w{int.from_bytes(drawn[n : n + 4]) % 5000}" for n in range(0, 32, 4))


def asked(ask: Ask) -> Record:
    """The row of the stage before, or the input row."""
    assert ask.row is not None
    return ask.row


class Asks(Recipe):
    """Two instructions an answer; some are refused, some come again."""

    name, fields, asks, most = "chain/ask", FIELDS, "any", 2

    def prompt(self, ask: Ask) -> Sequence[Part]:
        return [Part(f"Give two instructions: batch {ask.index}.")]

    def parse(self, ask: Ask, answer: Completion) -> Iterable[Record | Refusal]:
        found = answer.text.split()
        for place in (0, 1):
            row = {"instruction": " ".join(found[place * 4 :][: 2 + place]), "input": ""}
            yield row | {"output": found[7]}

    def refuse(self, row: Record) -> Refusal | None:
        return ("short", "") if len(row["instruction"]) % 5 == 0 else None

    def compared(self, row: Record) -> str:
        return str(row["instruction"])


class Answers(Recipe):
    name, fields, asks, needs_rows = "chain/answer", FIELDS, "any", True

    def prompt(self, ask: Ask) -> Sequence[Part]:
        return [Part("Answer: "), Part(asked(ask)["instruction"], "shorten")]

    def parse(self, ask: Ask, answer: Completion) -> Iterable[Record | Refusal]:
        yield {**asked(ask), "output": answer.text}


class Judges(Recipe):
    name, fields, asks, needs_rows = "chain/judge", FIELDS, "any", True

    def prompt(self, ask: Ask) -> Sequence[Part]:
        return [Part("Judge: "), Part(asked(ask)["output"])]

    def parse(self, ask: Ask, answer: Completion) -> Iterable[Record | Refusal]:
        yield {**asked(ask), "input": answer.text}

    def refuse(self, row: Record) -> Refusal | None:
        return ("low", "") if len(row["input"]) % 4 == 0 else None


class Whole(Recipe):
    """What a recipe of stages has beside them."""

    fields, asks = FIELDS, "any"

    def prompt(self, ask: Ask) -> Sequence[Part]:
        raise NotImplementedError

    def parse(self, ask: Ask, answer: Completion) -> Iterable[Record | Refusal]:
        raise NotImplementedError


class Chain(Whole):
    name = "chain"

    @property
    def stages(self) -> Sequence[Recipe]:
        return (Asks(), Answers(), Judges())


class Rewrites(Recipe):
    fields, asks, needs_rows, keeps_parent = FIELDS, "any", True, True

    def __init__(self, number: int) -> None:
        self.name = f"rounds/{number}"

    def prompt(self, ask: Ask) -> Sequence[Part]:
        return [Part(f"Rewrite, {self.name}: {asked(ask)['instruction']}")]

    def parse(self, ask: Ask, answer: Completion) -> Iterable[Record | Refusal]:
        if len(answer.text) % 3 == 0:
            yield ("unchanged", "")
        else:
            yield {**asked(ask), "instruction": answer.text}


class Rounds(Whole):
    name, needs_rows = "rounds", True

    @property
    def stages(self) -> Sequence[Recipe]:
        return tuple(Rewrites(number) for number in range(1, 5))


class Votes(Recipe):
    """Five samples of a row, and the word that most of them begin with."""

    name, fields, asks, needs_rows = "votes", FIELDS, "any", True
    samples, reduces = 5, True

    def prompt(self, ask: Ask) -> Sequence[Part]:
        return [Part(f"{asked(ask)['instruction']} (sample {ask.sample})")]

    def parse(self, ask: Ask, answer: Completion) -> Iterable[Record | Refusal]:
        if len(answer.text) % 7 == 0:
            yield ("bad_format", "")
        else:
            yield {**asked(ask), "output": answer.text[:2]}

    def reduce(self, ask: Ask, rows: Sequence[Record | None]) -> Record | Refusal:
        votes = [row["output"] for row in rows if row is not None]
        if not votes:
            return ("no_majority", "all samples failed")
        best = max(sorted(set(votes)), key=votes.count)
        return {**asked(ask), "output": f"{best} of {len(votes)}"}


class Pools(Recipe):
    name, fields, asks, most, pooled = "pools", FIELDS, "any", 1, True

    def prompt(self, ask: Ask) -> Sequence[Part]:
        shown = ask.choose(ask.pool, 2, "shown")
        return [Part(f"Request {ask.index}: "), *(Part(row["instruction"]) for row in shown)]

    def parse(self, ask: Ask, answer: Completion) -> Iterable[Record | Refusal]:
        yield {"instruction": answer.text, "input": "", "output": answer.text[:5]}

    def refuse(self, row: Record) -> Refusal | None:
        return ("odd", "") if len(row["instruction"]) % 6 == 0 else None

    def compared(self, row: Record) -> str:
        return str(row["instruction"])
