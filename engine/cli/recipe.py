"""``woolmill recipe`` and ``woolmill preview``: look at a recipe before a run is paid for."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anyio
import click

from engine.cli.options import PATHS, Pair, Sectioned, pairs_of, section_options
from engine.errors import InputError
from engine.recipes.load import CODED
from engine.records import Decision
from engine.run.preview import Preview
from engine.settings import SECTIONS, load_config
from engine.text import shorten, visible

__all__ = ["preview", "recipe"]

MOST_SHOWN = 4_000
"""Characters of a value that is shown."""


@click.group()
def recipe() -> None:
    """Recipes: what is asked, and what is made of the answers."""


@recipe.command("list")
def list_recipes() -> None:
    """List the recipes that ship with woolmill."""
    from engine.recipes.template import builtin_templates, load_template

    rows = [(name, coded.description) for name, coded in CODED.items()]
    templates = [load_template(name, {}) for name in builtin_templates()]
    rows += [(each.name, each.file.recipe.description) for each in templates]
    width = max(len(name) for name, _ in rows)
    for name, description in sorted(rows):
        click.echo(f"{name:<{width}}  {description}".rstrip())


@recipe.command()
@click.argument("name")
def show(name: str) -> None:
    """Print a recipe to copy: a TOML file, or what a recipe in Python says of itself.

    \b
    woolmill recipe show rephrase > mine.toml
    """
    from engine.recipes.alpaca import Seeded
    from engine.recipes.load import load_recipe
    from engine.recipes.template import builtin_templates

    built_in = builtin_templates()
    if name in built_in:
        click.echo(built_in[name].read_text(encoding="utf-8"), nl=False)
        return
    found = load_recipe(name, Seeded(tasks=()), {})
    if name.endswith(".toml"):
        click.echo(Path(name).read_text(encoding="utf-8"), nl=False)
        return
    said = inspect.getmodule(type(found)) if found.builtin else type(found)
    click.echo(inspect.getdoc(said) or f"{type(found).__name__} says nothing of itself")
    click.echo(f"fields  {', '.join(found.fields)}")
    click.echo(f"source  {inspect.getsourcefile(type(found))}")


@recipe.command()
@click.argument("spec")
@click.option("--rows", type=PATHS["either"], help="Input rows. [those that the recipe names]")
@click.option("--set", "recipe_options", type=Pair(), multiple=True, callback=pairs_of,
              help="An option's value.")  # fmt: skip
@click.option("--answer", metavar="FILE|TEXT", help="A real answer, which is then damaged.")
def check(
    spec: str, rows: Path | None, recipe_options: dict[str, str] | None, answer: str | None
) -> None:
    """Try a recipe out: prompts and rows must be the same in every process, and no damaged answer
    may make its parser fail.

    \b
    woolmill recipe check mine.toml --rows personas.jsonl
    """
    from engine.run.check import check as run_check

    flags = {"recipe": spec, "rows": rows, "recipe_options": recipe_options}
    report = run_check(load_config(None, flags), _text_of(answer))
    seen = [f"rows {report.rows:,}", *(f"{name} {n:,}" for name, n in report.reasons.items())]
    click.echo(f"{report.prompts} prompts; {report.answers:,} damaged answers: {', '.join(seen)}")
    click.echo(f"slowest call {report.slowest_s * 1000:.1f} ms")
    for fault in report.faults:
        click.echo(f"fault: {visible(fault)}")
    if report.faults:
        count = len(report.faults)
        raise InputError(f"{spec}: {count} fault{'s' * (count > 1)}; see above")
    click.echo("sound: the same in two processes, and no answer makes it fail")
    if not report.rows:
        click.echo("no answer gave a row, so rules for rows were not tried; give one with --answer")


@click.command(cls=Sectioned)
@click.argument("spec")
@section_options(*SECTIONS, unlisted=("recipe", "target", "out"))
@click.option("-n", "count", type=click.IntRange(1, 100), default=3, help="Requests. [3]")
@click.option("--answer", metavar="FILE|TEXT", help="Take this as the answer; nobody is asked.")
def preview(
    spec: str, config_file: Path | None, count: int, answer: str | None, **flags: Any
) -> None:
    """Show the first prompts of a recipe, or have them answered.

    With a server or a model their answers and rows are shown too. Nothing is kept.

    \b
    woolmill preview mine.toml --rows personas.jsonl
    woolmill preview mine.toml --rows personas.jsonl --base-url http://127.0.0.1:8000/v1 -n 1
    """
    from engine.run.preview import preview as run_preview

    config = load_config(config_file, flags | {"recipe": spec})
    text = _text_of(answer)

    async def run() -> list[Preview]:
        return await run_preview(config, count, answer=text)

    previews = anyio.run(run)
    for each in previews:
        _show(each)
    first = previews[0].stage if previews else ""
    if first and all(each.stage == first for each in previews):
        asked = any(each.answer or each.fault for each in previews)
        why = "and none came of these requests" if asked else "name a --backend"
        click.echo(f"the stages behind {first} ask about its rows: {why}")


def _text_of(answer: str | None) -> str | None:
    """What ``--answer`` names: a file's text, ``-`` for standard input, or the text itself."""
    if answer is None:
        return None
    if answer == "-":
        return sys.stdin.read()
    try:
        if not Path(answer).is_file():
            return answer
        return Path(answer).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise InputError(f"{answer}: is not UTF-8") from error
        return answer


def _show(each: Preview) -> None:
    click.echo(f"━━ {each.stage + ': ' if each.stage else ''}request {each.index}")
    prompt = each.prompt
    if prompt is not None:
        if prompt.messages or prompt.api == "chat":
            for turn in prompt.chat:
                click.echo(f"── {turn.role}\n{visible(turn.content)}")
        else:
            click.echo(f"── completion\n{visible(prompt.text)}")
        click.echo(f"── sampling\n{_sampling(asdict(prompt.sampling))}")
    if each.fault:
        click.echo(f"── fault\n{visible(each.fault)}")
    if each.answer is not None:
        if each.answer.reasoning:
            click.echo(f"── thoughts\n{visible(each.answer.reasoning)}")
        click.echo(f"── answer ({each.answer.finish_reason})\n{visible(each.answer.text)}")
    for decision in each.decisions:
        click.echo(_outcome(decision))


def _sampling(sampling: dict[str, Any]) -> str:
    extra = sampling.pop("extra")
    # By identity: a temperature of 0.0 is given, though it equals False.
    given = {n: v for n, v in sampling.items() if v is not None and v is not False and v != ()}
    return visible(json.dumps(given | dict(extra), ensure_ascii=False, default=str))


def _outcome(decision: Decision) -> str:
    head = "── row" if decision.accepted else f"── refused: {decision.reason}"
    detail = f" ({shorten(decision.detail, 300)})" if decision.detail else ""
    values = [
        f"{name}: {visible(_value(value))[:MOST_SHOWN]}"
        for name, value in (decision.record or {}).items()
    ]
    return "\n".join([f"{head}{detail}", *values])


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
