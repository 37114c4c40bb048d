"""Settings of a run as a whole: how many rows, where to, what ends it, and what is shown of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from engine.sections import FREE, Flag, Positive, Seconds, Section

__all__ = ["EndSection", "RunSection", "ShowSection"]


NoSeconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Seconds, or 0 for not at all."""


class RunSection(Section):
    """What is wanted."""

    heading: ClassVar[str] = "The run"

    target: Annotated[
        Positive,
        FREE,
        Flag(
            "Accepted rows wanted. Input rows are each decided once where it is not given.",
            names=("--target", "--num_instructions_to_generate"),
        ),
    ] = 100
    """Accepted rows wanted; where it is not given and there are input rows, ``EVERY``."""
    out: Annotated[
        Path,
        FREE,
        Flag(
            "The run's folder; the same again goes on.",
            names=("--out", "--output_dir"),
            path="folder",
        ),
    ] = Path("runs/alpaca")
    seed: Annotated[int, Field(ge=0, lt=2**63), Flag("What all sampling derives from.")] = 0


class EndSection(Section):
    """What a request may cost before it is given up, and what ends the run before its target."""

    heading: ClassVar[str] = "When to give up or stop"

    max_attempts: Annotated[Positive, FREE, Flag("Attempts that may be paid, a request.")] = 4
    max_refusals_in_a_row: Annotated[
        Positive,
        FREE,
        Flag("Stop when so many requests in a row are refused as if a setting were wrong."),
    ] = 20
    wait_for_server_s: Annotated[
        NoSeconds,
        FREE,
        Flag(
            "At the start, wait so long for a server that does not answer yet.",
            names=("--wait-for-server",),
            metavar="SECONDS",
        ),
    ] = 0.0
    max_outage_s: Annotated[
        Seconds,
        FREE,
        Flag(
            "Stop when no endpoint has answered for so long.",
            names=("--max-outage",),
            metavar="SECONDS",
        ),
    ] = 600.0
    max_barren_requests: Annotated[
        Positive,
        FREE,
        Flag(
            "Stop after so many answers in a row without one accepted row; samples of which"
            " one row is made count as one."
        ),
    ] = 300
    max_requests: Annotated[Positive | None, FREE, Flag("Stop after this many requests.")] = None
    drain_timeout_s: Annotated[
        Seconds,
        FREE,
        Flag(
            "After a stop, wait so long for what is in flight.",
            names=("--drain-timeout",),
            metavar="SECONDS",
        ),
    ] = 120.0


class ShowSection(Section):
    """What a person or another program sees of the run while it goes on."""

    heading: ClassVar[str] = "What is shown"

    progress: Annotated[bool, FREE, Flag("A live block in a terminal, or else plain lines.")] = True
    log_format: Annotated[
        Literal["text", "json"],
        FREE,
        Flag("json: progress, notes, logs and the end as JSON Lines on standard error."),
    ] = "text"
    metrics_file: Annotated[
        Path | None, FREE, Flag("Keep counts for Prometheus' textfile collector here.")
    ] = None
