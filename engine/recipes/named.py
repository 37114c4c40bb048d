"""How another process gets at a recipe that a program has as an object: by a name to import.

Nothing is pickled. So a recipe must be a class whose constructor needs nothing, or an object at
the top level of a module; what is not is refused before anything is asked.
"""

from __future__ import annotations

import ast
import sys
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, ModuleType

from engine.errors import ConfigError
from engine.recipes.base import Recipe
from engine.recipes.load import AS_PROGRAM, runs_as_program

__all__ = ["spec_of"]

MAIN = "__main__"
"""The name of a script's module while it runs; another process cannot import it by that."""


def spec_of(recipe: str | Recipe | type[Recipe]) -> str:
    """The spec that ``load_recipe`` takes for a recipe: a spec as it is; for a class or an object
    ``module:NAME``, or ``FILE.py:NAME`` where it is in the script that runs.

    Raises ConfigError where no other process could have it by a name.
    """
    if isinstance(recipe, str):
        return recipe
    if isinstance(recipe, type) and issubclass(recipe, Recipe):
        return _spec_of_class(recipe)
    if not isinstance(recipe, Recipe):
        kind = recipe.__name__ if isinstance(recipe, type) else f"a {type(recipe).__name__}"
        raise ConfigError(
            f"recipe: {kind} is no recipe; give a name, a file's name, or a class derived from "
            "engine.Recipe"
        )
    if _is_as_made(recipe):
        return _spec_of_class(type(recipe))
    if (found := _place_of(recipe)) is not None:
        return f"{_module_spec(*found)}:{found[1]}"
    raise _no_name(
        type(recipe).__name__,
        "this object cannot be made again: its constructor takes arguments, or it was changed",
    )


def _spec_of_class(kind: type[Recipe]) -> str:
    name, module = kind.__qualname__, sys.modules.get(kind.__module__)
    if "<locals>" in name:
        raise _no_name(kind.__name__, "a class within a function is not to be found by a name")
    found: object = module
    for step in name.split("."):
        found = getattr(found, step, None)
    if module is None or found is not kind:
        raise _no_name(kind.__name__, f"the module {kind.__module__} does not have it")
    return f"{_module_spec(module, kind.__name__)}:{name}"


def _is_as_made(recipe: Recipe) -> bool:
    """Whether calling the class without arguments gives the same object again."""
    try:
        return bool(type(recipe)().__getstate__() == recipe.__getstate__())
    except Exception:  # noqa: BLE001 - a constructor that raises, or values that cannot be compared
        return False


def _place_of(recipe: Recipe) -> tuple[ModuleType, str] | None:
    """A module with the object at its top level, and its name there."""
    modules = [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]

    def unlikely(module: ModuleType) -> tuple[bool, bool]:
        return module.__name__ != type(recipe).__module__, module.__name__ == MAIN

    for module in sorted(modules, key=unlikely):
        for name, value in list(vars(module).items()):
            if value is recipe:
                return module, name
    return None


def _module_spec(module: ModuleType, name: str) -> str:
    """What to import to have the module; a file's name for the script that runs."""
    if module.__name__ != MAIN:
        try:
            if find_spec(module.__name__) is not None:
                return module.__name__
        except (ValueError, ImportError):
            pass
        raise _no_name(name, f"the module {module.__name__} cannot be imported elsewhere")
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).is_file():
        raise _no_name(name, "it is defined in a notebook or at a prompt")
    if _runs_again(module, Path(file)):
        raise ConfigError(f"{file}: {AS_PROGRAM}")
    if module.__spec__ is not None:  # python -m package.module
        return module.__spec__.name
    if not file.endswith(".py"):
        raise _no_name(name, f"the name of {file} does not end in .py")
    return str(Path(file).absolute())


def _runs_again(main: ModuleType, file: Path) -> bool:
    """Whether loading the script would come to the call that is being made now: it stands, or
    begins, at the top level and not below ``if __name__ == "__main__":``.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals is vars(main) and frame.f_code.co_name == "<module>":
            try:
                statements = ast.parse(file.read_bytes()).body
            except (OSError, SyntaxError, ValueError):
                return False
            line = frame.f_lineno
            return not any(
                runs_as_program(one) and one.lineno <= line <= (one.end_lineno or line)
                for one in statements
            )
        frame = frame.f_back
    return False


def _no_name(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"recipe {name}: {why}, and the process that decides must import it; put it in a file, as "
        f"a class whose constructor takes no arguments or as an object at the top level, and give "
        f"that, or 'FILE.py:{name}'"
    )
