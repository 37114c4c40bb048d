"""Values for the options that a recipe declares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError
from engine.recipes.template_file import Option
from engine.text import nearest

__all__ = ["settle_options"]


def settle_options(
    declared: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Each option's value. Raises ConfigError for what the file does not declare."""
    values = {
        name: option.default if isinstance(option, Option) else option
        for name, option in declared.items()
    }
    for name, value in given.items():
        if name not in declared:
            hint = nearest(name, declared)
            raise ConfigError(f"--set {name}: {where} has no such option; {hint}")
        values[name] = _converted(name, value, values[name])
        option = declared[name]
        if isinstance(option, Option) and values[name] not in option.choices:
            choices = ", ".join(map(str, option.choices))
            raise ConfigError(f"--set {name}={value}: choose one of {choices}")
    return values


def _converted(name: str, value: Any, default: Any) -> Any:
    """A value of the default's type; text from the command line is read as JSON for others."""
    if isinstance(value, str) and not isinstance(default, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ConfigError(f"--set {name}={value}: write {_kind(default)}") from None
    same = isinstance(value, bool) == isinstance(default, bool)
    number = isinstance(default, float) and isinstance(value, int)
    if not same or not (number or isinstance(value, type(default))):
        raise ConfigError(f"--set {name}={value}: write {_kind(default)}")
    return value


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    kinds: dict[type, str] = {int: "a whole number", float: "a number", list: "a JSON list"}
    return kinds.get(type(value), "a text" if isinstance(value, str) else "a JSON object")
