"""Settings of which rows are near-duplicates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, model_validator

from engine.recipes.alpaca import Scope
from engine.secrets import variable_name
from engine.sections import DECISION, FREE, Flag, Fraction, Section

__all__ = ["DedupSection"]


class DedupSection(Section):
    """Which rows are near-duplicates."""

    heading: ClassVar[str] = "Near-duplicates"

    rouge_threshold: Annotated[
        Fraction | None,
        DECISION,
        Flag("Refuse above this ROUGE-L F.", shown="0.7; 0.75 by characters"),
    ] = 0.7
    semantic: Annotated[
        bool | None,
        DECISION,
        Flag("Refuse near-duplicates by meaning.", shown="where the packages are installed"),
    ] = None
    semantic_threshold: Annotated[Fraction, DECISION, Flag("Refuse above this cosine.")] = 0.9
    semantic_model: Annotated[
        str | None,
        DECISION,
        Flag(
            "Embedding model: folder or hub id, or as --semantic-url names it.",
            shown="all-MiniLM-L6-v2, or the one served",
        ),
    ] = None
    semantic_url: Annotated[
        str | None,
        FREE,
        Flag("Server that embeds: OpenAI's /v1/embeddings, as of vLLM.", metavar="URL"),
    ] = None
    semantic_key_env: Annotated[
        Annotated[str, AfterValidator(variable_name)] | None,
        FREE,
        Flag("Environment variable with the key of --semantic-url.", metavar="NAME"),
    ] = None
    semantic_precision: Annotated[
        Literal["float32", "bfloat16"],
        DECISION,
        Flag("bfloat16: twice as fast on CPUs with AMX."),
    ] = "float32"
    scope: Annotated[Scope, DECISION, Flag("What is compared.")] = "instruction"
    against: Annotated[
        tuple[Path, ...],
        DECISION,
        Flag("Dataset to stay clear of: compared with, never exported."),
    ] = ()

    @model_validator(mode="after")
    def _where_it_embeds(self) -> Self:
        if self.semantic_url is not None and self.semantic_precision != "float32":
            raise ValueError(
                "semantic_precision goes with models on this machine; the server of semantic_url "
                "has its own"
            )
        return self
