"""Alpaca's prompts, for tests that need one."""

from __future__ import annotations

from collections.abc import Sequence

from engine.prompts.fit import Prompts, join
from engine.recipes import alpaca
from engine.recipes.alpaca import Alpaca, Seeded
from engine.recipes.base import Part
from engine.records import SeedTask

__all__ = ["alpaca_prompts", "rendered", "shown"]


def rendered(tasks: Sequence[SeedTask], language: str = "en") -> str:
    """The prompt that shows these tasks, in their order."""
    entries = [alpaca.demonstration(n, task, language) for n, task in enumerate(tasks, 1)]
    tail = Part(alpaca.tail(len(tasks), language))
    return join([Part(alpaca.header(language)), *entries, tail])[0]


def shown(number: int, task: SeedTask, language: str = "en") -> str:
    """One task as an entry of the list."""
    text = alpaca.demonstration(number, task, language).text
    assert isinstance(text, str)
    return text


def alpaca_prompts(
    tasks: Sequence[SeedTask],
    *,
    max_tokens: int,
    seed: int = 0,
    demonstrations: int = 3,
    **more: object,
) -> Prompts:
    """Maker of Alpaca's prompts by the completions API."""
    return Prompts(
        Alpaca(Seeded(tasks=tasks, demonstrations=demonstrations)),
        seed=seed,
        api="completions",
        sampling={"max_tokens": max_tokens, "temperature": 1.0, "top_p": 1.0},
        **more,  # type: ignore[arg-type]
    )
