"""Where a recipe comes from: a built-in name, a TOML file, or a class in a user's Python."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from engine.errors import ConfigError, WoolmillError
from engine.recipes.alpaca import Seeded
from engine.recipes.base import Recipe

__all__ = [
    "ALPACA",
    "CODED",
    "check",
    "file_module",
    "is_code",
    "load_recipe",
    "module_folders",
    "not_while_loading",
    "runs_as_program",
]

ALPACA = "alpaca"
"""The default recipe; a run that names none is from before there were others."""


class Coded(NamedTuple):
    """A built-in recipe that is code."""

    description: str
    module: str
    """Below ``engine.recipes``."""
    kind: str
    """The class."""


CODED = {
    ALPACA: Coded("seed tasks in, new instruction records out", "alpaca", "Alpaca"),
    "cot-self-instruct": Coded(
        "new questions with an answer that fresh answers agree with",
        "cot_self_instruct",
        "CotSelfInstruct",
    ),
    "evol": Coded("instructions made harder or other, round by round", "evol", "Evol"),
    "magpie": Coded("what users would say, from a chat model's own template", "magpie", "Magpie"),
    "pairwise": Coded(
        "which of two answers is better, judged in both orders", "pairwise", "Pairwise"
    ),
    "reason": Coded("n traces for each question, their majority, checked", "reason", "Reason"),
    "respond": Coded("answers to instructions, questions and chats", "respond", "Respond"),
    "self-instruct": Coded(
        "instructions from seeds and its own, then their instances", "self_instruct", "SelfInstruct"
    ),
}
"""Built-in recipes that are code; the others are files in ``builtin``."""
AS_PROGRAM = (
    'put what starts a run below `if __name__ == "__main__":`, since other processes load the '
    "file for its recipe"
)
"""Advice where importing a recipe would start a run within the run."""
_loading: ContextVar[str] = ContextVar("_loading", default="")
"""The spec whose module is being loaded now."""
_one_loads = threading.RLock()
"""Of several runs in a process one loads at a time: no other sees half of a module."""


def load_recipe(
    spec: str, seeded: Seeded, options: Mapping[str, Any] | None = None, model: str = ""
) -> Recipe:
    """The recipe that ``spec`` names: ``alpaca`` or another built-in one, ``FILE.toml``,
    ``FILE.py:CLASS`` or ``package.module:CLASS``.

    Args:
        seeded: what recipes that take seeds are made with.
        options: values for the options that the recipe declares.
        model: what is asked, as the run names it.

    Raises ConfigError with the remedy where there is no such recipe or it cannot be loaded.
    """
    if spec in CODED:
        return _coded(spec, seeded, options or {}, model)
    where, name = _code_of(spec)
    if where:
        if options:
            raise ConfigError(f"--set goes with a recipe of a TOML file, not with {spec}")
        return _of_class(where, name, spec, seeded)
    from engine.recipes.template import load_template

    return load_template(spec, options or {})


def _coded(name: str, seeded: Seeded, options: Mapping[str, Any], model: str) -> Recipe:
    """A built-in recipe, made with what it takes. Raises ConfigError for other options."""
    from engine.recipes.options import settle_options

    coded = CODED[name]
    kind = getattr(importlib.import_module(f"engine.recipes.{coded.module}"), coded.kind)
    values = settle_options(kind.OPTIONS, options, name)
    # One that is made of a model's own chat template must know the model.
    first = [seeded] * kind.takes_seeds + [model] * kind.raw
    recipe: Recipe = kind(*first, **values)
    return recipe


def _code_of(spec: str) -> tuple[str, str]:
    """A Python file or module and a name in it; two empty texts where ``spec`` is no code."""
    where, _, name = spec.rpartition(":")
    return (where, name) if where and not spec.endswith(".toml") else ("", "")


def is_code(spec: str) -> bool:
    """Whether a recipe is a class in somebody's Python."""
    return bool(_code_of(spec)[0])


