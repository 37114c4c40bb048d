"""What the run store remembers of the settings. No key is ever among them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from engine.decide.decider import uses_semantic
from engine.languages import ENGLISH
from engine.recipes.base import Recipe
from engine.recipes.load import ALPACA
from engine.recipes.seeds import fingerprint
from engine.records import EVERY, SeedTask
from engine.run.inputs import identity
from engine.sections import OnResume, marked
from engine.settings import RunConfig
from engine.store import Manifest
from engine.surroundings import spelt_out

__all__ = ["make_manifest"]

SEMANTIC = ("semantic_threshold", "semantic_model", "semantic_precision")
"""Settings that mean nothing where no texts are compared by meaning; they are kept empty there, so
that they may differ."""
FREE = marked(RunConfig, OnResume.FREE)
"""Settings by what they may do when a run goes on; ``OnResume`` says what each means."""
DECISION = marked(RunConfig, OnResume.DECISION)
"""Those under which ``woolmill redecide`` may decide again."""
LATER = marked(RunConfig, OnResume.LATER) | {"recipe_asks"}
"""Those that runs of older versions lack. ``recipe_asks`` is no setting, but came later too."""


def make_manifest(
    config: RunConfig, recipe: Recipe, tasks: Sequence[SeedTask], model: str
) -> Manifest:
    """The manifest of settled settings."""
    values: dict[str, Any] = spelt_out(config.model_dump(mode="json"))
    seeds = fingerprint(tasks) if recipe.takes_seeds else None
    values |= {"model": model, "seeds": seeds, "semantic": uses_semantic(config)}
    # In batches or one by one, requests are the same: a run may go on either way.
    backend = "http" if config.chosen_backend == "batch" else config.chosen_backend
    values |= {"backend": backend, **config.sampling()}
    values["language"] = None if config.spoken == ENGLISH else config.spoken
    values["filters"] = config.filters.model_dump(mode="json", exclude_none=True)
    values["target"] = None if config.target == EVERY else config.target
    values["samples"] = None if config.samples == 1 else config.samples
    decision = {
        name: value
        for name, value in values.items()
        if name in DECISION and (name not in LATER or value)
    }
    if not decision["semantic"]:
        decision |= dict.fromkeys(SEMANTIC)
        decision.pop("semantic_dimension", None)
    if decision["semantic_precision"] != "bfloat16":
        del decision["semantic_precision"]  # as in runs made before there was a choice
    free = {name: value for name, value in values.items() if name in FREE}
    if config.recipe != ALPACA:
        values |= {"recipe": recipe.name, "recipe_version": recipe.version}
        values["recipe_asks"] = recipe.asks_sha256 or None
        decision["recipe_source"] = recipe.source_sha256 or None
        free["recipe_spec"] = _absolute(config.recipe)
    if config.rows is not None:
        free["rows_identity"] = identity(config.rows)
    return Manifest(
        fixed={
            name: value
            for name, value in values.items()
            if name not in FREE and name not in decision and (value or name not in LATER)
        },
        decision=decision,
        free=free,
        engine_version=metadata.version("woolmill"),
    )


def _absolute(spec: str) -> str:
    """A file's name as it holds from any folder; other names as they are."""
    file, colon, name = spec.partition(":") if ".py:" in spec else (spec, "", "")
    return os.path.abspath(file) + colon + name if os.path.isfile(file) else spec
