"""Writes ``docs/reference.md`` from the code: every setting, exit code and command.

python -m scripts.reference [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
from pydantic.fields import FieldInfo

from engine import errors
from engine.cli.main import cli
from engine.sections import OnResume, Section, flag_of
from engine.settings import SECTIONS, flag_name

PATH = Path(__file__).parents[1] / "docs" / "reference.md"
WIDTH = 100
HEAD = """# Reference

Made from the code by `python -m scripts.reference`.

## Settings

A settings file (`woolmill init`) has them by their names, the command line by their flags, Python
by keyword. *When it goes on*: what becomes of a setting when a run is resumed. *May change*: it
says when and where, never what. *Decides*: it shapes which rows are accepted; `woolmill redecide`
decides the same answers again under another value. *Fixed*: it shapes the requests, for the life
of the run. A file may also have tables `[models.NAME]` for the stages of a recipe that name a
model of their own, with the settings of *The model*, *Hosts*, *How much at once* and *Prices*.
"""


def reference() -> str:
    """The whole page."""
    settings = [table(section) for section in SECTIONS]
    return "\n".join([HEAD, *settings, exit_codes(), "## Commands\n", *commands(cli, "woolmill")])


def table(section: type[Section]) -> str:
    rows = [
        f"### {section.heading}\n",
        "| setting | flag | default | what | when it goes on |",
        "|---|---|---|---|---|",
    ]
    for name, field in section.model_fields.items():
        flag = flag_of(field)
        words = flag.help if flag else field.description or ""
        given = f"`{flag_name(name)}`" if flag else "in a file"
        rows.append(f"| `{name}` | {given} | {default(field)} | {cell(words)} | {resume(field)} |")
    return "\n".join([*rows, ""])


def default(field: FieldInfo) -> str:
    flag = flag_of(field)
    if flag and flag.shown:
        return cell(flag.shown)
    value = field.default
    if value is None or value in ((), {}) or hasattr(value, "model_dump"):
        return "none"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def resume(field: FieldInfo) -> str:
    if OnResume.FREE in field.metadata:
        return "may change"
    return "decides" if OnResume.DECISION in field.metadata else "fixed"


def exit_codes() -> str:
    """The tree of errors with their codes, as the module of errors tells it."""
    doc = errors.__doc__ or ""
    tree, _, rest = doc.partition("\n\nThe codes follow")
    lines = [line.removeprefix("    ") for line in tree.splitlines()[2:]]
    return "\n".join(
        ["## Exit codes\n", "```text", *lines, "```\n", f"The codes follow{rest.rstrip()}\n"]
    )


def commands(group: click.Group, name: str, parent: click.Context | None = None) -> list[str]:
    """What ``--help`` prints of each command of a group."""
    context = click.Context(
        group, info_name=name, parent=parent, terminal_width=WIDTH, **group.context_settings
    )
    pages: list[str] = []
    for each in group.list_commands(context):
        command = group.get_command(context, each)
        assert command is not None
        if isinstance(command, click.Group):
            pages += commands(command, each, context)
            continue
        text = command.get_help(click.Context(command, info_name=each, parent=context))
        if each in ("generate", "preview"):  # their flags are the settings above
            text = text[: text.index("\nWhat is made:")].rstrip() + text[text.index("\nOptions:") :]
        pages.append(f"### {context.command_path} {each}\n\n```text\n{text.rstrip()}\n```\n")
    return pages


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> None:
    made = reference()
    if "--check" not in sys.argv:
        PATH.write_text(made, encoding="utf-8")
    elif PATH.read_text(encoding="utf-8") != made:
        sys.exit(f"{PATH.name} is stale: python -m scripts.reference")


if __name__ == "__main__":
    main()