def module_folders(spec: str) -> list[str]:
    """For another process that is to load ``spec``: where this one finds modules. None where the
    recipe is no code of the user's: then nothing beyond what is installed may be imported.
    """
    here = [str(Path(entry).absolute()) for entry in sys.path]
    return here if _code_of(spec)[0] else []


def not_while_loading() -> None:
    """Raises ConfigError where a recipe's module starts a run of its own while it is loaded."""
    if spec := _loading.get():
        raise ConfigError(f"--recipe {spec}: loading it starts a run; {AS_PROGRAM}")


@contextmanager
def _loads(spec: str) -> Iterator[None]:
    with _one_loads:
        token = _loading.set(spec)
        try:
            yield
        finally:
            _loading.reset(token)


def _of_class(where: str, name: str, spec: str, seeded: Seeded) -> Recipe:
    with _loads(spec):
        module = file_module(Path(where)) if where.endswith(".py") else _module(where, spec)
    try:
        found = attrgetter(name)(module)
    except AttributeError:
        raise ConfigError(
            f"--recipe {spec}: there is no {name} in {module.__file__ or where} when it is loaded;"
            " define it at the top level, outside of functions and of `if __name__ == ...`"
        ) from None
    try:
        recipe = found
        if isinstance(found, type):
            recipe = found(*[seeded] * getattr(found, "takes_seeds", False))
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
    example = 'for example fields = ("question", "answer")'
    fields = recipe.fields
    if not fields or isinstance(fields, str) or not all(isinstance(f, str) and f for f in fields):
        raise ConfigError(
            f"--recipe {spec}: {kind.__name__} has no fields; name those of a row, {example}"
        )
    if len(set(fields)) < len(fields):
        raise ConfigError(f"--recipe {spec}: {kind.__name__} names a field twice; {example}")
    for method in ("prompt", "parse"):
        if getattr(kind, method) is getattr(Recipe, method):
            raise ConfigError(f"--recipe {spec}: {kind.__name__} has no method {method}")
    if module is not None and not recipe.source_sha256 and module.__file__:
        recipe.source_sha256 = _code_sha256(Path(module.__file__))
    return recipe


def file_module(path: Path, flag: str = "--recipe") -> ModuleType:
    """A Python file as a module, loaded once for each content. Raises ConfigError, which names
    ``flag`` and the file.
    """
    try:
        code = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be read: {error.strerror}") from error
    # By its content too: a file that was edited since is another module.
    name = hashlib.sha256(b"%b\0%b" % (os.fsencode(path.absolute()), code)).hexdigest()[:12]
    name = f"woolmill_recipe_{name}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # as its name ends in .py
    assert spec.loader is not None
    beside = str(path.absolute().parent)
    if beside not in sys.path:  # last: nothing of the folder comes before what is installed
        sys.path.append(beside)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as dataclasses and pickles of the file's own classes need it
    try:
        spec.loader.exec_module(module)
    except WoolmillError:
        del sys.modules[name]
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(
            f"{flag} {path}: it cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    return module


def _module(name: str, spec: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:  # last: nothing of the folder comes before what is installed
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except WoolmillError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"--recipe {spec}: {name} cannot be imported: {type(error).__name__}: {error}; give "
            "the file as FILE.py:CLASS, or start where the package is"
        ) from error


def _code_sha256(file: Path) -> str:
    """Of a Python file without what runs only where it is started as a program, so that a script
    may be edited there and its run goes on.
    """
    code = file.read_bytes()
    lines = code.splitlines(keepends=True)
    with suppress(SyntaxError, ValueError):  # compiled code is hashed as it is
        for statement in filter(runs_as_program, ast.parse(code).body):
            for number in range(statement.lineno - 1, statement.end_lineno or statement.lineno):
                lines[number] = b""
    return hashlib.sha256(b"".join(lines)).hexdigest()


def runs_as_program(statement: ast.stmt) -> bool:
    """Whether a statement of a module's top level is an ``if __name__ == ...:``."""
    return isinstance(statement, ast.If) and any(
        isinstance(node, ast.Name) and node.id == "__name__" for node in ast.walk(statement.test)
    )
