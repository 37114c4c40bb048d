"""``woolmill export``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from engine.cli.types import PLACE, SHARE, Finite
from engine.datasets import BAD_ROWS
from engine.export import Options, export_dataset
from engine.export.formats import FORMATS
from engine.export.split import ROUGE_LINK
from engine.files import is_stream
from engine.store import RunStore
from engine.text import counted

__all__ = ["export"]

SHORT = 0.9
"""Of the groups wanted for validation; where there are fewer, that is said."""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--format", "format_", type=click.Choice(FORMATS),
              help="What is written. [as -o ends: .json, .jsonl, .csv or .parquet]")  # fmt: skip
@click.option("-o", "--output", type=PLACE, required=True,
              help="A file; a folder for datasets, --validation and --shard-rows.")  # fmt: skip
@click.option("--with-similarity", is_flag=True,
              help="alpaca: add most_similar_instructions and avg_similarity_score.")  # fmt: skip
@click.option("--reasoning", type=click.Choice(["keep", "drop"]), default="drop",
              show_default=True,
              help="Thoughts: as reasoning_content in messages, else as a column.")  # fmt: skip
@click.option("--group", is_flag=True,
              help="jsonl: all rows made of one input row on one line.")  # fmt: skip
@click.option("--all-samples", is_flag=True,
              help="jsonl: also the samples that rows were made of.")  # fmt: skip
@click.option("--lineage", is_flag=True,
              help="jsonl and tables: what each row was made of in earlier stages.")  # fmt: skip
@click.option("--by", metavar="FIELD", help="preference: the field with the score.")
@click.option("--best", metavar="FIELD",
              help="Of each input row's samples only that with the highest FIELD.")  # fmt: skip
@click.option("--refused", is_flag=True,
              help="jsonl: what was refused instead, with reason, answer and input.")  # fmt: skip
@click.option("--outcomes", is_flag=True,
              help="jsonl: what became of each input row instead, through all stages.")  # fmt: skip
@click.option("--take", type=click.IntRange(min=0), metavar="N",
              help="Only the first N rows; with --group the first N lines.")  # fmt: skip
@click.option("--sort", metavar="FIELD",
              help="Sort by a number or by length(FIELD); -FIELD: from high to low.")  # fmt: skip
@click.option("--top", type=click.IntRange(min=0), metavar="N",
              help="Only the first N rows in the order of --sort.")  # fmt: skip
@click.option("--validation", type=Finite(0, 1, min_open=True, max_open=True), metavar="SHARE",
              help="Share of rows to validate with; no near-duplicate straddles.")  # fmt: skip
@click.option("--validation-threshold", type=SHARE,
              default=ROUGE_LINK, show_default=True, metavar="F",
              help="From this ROUGE-L F on, two rows are near-duplicates for --validation.",
              )  # fmt: skip
@click.option("--shard-rows", type=click.IntRange(min=1), help="Rows in a file at most.")
@click.option("--recipe", default="",
              help="The run's recipe, where it is code: FILE.py:CLASS.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace also what this run did not export.")
def export(
    folder: Path,
    format_: Any,
    output: Path,
    reasoning: str,
    recipe: str,
    overwrite: bool,
    **options: Any,
) -> None:
    """Write a run's accepted records as a dataset. Works while the run goes on.

    \b
    woolmill export runs/alpaca -o alpaca_data.json
    woolmill export runs/alpaca --format messages -o chat.jsonl
    woolmill export runs/alpaca -o rows.parquet
    woolmill export runs/alpaca --format datasets --validation 0.02 -o my-dataset
    woolmill export runs/judged --sort=-score --top 500 -o best.jsonl
    woolmill export runs/judged --best score -o best-of-four.jsonl
    woolmill export runs/judged --format preference --by score -o pairs.jsonl
    woolmill export runs/alpaca --refused -o refused.jsonl
    woolmill export runs/judged --outcomes -o outcomes.jsonl
    """
    with RunStore.read(folder) as run:
        run.named_recipe = recipe
        wanted = Options(reasoning=reasoning == "keep", **options)
        written = export_dataset(run, format_, output, wanted, overwrite=overwrite)
    parts = written.split
    held_out = f", {parts.rows} of them validation" if parts is not None else ""
    noun = "pair" if written.format == "preference" else "record"
    noun = "refused piece" if wanted.refused else "input row" if wanted.outcomes else noun
    say = partial(click.echo, err=is_stream(output))
    say(f"{counted(written.records, noun)}{held_out}  {output}")
    if parts is not None and parts.groups < SHORT * parts.wanted:
        say(
            f"{parts.wanted:,} were wanted for validation, and {parts.groups:,} can be held out: "
            "the others resemble rows outside their group, or ask the same"
        )
    if written.outcomes:
        say(", ".join(f"{count:,} {outcome}" for outcome, count in written.outcomes))
    if written.unread:
        unread = counted(written.unread, "row")
        say(f"{unread} besides cannot be read, named in {folder / BAD_ROWS}")
    if written.unlisted:
        say(f"rows that nobody was asked about have no line: {written.unlisted}")
    for why, count in written.unpaired:
        say(f"input rows without a pair, {why}: {count}")
    if written.unscored:
        say(f"input rows without a row, none of whose samples has a score: {written.unscored}")
    if written.as_json:
        say(f"columns that hold JSON text: {', '.join(written.as_json)}")
    if written.left_out:
        say(f"fields left out, as the format has no place for them: {', '.join(written.left_out)}")
    if written.unsorted:
        unsorted = counted(written.unsorted, "row")
        say(f"{unsorted} without a value to sort by at the end")
