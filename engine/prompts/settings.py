"""Settings of how prompts are counted and made to fit."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from engine.prompts.fit import FitStep
from engine.sections import FREE, Flag, Section

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
        Field(description="What gives way, in order, where a prompt is too long."),
    ] = ("demonstrations", "prompt", "completion")
