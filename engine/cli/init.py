"""``woolmill init``: write a settings file that explains itself."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import click

from engine.cli.types import FILE
from engine.files import check_output, is_stream, new_output

__all__ = ["init", "template"]


def template() -> str:
    """Every setting with its default, commented out."""
    return (resources.files("engine") / "data" / "run.toml").read_text(encoding="utf-8")


@click.command()
@click.argument("path", type=FILE, default="woolmill.toml")
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
def init(path: Path, overwrite: bool) -> None:
    """Write a commented settings file. [PATH: woolmill.toml]

    \b
    woolmill init
    woolmill generate --config woolmill.toml
    """
    check_output(path, overwrite=overwrite)
    with new_output(path) as file:
        file.write(template().encode())
    click.echo(f"{path}\nuse it with: woolmill generate --config {path}", err=is_stream(path))
