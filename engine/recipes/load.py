"""Where a recipe comes from: a built-in name, a TOML file, or a class in a user's Python."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.errors import ConfigError
from engine.recipes.alpaca import Alpaca, Seeded
from engine.recipes.base import Recipe

__all__ = ["ALPACA", "CODED", "load_recipe"]

ALPACA = "alpaca"
CODED = {
    ALPACA: "seed tasks in, new instruction records out",
    "magpie": "what users would say, from a chat model's own template",
    "respond": "answers to instructions, questions and chats",
}
"""Built-in recipes that are code; the others are files in ``builtin``."""


def load_recipe(
    spec: str, seeded: Seeded, options: Mapping[str, Any] | None = None, model: str = ""
) -> Recipe:
    """The recipe that ``spec`` names: ``alpaca`` or another built-in one, ``FILE.toml``,
    ``FILE.py:CLASS`` or ``package.module:CLASS``.

    Args:
        seeded: what Alpaca's is made with; the others do not need it.
        options: values for the options that the recipe declares.
        model: what is asked, as the run names it.

    Raises ConfigError with the remedy where there is no such recipe or it cannot be loaded.
    """
    if spec == ALPACA:
        return Alpaca(seeded)
    if spec in CODED:
        return _coded(spec, options or {}, model)
    where, colon, name = spec.rpartition(":")
    if colon and where and not spec.endswith(".toml"):
        if options:
            raise ConfigError(f"--set goes with a recipe of a TOML file, not with {spec}")
        return _of_class(where, name, spec)
    from engine.recipes.template import load_template

    return load_template(spec, options or {})


def _coded(name: str, options: Mapping[str, Any], model: str) -> Recipe:
    from engine.recipes.magpie import Magpie
    from engine.recipes.respond import Respond
    from engine.recipes.template import settle_options

    kind = Respond if name == Respond.name else Magpie
    values = settle_options(kind.OPTIONS, options, name)
    return Respond(**values) if kind is Respond else Magpie(model, **values)


def _of_class(where: str, name: str, spec: str) -> Recipe:
    module = _file_module(Path(where)) if where.endswith(".py") else _module(where, spec)
    found = getattr(module, name, None)
    if found is None:
        raise ConfigError(f"--recipe {spec}: there is no {name} in {module.__file__ or where}")
    try:
        recipe = found() if isinstance(found, type) else found
    except Exception as error:
        raise ConfigError(
            f"--recipe {spec}: {name}() raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"--recipe {spec}: {name} is no Recipe; derive it from engine.Recipe")
    return check(recipe, spec, module)


def check(recipe: Recipe, spec: str, module: ModuleType | None = None) -> Recipe:
    """The recipe, complete. Raises ConfigError for what it does not declare."""
    kind = type(recipe)
    if not recipe.name:
        recipe.name = kind.__name__.lower()
    if not recipe.fields or not all(isinstance(name, str) and name for name in recipe.fields):
        raise ConfigError(
            f"--recipe {spec}: {kind.__name__} has no fields; name those of a row, for example "
            'fields = ("question", "answer")'
        )
    for method in ("prompt", "parse"):
        if getattr(kind, method) is getattr(Recipe, method):
            raise ConfigError(f"--recipe {spec}: {kind.__name__} has no method {method}")
    if module is not None and not recipe.source_sha256 and module.__file__:
        recipe.source_sha256 = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
    return recipe


def _file_module(path: Path) -> ModuleType:
    name = f"woolmill_recipe_{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"--recipe {path}: there is no such file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as dataclasses and pickles of the file's own classes need it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"--recipe {path}: it cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    return module


def _module(name: str, spec: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:  # last: nothing of the folder comes before what is installed
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ConfigError(
            f"--recipe {spec}: {name} cannot be imported: {type(error).__name__}: {error}; give "
            "the file as FILE.py:CLASS, or start where the package is"
        ) from error
