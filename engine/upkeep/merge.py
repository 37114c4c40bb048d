"""``woolmill merge``: the answers of several runs, decided anew as one.

The runs' answers are laid one after the other in the order given, and decided in that order, so
that a record is compared with all seeds and with every record accepted before it, from whichever
run. The same runs in the same order give the same dataset. The merged run holds all it needs and
can be exported, reported on and redecided; it has no plan of its own and does not go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import anyio
import click

from engine.decide.decider import uses_semantic
from engine.decide.stored import decide_stored
from engine.embeddings.served import with_served
from engine.errors import ConfigError
from engine.kept import keep_recipe, settings_of
from engine.recipes.seeds import keep
from engine.records import EVERY, Answer, SeedTask
from engine.run.manifest import make_manifest
from engine.settings import RunConfig
from engine.stages import samples_of, stages_of_run
from engine.store import Manifest, RunReader, RunStore
from engine.upkeep.redecide import decision_options
from engine.upkeep.salvage import new_run

__all__ = ["merge", "merge_runs"]

BATCH = 256
"""Answers that are copied at once: one transaction for each would be slow, and all of them in
memory too many."""

SHARED = ("recipe", "recipe_version", "stage", "api", "seeds", "samples")
"""Fixed settings in which merged runs must agree: how answers are parsed and what records are
compared with.
"""


@click.command()
@click.argument(
    "folders", type=click.Path(path_type=Path, file_okay=False), nargs=-1, required=True
)
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True,
              help="Folder for the merged run.")  # fmt: skip
@decision_options
def merge(folders: tuple[Path, ...], output: Path, seeds: Path | None, **changes: Any) -> None:
    """Merge several runs into one, without duplicates across them.

    \b
    woolmill merge runs/a runs/b -o runs/ab
    """
    given = {name: value for name, value in changes.items() if value is not None}
    accepted = anyio.run(merge_runs, folders, output, seeds, given)
    click.echo(f"accepted {accepted} from {len(folders)} runs  {output}")
    if any(len(stages_of_run(folder)) > 1 for folder in folders):
        click.echo("only the rows of the runs' last stages are in it; the stages before stay there")


async def merge_runs(
    folders: Sequence[Path], output: Path, seeds: Path | None, changes: Mapping[str, Any]
) -> int:
    """Merge the runs in ``folders`` into a new one in ``output``; how many records it accepted.

    Decides under the first run's settings with ``changes``; without a target, all answers are
    decided. Raises OutputError where ``output`` exists, ConfigError where the runs do not go
    together.
    """
    new_run(output)
    with ExitStack() as stack:
        runs = [stack.enter_context(RunStore.read(folder)) for folder in folders]
        manifest, config, tasks = await _settings(runs, seeds, changes)
        store = RunStore.open(output, manifest)
        keep(tasks, output)
        keep_recipe(config.recipe, output)
        try:
            index = 0
            for run in runs:
                index = await _copy(run, store, index)
                embeddings = run.all_embeddings()
                while some := list(islice(embeddings, BATCH)):
                    await store.decided_rows(store.rows_of((), (), some))
            target = config.target if "target" in changes else EVERY
            config = config.model_copy(update={"out": output, "target": target})
            return await decide_stored(store, config, tasks)
        finally:
            await store.aclose()


async def _settings(
    runs: Sequence[RunReader], seeds: Path | None, changes: Mapping[str, Any]
) -> tuple[Manifest, RunConfig, Sequence[SeedTask]]:
    """The merged run's manifest, and the configuration and seeds that it is decided with."""
    first = runs[0]
    for run in runs[1:]:
        for name in SHARED:
            ours, theirs = first.manifest.fixed.get(name), run.manifest.fixed.get(name)
            if ours != theirs:
                raise ConfigError(
                    f"{run.folder}: its {name} is {theirs}, that of {first.folder} is {ours}; "
                    "only runs with the same can be merged"
                )
    if len({run.run_id for run in runs}) < len(runs):
        raise ConfigError("the same run is named twice, or is a copy of another one named")
    config, tasks = settings_of(first.folder, first.manifest, seeds, changes)
    if uses_semantic(config):
        config = await with_served(config)
    wanted = make_manifest(
        config, config.make_recipe(tasks), tasks, str(first.manifest.fixed["model"])
    )
    merged = [{"run": run.run_id, "model": run.manifest.fixed.get("model")} for run in runs]
    manifest = Manifest(
        fixed={**first.manifest.fixed, "merged": merged},
        decision=wanted.decision,
        # Which says that there are input rows, also where these came from a stage before.
        free={**wanted.free, "rows_identity": first.manifest.free.get("rows_identity")},
        engine_version=wanted.engine_version,
    )
    return manifest, config, tasks


async def _copy(run: RunReader, store: RunStore, index: int) -> int:
    """The answers of ``run``, renumbered from ``index`` on; the index after the last."""
    store.lost(run.counts().lost_tokens)
    answers = _answers(run)
    while batch := await anyio.to_thread.run_sync(lambda: list(islice(answers, BATCH))):
        renumbered = [replace(answer, index=index + i) for i, answer in enumerate(batch)]
        await store.answered(renumbered)
        index += len(batch)
    return index


def _answers(run: RunReader) -> Iterator[Answer]:
    """The answers in plan order. Of a run with input rows, each stays at its place, so that the
    number of a request goes on telling its row and sample: what has no answer (yet) has failed.
    """
    samples = samples_of(run)
    due = 0
    for answer, _ in run.all_answers():
        if samples is not None:
            yield from map(_none, range(due, answer.index))
            due = answer.index + 1
        yield answer
    yield from map(_none, range(due, due + -due % (samples or 1)))


def _none(index: int) -> Answer:
    message = "the run that was merged has no answer to this request"
    return Answer(
        index=index, demonstrations=(), completion=None, failure="not_answered", message=message
    )
