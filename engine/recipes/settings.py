"""Settings of what is made: the recipe, what it is about, its language."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from engine.datasets import OnBadRow
from engine.languages import language_of
from engine.recipes.filters import FirstCharacter
from engine.sections import (
    DECISION,
    FREE,
    LATER,
    Flag,
    Positive,
    Section,
    Strict,
    apart_at_commas,
)

__all__ = ["AUTO", "FiltersConfig", "RecipeSection"]

AUTO = "auto"
"""What is to be found out: the language from the seeds or rows, the API from the address."""


def _language(code: str) -> str:
    return code if code == AUTO else language_of(code).code


class FiltersConfig(Strict):
    """Which instructions are refused at sight; None: as the run's language has it."""

    min_length: Annotated[int, Field(ge=0)] | None = None
    """In characters where words do not stand apart, else in words."""
    max_length: Positive | None = None
    blocked_words: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    blocked_openings: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    first_character: FirstCharacter | None = None
    """ascii, letter (no punctuation) or any."""


class RecipeSection(Section):
    """What is made."""

    heading: ClassVar[str] = "What is made"

    recipe: Annotated[
        str,
        Field(min_length=1),
        Flag("Built-in name, FILE.toml, FILE.py:CLASS or package.module:CLASS.", metavar="RECIPE"),
    ] = "alpaca"
    recipe_options: Annotated[
        dict[str, Any],
        LATER,
        Flag("Value for an option of the recipe's file.", names=("--set",)),
    ] = {}
    rows: Annotated[
        Path | None, FREE, Flag("Input rows: a file, a folder or another run.", path="either")
    ] = None
    on_bad_row: Annotated[
        OnBadRow,
        FREE,
        Flag("What an input row that cannot be read does; skip leaves it out, and names it."),
    ] = "stop"
    samples: Annotated[
        Annotated[int, Field(ge=1, le=100_000)] | None,
        LATER,
        Flag("Requests for each input row.", shown="as the recipe says, else 1"),
    ] = None
    carry: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        BeforeValidator(apart_at_commas),
        DECISION,
        LATER,
        Flag("Fields of the input row that its rows keep, such as its id.", metavar="FIELD,…"),
    ] = ()
    seeds: Annotated[
        Path | None,
        Flag("Seed tasks, JSON Lines.", shown="bundled", names=("--seeds", "--seed_tasks_path")),
    ] = None
    num_demonstrations: Annotated[
        int,
        Field(ge=1, le=18),
        Flag(
            "Seed tasks shown in a prompt.",
            names=("--num-demonstrations", "--num_prompt_instructions"),
        ),
    ] = 3
    language: Annotated[
        str,
        AfterValidator(_language),
        DECISION,
        LATER,
        Flag(
            "What rows are written in: en, zh, ja, …; mul: several.",
            shown="as the seeds are",
            metavar="CODE",
        ),
    ] = AUTO
    filters: Annotated[
        FiltersConfig,
        DECISION,
        LATER,
        Flag("What is refused at sight.", shown="as the language has it", metavar="JSON"),
    ] = FiltersConfig()
