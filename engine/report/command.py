"""``woolmill report`` and ``woolmill compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import orjson

from engine.cli.types import FILE
from engine.export import own_files
from engine.files import check_output, is_stream, new_output
from engine.loop import page as rounds
from engine.loop.ledger import LEDGER, Ledger, is_loop
from engine.report.analysis import analyse
from engine.report.compare import compare as compare_runs
from engine.report.html import html
from engine.report.markdown import markdown, table
from engine.store import RunStore
from engine.surroundings import spelt_out

__all__ = ["compare", "report"]

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--format", "format_", type=click.Choice(["html", "md", "json"]),
              help="[html with -o NAME.html, md with NAME.md, else json]")  # fmt: skip
@click.option("-o", "--output", type=FILE,
              help="Where it goes; without it, to standard output.")  # fmt: skip
@click.option("--recipe", default="",
              help="The run's recipe, where it is code: FILE.py:CLASS.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
def report(
    folder: Path, format_: str | None, output: Path | None, recipe: str, overwrite: bool
) -> None:
    """Show what a run did: figures, refusals, how alike its rows are. Works while it runs. Of a
    loop's folder: its rounds as curves.

    \b
    woolmill report runs/alpaca
    woolmill report runs/alpaca --format md
    woolmill report runs/alpaca -o report.html
    woolmill report runs/loop -o rounds.html
    """
    suffixes = {".html": "html", ".md": "md"}
    chosen = format_ or suffixes.get(output.suffix if output else "", "json")
    if output is not None:
        inputs = [folder / LEDGER, *own_files(folder)]
        check_output(output, overwrite=overwrite, inputs=inputs)
    text = _of_loop(folder, chosen) if is_loop(folder) else _of_run(folder, chosen, recipe)
    if output is None:
        click.echo(text, nl=False)
        return
    with new_output(output) as file:
        file.write(text.encode(errors="replace"))
    click.echo(f"{len(text.encode(errors='replace')):,} bytes  {output}", err=is_stream(output))


def _of_run(folder: Path, chosen: str, recipe: str) -> str:
    with RunStore.read(folder) as run:
        run.named_recipe = recipe
        if chosen == "html":
            return html(run)
        analysis = analyse(run)
    if chosen == "md":
        return markdown(analysis)
    # The figures stand at the top, so that a script finds them without knowing the rest.
    whole = {**analysis.pop("figures"), **analysis}
    whole["rejected_examples"] = {
        reason: told["examples"] for reason, told in whole["rejected"].items()
    }
    whole["rejected"] = {r: told["count"] for r, told in whole["rejected"].items()}
    return _json(whole)


def _of_loop(folder: Path, chosen: str) -> str:
    ledger = Ledger(folder)
    if chosen == "html":
        return rounds.html(ledger)
    return rounds.markdown(ledger) if chosen == "md" else _json(rounds.told(ledger))


def _json(value: Any) -> str:
    return orjson.dumps(spelt_out(value), option=orjson.OPT_INDENT_2).decode() + "\n"


@click.command()
@click.argument("one", type=FOLDER)
@click.argument("other", type=FOLDER)
@click.option("--format", "format_", type=click.Choice(["md", "json"]), default="md",
              show_default=True, help="A table, or everything as JSON.")  # fmt: skip
def compare(one: Path, other: Path, format_: str) -> None:
    """Show two runs side by side: figures, settings, overlap.

    \b
    woolmill compare runs/alpaca runs/other-model
    """
    with RunStore.read(one) as first, RunStore.read(other) as second:
        told = compare_runs(first, second)
    if format_ == "json":
        click.echo(orjson.dumps(spelt_out(told), option=orjson.OPT_INDENT_2))
        return
    rows = [(name, *values) for name, values in told["figures"].items()]
    rows.append(("accepted of the pieces", *map(_percent, told["acceptance"])))
    rows += [(f"refused: {r}", *map(_percent, shares)) for r, shares in told["rejected"].items()]
    rows.append(("near-duplicates of the other run", *map(_percent, told["overlap"])))
    click.echo(table(("", *told["runs"]), rows))
    for difference in told["settings"]:
        click.echo(f"\n* {difference}", nl=False)
    if told["settings"]:
        click.echo()


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
