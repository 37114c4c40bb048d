"""``woolmill batch export`` and ``import``: batches that are carried to where they are answered, as
to a cluster without a network, and back.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import orjson

from engine.backends.batch.lines import read_lines
from engine.backends.batch.local import answers_path
from engine.backends.batch.openai import openai_result
from engine.errors import InputError
from engine.files import new_file
from engine.run.batches.command import waiting
from engine.text import counted

__all__ = ["batch"]

RUN = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)


@click.group()
def batch() -> None:
    """Carry batches elsewhere and back, as files.

    They have the format of OpenAI's batches and of vLLM's run-batch.
    """


@batch.command("export")
@click.argument("folder", type=RUN)
@click.option("-o", "--output", type=FILE, required=True, help="File for the requests.")
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
def export_requests(folder: Path, output: Path, overwrite: bool) -> None:
    """Write the requests of the run in FOLDER that wait for answers, a line each.

    \b
    woolmill generate --backend batch --provider file --wait 0 --model M --out runs/far
    woolmill batch export runs/far -o requests.jsonl
    vllm run-batch -i requests.jsonl -o answers.jsonl --model M
    woolmill batch import runs/far answers.jsonl
    """
    if output.exists() and not overwrite:
        raise InputError(f"{output}: is there already; give another name, or --overwrite")
    lines = 0
    with new_file(output) as file:
        for place, row in waiting(folder):
            for line in _requests(place / f"{row.tag}.jsonl"):
                file.write(line)
                lines += 1
    click.echo(f"{counted(lines, 'request')}  {output}")


@batch.command("import")
@click.argument("folder", type=RUN)
@click.argument("answers", type=FILE, nargs=-1, required=True)
@click.option("--partial", is_flag=True, help="Take what is there; the rest is asked again.")
def import_answers(folder: Path, answers: tuple[Path, ...], partial: bool) -> None:
    """Bring answers to the requests that ``export`` wrote, in any order.

    The run's own command then goes on with them.
    """
    batches = {row.tag: place for place, row in waiting(folder)}
    tags: dict[str, str] = {}
    for tag, place in batches.items():
        for line in _requests(place / f"{tag}.jsonl"):
            tags[orjson.loads(line)["custom_id"]] = tag
    strange = 0
    offsets: dict[str, tuple[Path, int]] = {}
    for path in answers:
        for offset, line in read_lines(path):
            id = _answered(line)
            if id is None or id not in tags:
                strange += 1
            else:
                offsets.setdefault(id, (path, offset))
    missing = len(tags) - len(offsets)
    if missing and not partial:
        raise InputError(
            f"{answers[0]}: {missing:,} of {len(tags):,} requests have no answer; bring all files"
            " at once, or take what is there and ask again for the rest with --partial"
        )
    for tag, place in batches.items():
        with new_file(answers_path(place, tag)) as file:
            for path in answers:
                for offset, line in read_lines(path):
                    id = _answered(line)
                    if id is not None and tags.get(id) == tag and offsets[id] == (path, offset):
                        file.write(line.rstrip(b"\n") + b"\n")
    said = f", {strange:,} lines that answer none of them left out" if strange else ""
    click.echo(
        f"{len(offsets):,} answers to {len(tags):,} requests{said}; the run's own command goes on"
        " with them"
    )


def _requests(path: Path) -> Iterator[bytes]:
    try:
        for _, line in read_lines(path):
            yield line
    except OSError as exc:
        raise InputError(f"{path}: the requests are gone ({exc.strerror})") from exc


def _answered(line: bytes) -> str | None:
    """The id that a line of answers is about; None where it is no such line."""
    try:
        parsed: Any = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    result = openai_result(parsed)
    return result.id if result is not None and result.ran else None
