"""Recipes of a user's for tests: other processes import them from here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine import Ask, Completion, Part, Recipe, Record

REFUSED_EVERY = 5


class Answers(Recipe):
    """Answers the questions of the input; refuses each fifth, so that both kinds come."""

    fields = ("number", "answer")
    needs_rows = True

    def __init__(self, opening: str = "Say: ") -> None:
        self.opening = opening

    def prompt(self, ask: Ask) -> Sequence[Part]:
        assert ask.row is not None
        return [Part(f"{self.opening}{ask.row['question']}")]

    def parse(self, ask: Ask, answer: Completion) -> Iterable[Record | tuple[str, str]]:
        assert ask.row is not None
        if ask.row["number"] % REFUSED_EVERY == REFUSED_EVERY - 1:
            return [("unwanted", "its number is one of five")]
        return [{"number": ask.row["number"], "answer": answer.text}]


POLITE = Answers("Please say: ")


class Slots(Recipe):
    """Has a nested class, and needs something to be made of."""

    fields = ("text",)

    class Within(Answers):
        """To be found by a name with a dot."""

    def __init__(self, needed: str) -> None:
        self.needed = needed
