"""What a run's settings leave open, settled before it starts: recipe, language, API, target.

A run that goes on keeps what it was started with.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from engine.backends.base import Backend
from engine.backends.openai.address import read_address
from engine.errors import ConfigError, WoolmillError
from engine.languages import ENGLISH, MIXED, detect, language_of
from engine.limits.endpoint import WatchedServer
from engine.recipes.base import Recipe
from engine.recipes.filters import FilterSettings
from engine.recipes.load import ALPACA
from engine.recipes.seeds import bundled_seeds, read_seeds
from engine.records import EVERY, Record, SeedTask
from engine.run.inputs import InputRows, identity
from engine.settings import AUTO, RunConfig, config_of
from engine.stages import folders_below, stages_of_run
from engine.store import Manifest, RunStore

__all__ = [
    "Settled",
    "about_carried",
    "about_language",
    "answered_by",
    "earlier_manifest",
    "refuse_other_stages",
    "settle",
    "stages_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A run's settings with nothing left open."""

    config: RunConfig
    recipe: Recipe
    tasks: Sequence[SeedTask]
    """The seed tasks of recipes that take some."""
    rows: InputRows | None
    any_api: bool
    """Requests may be asked by the other API where a host has only that."""
    same_rows: bool = False
    """The input is the file that the run was started with, untouched."""
    earlier_rows: Any = None
    """What told the input of a stage that goes on, as its manifest has it."""


def settle(config: RunConfig, *, asks: bool = True) -> Settled:
    """The settings of a run. Raises WoolmillError for what makes a start impossible.

    Args:
        asks: somebody is to answer; otherwise no model need be named.
    """
    earlier = earlier_manifest(config.out)
    tasks: list[SeedTask] = []
    recipe = config.make_recipe(tasks)
    if recipe.takes_seeds:
        config, tasks = _with_language(config, earlier)
        recipe = config.make_recipe(tasks)
    if config.recipe != ALPACA:
        config = _for_recipe(config, recipe)
    if recipe.raw:
        _refuse_chat_hosts(config, recipe)
    _refuse_unused_models(config, recipe)
    any_api = False
    if len(recipe.stages) == 1:  # else each stage has its own
        config = _of_stage(config, recipe, asks=asks)
        config, any_api = _with_api(config, recipe, earlier)
    rows = None
    if config.rows is not None:
        rows = InputRows(config.rows, config.on_bad_row)
        if "target" not in config.model_fields_set:
            config = config.model_copy(update={"target": EVERY})
    elif recipe.needs_rows:
        raise ConfigError(f"recipe {recipe.name} needs input rows; name them with --rows")
    if config.carry:
        for line in check_carried(config, rows.first(LOOKED_AT) if rows is not None else ()):
            rows.bad.note(line)  # type: ignore[union-attr]
    same = config.rows is not None and earlier is not None
    return Settled(
        config=config,
        recipe=recipe,
        tasks=tasks,
        rows=rows,
        any_api=any_api,
        same_rows=same and earlier.free.get("rows_identity") == identity(config.rows),  # type: ignore[union-attr, arg-type]
    )


LOOKED_AT = 1000
"""Input rows, for fields that the first of them do not have."""


def check_carried(config: RunConfig, rows: Iterable[Record]) -> list[str]:
    """What a person should know of the fields to keep: which of them the first input ``rows`` lack.
    Raises ConfigError for one that none of them has.
    """
    first: Record | None = None
    missing = absent = list(config.carry)
    for row in rows:
        missing = [name for name in missing if name not in row]
        if first is None:
            first, absent = row, missing
        if not missing:
            break
    if first is None and config.rows is None:
        raise ConfigError(f"--carry {config.carry[0]}: the run has no input rows; see --rows")
    if first is not None and missing:
        raise ConfigError(
            f"--carry {missing[0]}: the input rows have no such field; the first one has "
            f"{', '.join(first)}"
        )
    return [f"--carry {name}: rows without it, as the first one, get null" for name in absent]


def about_carried(chain: Sequence[Settled]) -> Iterator[str]:
    """Which fields to keep the recipe gives itself: its value stays."""
    for name in chain[0].config.carry:
        if giving := next((each.recipe for each in chain if name in each.recipe.fields), None):
            yield (
                f"--carry {name}: {giving.name} gives a field of that name itself, and its value "
                "is the one that rows have; rename one to keep both"
            )


