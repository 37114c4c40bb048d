"""Flags made from the settings: one for each that has a ``Flag``, under its section's heading."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
import orjson
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from engine.cli.types import FILE, PLACE, Place
from engine.sections import Flag, Section, flag_of
from engine.settings import SECTIONS, flag_name

__all__ = ["PATHS", "Pair", "Sectioned", "pairs_of", "run_options", "section_options"]

PATHS = {"file": FILE, "folder": Place(path_type=Path, file_okay=False), "either": PLACE}
AGAIN = "; again for several."


class _IntOrAuto(click.ParamType[int | str]):
    name = "N|auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        return "auto" if value == "auto" else int(click.INT.convert(value, param, ctx))


class Pair(click.ParamType[tuple[str, str]]):
    name = "NAME=VALUE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        name, sign, rest = str(value).partition("=")
        if not sign:
            self.fail(f"{value}: write NAME=VALUE", param, ctx)
        return name, rest


class _Object(click.ParamType[dict[str, Any]]):
    name = "JSON"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, Any]:
        try:
            made = orjson.loads(value)
        except orjson.JSONDecodeError as exc:
            self.fail(f"not JSON ({exc})", param, ctx)
        if not isinstance(made, dict):
            self.fail('write an object, for example {"top_k": 40}', param, ctx)
        return made


class _SectionOption(click.Option):
    """An option that knows its heading in the help."""

    heading = ""


class Sectioned(click.Command):
    """A command whose help shows the settings' flags under the headings of their sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            heading = param.heading if isinstance(param, _SectionOption) else "Options"
            if (record := param.get_help_record(ctx)) is not None:
                sections.setdefault(heading, []).append(record)
        own = sections.pop("Options", [])
        for heading, records in [*sections.items(), ("Options", own)]:
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def run_options(function: Any) -> Any:
    """``--config`` and the flag of every setting of a run."""
    return section_options(*SECTIONS)(function)


def section_options(
    *sections: type[Section], unlisted: Collection[str] = ()
) -> Callable[[Any], Any]:
    """``--config`` and every flag of the sections. One that was not given is None, or empty, so
    that the file's value stands.

    Args:
        unlisted: settings that mean nothing to this command: taken, as the flags of a run are
            given to it unchanged, and not shown in its help.
    """
    config = click.option(
        "--config", "config_file", type=FILE, help="Settings in TOML; flags go first."
    )

    def decorate(function: Any) -> Any:
        for section in reversed(sections):
            for name, field in reversed(section.model_fields.items()):
                if (flag := flag_of(field)) is not None:
                    function = _option(name, field, flag, section.heading)(function)
                    if name in unlisted:
                        function.__click_params__[-1].hidden = True
        return config(function)

    return decorate


def pairs_of(
    ctx: click.Context, param: click.Parameter, value: tuple[tuple[str, str], ...]
) -> dict[str, str] | None:
    """The pairs of an option as a mapping; None where none was given."""
    return dict(value) or None


def _option(
    name: str, field: FieldInfo, flag: Flag, heading: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    kind, several = _plain(field.annotation), False
    given: dict[str, Any] = {}
    words = flag.help
    if get_origin(kind) is tuple:
        kind, several = _plain(get_args(kind)[0]), True
    if flag.metavar == "JSON":
        given["type"] = _Object()
    elif get_origin(kind) is dict:
        several = True
        given |= {"type": Pair(), "callback": pairs_of}
    elif flag.metavar is not None and flag.metavar.endswith(",…"):
        given["type"] = str
    elif kind is bool:
        given["is_flag"] = True
    elif kind is Path:
        given["type"] = PATHS[flag.path]
    elif get_origin(kind) is Literal:
        given["type"] = click.Choice(get_args(kind))
    elif kind in (int, float, str):
        given["type"] = kind
    else:
        given["type"] = _IntOrAuto()
    if several:
        given["multiple"] = True
        words = words.removesuffix(".") + AGAIN
    names = list(flag.names or [flag_name(name)])
    if kind is bool and field.default is not False:
        names = [f"{each}/--no-{each.removeprefix('--')}" for each in names]
    shown = flag.shown or _shown(field.default)
    option = click.option(
        *names,
        name,
        cls=_SectionOption,
        default=None,
        metavar=flag.metavar,
        help=f"{words} {f'[{shown}]' if shown else ''}".strip(),
        **given,
    )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        made = option(function)
        made.__click_params__[-1].heading = heading  # type: ignore[attr-defined]
        return made

    return decorate


def _plain(annotation: Any) -> Any:
    """A type without its bounds and without None."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [_plain(kind) for kind in get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else tuple(kinds)
    return annotation


def _shown(default: Any) -> str:
    if isinstance(default, bool | BaseModel) or default is None or default in ((), {}):
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)
