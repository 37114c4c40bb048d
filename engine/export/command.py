"""``woolmill export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from engine.export import export_dataset
from engine.export.formats import FORMATS
from engine.store import RunStore

__all__ = ["export"]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--format", "format_", type=click.Choice(FORMATS), default="alpaca",
              show_default=True, help="What is written.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True,
              help="A file; a folder for datasets, --validation and --shard-rows.")  # fmt: skip
@click.option("--with-similarity", is_flag=True,
              help="alpaca: add most_similar_instructions and avg_similarity_score.")  # fmt: skip
@click.option("--validation", type=float, default=0.0, metavar="SHARE",
              help="Share of rows to validate with; no near-duplicate straddles.")  # fmt: skip
@click.option("--shard-rows", type=click.IntRange(min=1), help="Rows in a file at most.")
@click.option("--overwrite", is_flag=True, help="Replace also what this run did not export.")
def export(
    folder: Path,
    format_: Any,
    output: Path,
    with_similarity: bool,
    validation: float,
    shard_rows: int | None,
    overwrite: bool,
) -> None:
    """Write a run's accepted records as a dataset. Works while the run goes on.

    \b
    woolmill export runs/alpaca -o alpaca_data.json
    woolmill export runs/alpaca --format messages -o chat.jsonl
    woolmill export runs/alpaca --format datasets --validation 0.02 -o my-dataset
    """
    with RunStore.read(folder) as run:
        written = export_dataset(
            run,
            format_,
            output,
            with_similarity=with_similarity,
            validation=validation,
            shard_rows=shard_rows,
            overwrite=overwrite,
        )
    parts = written.split
    held_out = f", {parts.rows} of them validation" if parts is not None else ""
    click.echo(f"{written.records} records{held_out}  {output}")