def stages_of(whole: Settled, *, asks: bool = True) -> list[Settled]:
    """A run's stages with the settings of each; of most recipes the one that there is. ``asks`` is
    as for ``settle``.
    """
    recipes = whole.recipe.stages
    if len(recipes) == 1:
        return [whole]
    stages = []
    for place, recipe in enumerate(recipes):
        is_last = place == len(recipes) - 1
        config = _of_stage(whole.config, recipe, asks=asks)
        name = recipe.name.rpartition("/")[2]
        out = config.out if is_last else config.out / "stages" / f"{place + 1}-{name}"
        earlier = earlier_manifest(out)
        rows = whole.rows if place == 0 else None
        settled = {
            "out": out,
            "stage": recipe.name,
            "rows": whole.config.rows if place == 0 else None,
            "samples": config.samples if place == 0 else recipe.samples,
            "target": config.target if is_last else EVERY,
        }
        if not recipe.compares:
            settled |= {"semantic": False, "rouge_threshold": None}
        config, any_api = _with_api(config.model_copy(update=settled), recipe, earlier)
        stages.append(
            Settled(
                config=config,
                recipe=recipe,
                tasks=whole.tasks if recipe.takes_seeds else (),
                rows=rows,
                any_api=any_api,
                same_rows=whole.same_rows and place == 0,
                earlier_rows=earlier.free.get("rows_identity") if earlier else None,
            )
        )
    return stages


def refuse_other_stages(chain: Sequence[Settled]) -> None:
    """Raises ConfigError where the folder holds a run of other stages than those of ``chain``.

    Before any of them is opened, so that a start that is refused adds no stage to the run.
    """
    folder = chain[-1].config.out
    earlier = earlier_manifest(folder)
    now = [settled.config.out.name for settled in chain[:-1]]
    if now:
        now.append(f"{len(chain)}-{chain[-1].recipe.name.rpartition('/')[2]}")
    if earlier is None:  # a start that was killed may have made the first of them
        there = [stage.name for _, stage in folders_below(folder)]
        same = there == now[: len(there)]
    else:
        there = [stage.name for stage in stages_of_run(folder) if stage.name]
        same = there == now or bool(earlier.fixed.get("merged"))
    if not same:
        was, is_now = (", ".join(names) or "one stage" for names in (there, now))
        raise ConfigError(
            f"{folder}: the run there has other stages than the recipe ({was}; the recipe: "
            f"{is_now}); resume with the same stages, or start a new run"
        )


def _refuse_unused_models(config: RunConfig, recipe: Recipe) -> None:
    """Raises ConfigError for a table that no stage asks, as a misspelt one."""
    asked = [stage.model for stage in recipe.stages if stage.model]
    if unused := next((name for name in config.models if name not in asked), None):
        there = f"its stages ask {', '.join(asked)}" if asked else "no stage names a model"
        raise ConfigError(f"[models.{unused}]: recipe {recipe.name} does not ask it; {there}")


def answered_by(settled: Settled, model: str, backend: Backend | None) -> Settled:
    """The stage's settings, now that it is known which model answers, and by what other name
    ``backend`` may have it.
    """
    names = [model]
    if isinstance(backend, WatchedServer) and backend.identity is not None:
        names.append(backend.identity[1])
    earlier = earlier_manifest(settled.config.out)
    config = settled.config.answered_by(names, earlier.fixed if earlier is not None else None)
    return replace(settled, config=config)


OF_A_HOST = frozenset(
    "base_url endpoint endpoints_file backend key_env key_file header query extra_body without"
    " serve ray replicas provider tail wait batch_lines batch_tokens batch_price".split()
)
"""Settings that are for one host alone; its key and headers never go to another."""
OTHER_HOST = ("base_url", "endpoints_file", "backend")
"""Any of them says that it is another host that answers."""
OF_A_MODEL = frozenset("context_length tokenizer".split())


def _of_stage(config: RunConfig, recipe: Recipe, *, asks: bool) -> RunConfig:
    """The settings with those of the stage's model. Raises ConfigError where it ``asks`` one that
    is not named.
    """
    if not recipe.model:
        return config
    own = config.models.get(recipe.model)
    if own is None and not recipe.model_settings:
        if not asks:
            return config
        raise ConfigError(
            f"stage {recipe.name} asks the model {recipe.model}, which the settings do not name; "
            f"add a table [models.{recipe.model}] with base_url and model"
        )
    given = dict(recipe.model_settings) | (own.model_dump(exclude_unset=True) if own else {})
    kept = config.model_dump(exclude_unset=True, exclude={"models"})
    if any(given.get(name) for name in OTHER_HOST):
        kept = {name: value for name, value in kept.items() if name not in OF_A_HOST}
    if not given.keys().isdisjoint((*OTHER_HOST, "model")):
        kept = {name: value for name, value in kept.items() if name not in OF_A_MODEL}
    try:
        return config_of({**kept, **given})
    except ConfigError as error:
        raise ConfigError(f"[models.{recipe.model}]: {error}") from error


