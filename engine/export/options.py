"""What is asked of an export, and which of it goes together."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import UsageError
from engine.export import formats
from engine.export.formats import Format
from engine.export.layout import Layout, check_alpaca
from engine.export.split import ROUGE_LINK

__all__ = ["Options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The default is all accepted rows, in plan order, in one file."""

    with_similarity: bool = False
    """``alpaca`` only: add what its ``regen.json`` has besides."""
    reasoning: bool = False
    """Keep the thoughts of answers, where the format has a place for them."""
    group: bool = False
    """``jsonl`` only: all rows made of one input row on one line."""
    all_samples: bool = False
    """``jsonl`` only: also the samples that rows were made of."""
    lineage: bool = False
    """``jsonl`` and tables: what each row was made of in the stages before."""
    by: str | None = None
    """``preference`` only, which needs it: the field with the score."""
    best: str | None = None
    """Of the samples of each input row only the one with the highest value of this field."""
    refused: bool = False
    """``jsonl`` only: the refused pieces instead of the rows; see ``engine.export.refused``."""
    outcomes: bool = False
    """``jsonl`` only: what became of each input row; see ``engine.export.outcomes``."""
    take: int | None = None
    """So many rows; with ``group``, lines. For this and the next two see
    ``engine.export.choice.choose``."""
    sort: str | None = None
    top: int | None = None
    validation: float | None = None
    """Share of the rows for a validation part that no near-duplicate straddles."""
    validation_threshold: float = ROUGE_LINK
    """The ROUGE-L F from which two rows may not straddle; see ``engine.export.split``."""
    shard_rows: int | None = None
    """Rows in a file at most; None: all in one."""

    def folder_of(self, format: Format | None) -> bool:
        """Whether a folder is written."""
        return format == "datasets" or self.validation is not None or self.shard_rows is not None

    @property
    def choosing(self) -> str:
        """The flags that choose among the rows; empty: all are written."""
        flags = {"best": self.best, "take": self.take, "sort": self.sort, "top": self.top}
        return " ".join(f"--{name}={value}" for name, value in flags.items() if value is not None)

    def check(self, format: Format, layout: Layout) -> None:
        """Raises UsageError or ConfigError for what cannot be had of these rows in this format."""
        if self.refused or self.outcomes:
            if format != "jsonl" or self not in (Options(refused=True), Options(outcomes=True)):
                flag = "--refused" if self.refused else "--outcomes"
                raise UsageError(f"{flag} goes alone, with --format jsonl")
            return
        if self.validation_threshold != ROUGE_LINK and self.validation is None:
            raise UsageError("--validation-threshold goes with --validation")
        if format == "alpaca":
            check_alpaca(layout)
        if self.reasoning and format not in formats.WITH_REASONING:
            raise UsageError(
                f"--reasoning keep: --format {format} has no place for thoughts; choose "
                f"{', '.join(sorted(formats.WITH_REASONING))}"
            )
        if self.group and layout.samples is None:
            raise UsageError("--group needs a run with input rows (woolmill generate --rows)")
        if self.group and (format != "jsonl" or self.folder_of(format) or self.sort is not None):
            raise UsageError(
                "--group goes with --format jsonl, and without --sort, --validation and "
                "--shard-rows"
            )
        self._check_stages(format)

    def _check_stages(self, format: Format) -> None:
        """The same for samples, lineage and pairs."""
        if (self.by is not None) != (format == "preference"):
            raise UsageError(
                "--format preference needs --by: name the field with the score, as in --by score"
                if self.by is None
                else "--by goes with --format preference"
            )
        if self.all_samples and format != "jsonl":
            raise UsageError("--all-samples goes with --format jsonl")
        if self.lineage and format not in formats.WITH_PROVENANCE:
            raise UsageError(
                f"--lineage: --format {format} has no place for it; choose "
                f"{', '.join(sorted(formats.WITH_PROVENANCE))}"
            )
        whole = self.take is None and self.sort is None and not self.folder_of(format)
        if self.best is not None and (self.by is not None or self.all_samples or self.group):
            raise UsageError("--best goes without --by, --all-samples and --group")
        if self.all_samples and not whole:
            raise UsageError(
                "--all-samples goes without --take, --sort, --top, --validation and --shard-rows"
            )
        if self.by is not None and (self.take, self.sort, self.shard_rows) != (None,) * 3:
            raise UsageError("--format preference goes without --take, --sort, --top, --shard-rows")
