"""Settings of batches: who takes them, how long they are waited for, and who asks the last few."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from engine.sections import FREE, Flag, Fraction, Positive, Seconds, Section

__all__ = ["BatchSection", "Provider"]

Provider = Literal["openai", "azure", "together", "mistral", "anthropic", "gemini", "vllm", "file"]


class BatchSection(Section):
    """With ``backend = "batch"``."""

    heading: ClassVar[str] = "Batches"

    provider: Annotated[
        Provider | None,
        FREE,
        Flag("Whose batch API, with --backend batch; file: carried elsewhere and back."),
    ] = None
    tail: Annotated[
        Literal["live", "batch"] | None,
        FREE,
        Flag("How the last few per cent are asked.", shown="live with --base-url, else batch"),
    ] = None
    wait: Annotated[
        Annotated[float, Field(ge=0, allow_inf_nan=False)] | None,
        FREE,
        Flag(
            "Leave, with status 75, when there was nothing but batches to wait for so long; 0: as"
            " soon as they are sent.",
            shown="wait to the end",
            metavar="SECONDS",
        ),
    ] = None
    poll_s: Annotated[
        Seconds,
        FREE,
        Flag("Time between two looks at a batch.", names=("--poll",), metavar="SECONDS"),
    ] = 30.0
    batch_lines: Annotated[
        Positive | None, FREE, Flag("Requests of one batch.", shown="as many as the provider takes")
    ] = None
    batch_tokens: Annotated[
        Positive | None,
        FREE,
        Flag("Tokens that may be in batches at once, where the account has such a limit."),
    ] = None
    batch_price: Annotated[
        Fraction | None,
        FREE,
        Flag("Price of batches, as a share of the prices given.", shown="0.5; vllm, file: 1"),
    ] = None
    keep_files: Annotated[
        bool, FREE, Flag("Leave the files at the provider when their answers are kept here.")
    ] = False