def earlier_manifest(folder: Path) -> Manifest | None:
    """That of the run in ``folder``, if there is one that can be read; opening it says why not."""
    if os.path.isfile(folder / "run.sqlite"):
        with suppress(WoolmillError), RunStore.read(folder) as run:
            return run.manifest
    return None


def _for_recipe(config: RunConfig, recipe: Recipe) -> RunConfig:
    """What another recipe than Alpaca's says itself, where the person does not."""
    given = config.model_fields_set
    settled: dict[str, Any] = {}
    seeded = config.seeds is not None or config.filters.model_fields_set
    if seeded and not recipe.takes_seeds:
        raise ConfigError(f"seeds and filters go with other recipes; {recipe.name} has its own")
    if config.language == AUTO:
        settled["language"] = recipe.language or MIXED
    if "rouge_threshold" not in given:
        language = settled.get("language", config.language)
        settled["rouge_threshold"] = language_of(language).rouge_threshold
    if not any(stage.compares for stage in recipe.stages):
        settled |= {"semantic": False, "rouge_threshold": None}
    if config.rows is None and recipe.rows_path is not None:
        settled["rows"] = recipe.rows_path
    if config.samples is None:
        settled["samples"] = recipe.stages[0].samples
    return config.model_copy(update=settled)


def _refuse_chat_hosts(config: RunConfig, recipe: Recipe) -> None:
    """Raises ConfigError for a host that puts a chat template of its own around each prompt."""
    for endpoint in config.endpoints():
        address = read_address(endpoint.url)
        if address.api == "chat":
            raise ConfigError(
                f"recipe {recipe.name} begins the model's own chat template, which {address.name} "
                "has no API for; use a vLLM server, --backend vllm or --backend transformers"
            )


def _with_api(
    config: RunConfig, recipe: Recipe, earlier: Manifest | None
) -> tuple[RunConfig, bool]:
    """The settings with an ``api`` in the place of ``auto``, and whether requests may use another:
    that of the run which goes on, else what the address tells.
    """
    if recipe.asks != "any":
        if config.api not in (AUTO, recipe.asks):
            raise ConfigError(f"recipe {recipe.name} asks by {recipe.asks}, not by {config.api}")
        return config.model_copy(update={"api": recipe.asks}), False
    if config.api != AUTO:
        return config, False
    api: Literal["completions", "chat"] = "completions"
    if config.endpoints():
        api = read_address(config.endpoints()[0].url).api
    if config.chosen_backend == "batch":
        api = "chat"  # what every provider's batches take
    if earlier is not None:
        api = earlier.fixed.get("api", api)
    return config.model_copy(update={"api": api}), True


def _with_language(config: RunConfig, earlier: Manifest | None) -> tuple[RunConfig, list[SeedTask]]:
    """The settings with a language in the place of ``auto``: that of the run which goes on, else
    what the seed tasks are written in; and these.
    """
    language = config.language
    if language == AUTO and earlier is not None:
        language = earlier.decision.get("language", ENGLISH)
    if config.seeds is None:
        path = bundled_seeds(ENGLISH if language == AUTO else language)
    else:
        path = config.seeds
    tasks = read_seeds(path, at_least=config.num_demonstrations)
    if language == AUTO:
        language = detect(f"{task.instruction}\n{task.input}" for task in tasks)
    settled: dict[str, Any] = {"language": language}
    if "rouge_threshold" not in config.model_fields_set:
        settled["rouge_threshold"] = language_of(language).rouge_threshold
    return config.model_copy(update=settled), tasks


MOST_REFUSED = 0.2
"""Of the seed tasks; where the filters refuse more, they hardly suit what will be written."""


def about_language(config: RunConfig, tasks: Sequence[SeedTask]) -> Iterator[str]:
    """What a person should know of language and filters before anything is paid; mostly nothing."""
    if not tasks:
        return
    filters = config.checks()
    if config.spoken != ENGLISH or filters.settings != FilterSettings():
        yield f"language {config.spoken} ({language_of(config.spoken).name}); filters: {filters}"
    records = [
        {"instruction": task.instruction, "input": task.input, "output": task.output}
        for task in tasks
    ]
    refusals = [filters.refusal(record) for record in records]
    reasons = Counter(refusal[0] for refusal in refusals if refusal)
    if (refused := reasons.total()) > MOST_REFUSED * len(tasks):
        told = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common(3))
        yield (
            f"the filters refuse {refused:,} of the {len(tasks):,} seed tasks themselves ({told}),"
            " and will refuse such records too; see --language and the table [filters]"
        )
