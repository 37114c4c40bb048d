"""What a run's folder keeps to be understood by later: its settings, its seeds, its recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, DiskError, OutputError, WoolmillError
from engine.files import replace_file
from engine.languages import ENGLISH
from engine.recipes.base import Recipe
from engine.recipes.load import ALPACA, is_code
from engine.recipes.seeds import KEPT, kept_seeds
from engine.records import EVERY, SeedTask
from engine.settings import RunConfig, config_of
from engine.store import Manifest, RunReader

__all__ = ["copy_recipe", "keep_recipe", "recipe_of", "refuse_unnamed_code", "settings_of"]

SUFFIXES = (".toml", ".py")
"""Recipes that are a file, of which a run keeps a copy; any other is code that is installed."""


def keep_recipe(spec: str, folder: Path) -> None:
    """Copy the file of a recipe into the run's folder, so that the run can be read without it.

    Where that fails nothing is raised: the file itself is used then.
    """
    file = Path(_file_of(spec))
    if file.suffix in SUFFIXES and file.is_file():
        with suppress(OSError, OutputError, DiskError):
            kept, text = folder / f"recipe{file.suffix}", file.read_bytes()
            if not kept.is_file() or kept.read_bytes() != text:
                replace_file(kept, lambda file: file.write(text))


def copy_recipe(folder: Path, stored: Manifest, output: Path) -> None:
    """Keep in ``output`` the recipe of the run in ``folder``, as far as it is still there."""
    if stored.fixed.get("recipe") != ALPACA:
        keep_recipe(_spec(folder, str(stored.free.get("recipe_spec", ""))), output)


def settings_of(
    folder: Path, stored: Manifest, seeds: Path | None = None, changes: Mapping[str, Any] = {}
) -> tuple[RunConfig, list[SeedTask]]:
    """A run's settings as its store has them, with ``changes``, and its seed tasks.

    Raises ConfigError where a setting is wrong, or where neither ``seeds`` nor what the run's
    folder keeps are its seed tasks.
    """
    tasks = []
    if stored.fixed.get("seeds") is not None:
        tasks = kept_seeds(folder, stored.fixed.get("seeds"), seeds)
        if not tasks:
            raise ConfigError(
                f"{seeds or folder / KEPT}: not the seed tasks of the run, which its records are "
                "compared with; name those with --seeds"
            )
    return stored_config(folder, stored, {**changes, "seeds": seeds}), tasks


def stored_config(folder: Path, stored: Manifest, changes: Mapping[str, Any] = {}) -> RunConfig:
    """A run's settings as its store has them, with ``changes``. Raises ConfigError."""
    known = {"language": ENGLISH, **stored.free, **stored.fixed, **stored.decision, "seeds": None}
    known["target"] = known.get("target") or EVERY
    if known.get("provider"):
        known["backend"] = "batch"  # which is http's other way, and fixed is only that it is http
    if stored.fixed.get("recipe") != ALPACA and "recipe" not in changes:
        spec = str(stored.free.get("recipe_spec", known["recipe"]))
        if is_code(spec):
            raise ConfigError(
                f"{folder}: its recipe is code, which a run's folder alone may not start; name it, "
                f"if you trust it: --recipe {spec}"
            )
        known["recipe"] = _spec(folder, spec)
    values = {
        name: value
        for name, value in known.items()
        # A merged run's list of runs is no setting. What was off has no value; a flag of now gives
        # it its default.
        if name in RunConfig.model_fields and not (name.startswith("semantic_") and value is None)
    }
    if "semantic_model" in changes:
        values.pop("semantic_dimension", None)  # of another model, which a server must tell
    if "semantic_url" in changes:
        values.pop("semantic_precision", None)
    return config_of(values | dict(changes), changes)


def recipe_of(run: RunReader, seeds: Path | None = None) -> Recipe | None:
    """The recipe of a stored run; None where it cannot be had, as where it is code that nobody has
    named (``RunReader.named_recipe``): rows are then shown and exported by their fields alone.

    Raises WoolmillError where ``seeds`` or a recipe are named and cannot be had.
    """
    stored = run.manifest
    named = {"recipe": run.named_recipe} if run.named_recipe else {}
    try:
        config = stored_config(run.folder, stored, named)
        return config.make_recipe(kept_seeds(run.folder, stored.fixed.get("seeds"), seeds))
    except (WoolmillError, OSError):
        if seeds is not None or named:
            raise
        return None


def refuse_unnamed_code(run: RunReader) -> None:
    """Raises ConfigError where the run's recipe is code that nobody has named: what only the recipe
    can say is not guessed.
    """
    if run.manifest.fixed.get("recipe") != ALPACA and not run.named_recipe:
        stored_config(run.folder, run.manifest)


def _spec(folder: Path, spec: str) -> str:
    """Where the recipe is now: its own file, else the copy in the run's folder."""
    file = _file_of(spec)
    if Path(file).suffix in SUFFIXES and not os.path.isfile(file):
        kept = folder / f"recipe{Path(file).suffix}"
        if kept.is_file():
            return f"{kept}{spec[len(file) :]}"
    return spec


def _file_of(spec: str) -> str:
    return spec.rpartition(":")[0] if ".py:" in spec else spec
