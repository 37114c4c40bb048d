"""Which prompts go out next: in plan order, scouts one by one, and none that cannot be made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from engine.prompts.fit import Prompts
from engine.recipes.base import Part, Recipe
from engine.recipes.guard import RecipeFault
from engine.records import Answer, Record
from engine.run.pipeline.requests import MOST_HELD, Requests
from engine.run.pipeline.state import RunState
from engine.run.plan import Plan
from engine.run.progress import Pace, Progress


class Asks(Recipe):
    """Fails at every row that says so; long where the row is."""

    name, fields, asks, needs_rows = "asks", ("text",), "any", True

    def prompt(self, ask: Any) -> list[Part]:
        if ask.row["text"] == "fails":
            raise ValueError("no prompt for this row")
        return [Part(ask.row["text"])]


class Given:
    """Input rows."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def row(self, number: int) -> Record | None:
        return {"text": self._texts[number]} if number < len(self._texts) else None


class Run:
    """The requests of a run over input rows, of a context that is known or not."""

    def __init__(self, texts: Sequence[str], *, context_length: int | None = None) -> None:
        self.prompts = Prompts(
            Asks(),
            seed=0,
            api="chat",
            sampling={"max_tokens": 64, "temperature": 1.0, "top_p": 1.0},
            context_length=context_length,
            rows=Given(texts),
        )
        self.kept: list[Answer] = []
        self.asked_for: list[int] = []
        self.state = RunState(plan=Plan(), progress=Progress(target=1000), pace=Pace(target=1000))
        self.requests = Requests(
            self.state,
            self.prompts,
            keep=self.kept.extend,
            asks_for=self.asked_for.append,
            bulk=None,
        )

    def next(self) -> list[int] | None:
        """The numbers of the next call's requests."""
        prompts = self.requests.next()
        return None if prompts is None else [prompt.index for prompt in prompts]


def test_calls_go_in_plan_order_to_the_end_of_the_input() -> None:
    run = Run(["one", "two", "three"], context_length=4096)
    assert [run.next() for _ in range(4)] == [[0], [1], [2], None]
    assert run.state.plan.end == run.state.progress.requests == 3


def test_a_request_that_the_recipe_fails_at_is_kept_as_failed() -> None:
    run = Run(["one", "fails", "three"], context_length=4096)
    assert [run.next(), run.next()] == [[0], [2]]
    (answer,) = run.kept
    assert (answer.index, answer.failure) == (1, RecipeFault.reason)
    assert "no prompt for this row" in answer.message


def test_the_stage_before_hears_how_far_it_would_go() -> None:
    run = Run(["one"], context_length=4096)
    run.next()
    assert run.asked_for == [run.state.needed()]


def test_a_call_of_several_requests_takes_them_together() -> None:
    run = Run(["one", "two", "three"], context_length=4096)
    run.state.pace = Pace(target=1000, request_batch_size=2)
    assert [run.next(), run.next()] == [[0, 1], [2]]


def test_scouts_wait_for_one_another_and_others_go() -> None:
    """Of unknown context: what is no larger than something that has fitted goes freely."""
    run = Run(["a long text " * 20, "short", "a longer text " * 40, "brief"])
    (first,) = run.requests.next() or ()
    assert run.requests.scout([first])
    assert run.next() is None, "none has fitted so far, so each would be a scout"
    assert run.requests.holds
    run.prompts.fitted(first)
    run.requests.scout_is_back()
    assert run.next() == [1]
    (third,) = run.requests.next() or ()
    assert third.index == 2
    assert run.requests.scout([third])
    assert run.next() == [3], "smaller than what has fitted"


def test_no_more_calls_are_held_back_than_it_needs() -> None:
    run = Run(["a text"] * 1000)
    run.state.progress.target = 100_000
    assert run.next() == [0]
    run.requests.scouting = True
    assert run.next() is None
    assert run.state.plan.next_number == 1 + MOST_HELD


@pytest.mark.parametrize("back", [[0], [0, 1]])
def test_what_is_put_back_comes_first(back: list[int]) -> None:
    run = Run(["one", "two", "three"], context_length=4096)
    prompts = [prompt for _ in range(2) for prompt in run.requests.next() or ()]
    run.requests.put_back([prompts[number] for number in back])
    assert run.next() == [0]
