"""Settings of how prompts are counted and made to fit."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BeforeValidator

from engine.prompts.fit import FitStep
from engine.sections import FREE, Flag, Section, apart_at_commas

__all__ = ["PromptSection"]


class PromptSection(Section):
    """How prompts are counted and made to fit."""

    heading: ClassVar[str] = "Prompts"

    tokenizer: Annotated[
        str | None,
        FREE,
        Flag(
            "Counts prompt tokens: folder, hub id or tiktoken:NAME.", shown="as the backend counts"
        ),
    ] = None
    fit: Annotated[
        tuple[FitStep, ...],
        BeforeValidator(apart_at_commas),
        Flag(
            "What gives way, in this order, where a prompt is too long.",
            shown="demonstrations,prompt,completion",
            metavar="STEP,…",
        ),
    ] = ("demonstrations", "prompt", "completion")
