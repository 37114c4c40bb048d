"""``woolmill redecide``: new decisions from the stored answers; nothing is asked, nothing is paid.

The old decisions are dropped in one transaction, together with the settings that they followed
from. From then on the run is one whose answers have not all been decided yet, so that a crash in
the middle costs nothing either: the same command, or the run going on, decides the rest. The old
decisions come back with the old settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import click

from engine.decide.stored import decide_stored
from engine.export import dataset_of
from engine.kept import keep_recipe, settings_of
from engine.run.manifest import make_manifest
from engine.run.progress import of_target
from engine.store import Manifest, RunStore

__all__ = ["Redecided", "decision_options", "redecide", "redecide_run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Redecided:
    """What came of it."""

    answers: int
    accepted: int
    accepted_before: int
    target: int


def decision_options(command: Any) -> Any:
    """The settings that decisions follow from, as flags."""
    for option in (
        click.option("--recipe", help="The recipe with a mended parser or other filters."),
        click.option("--seeds", type=click.Path(path_type=Path, dir_okay=False),
                     help="The run's seed tasks. [those that it kept, or the bundled ones]"),
        click.option("--scope", type=click.Choice(["instruction", "instruction+input"]),
                     help="What is compared."),
        click.option("--language", metavar="CODE", help="How texts are cut, parsed and filtered."),
        click.option("--semantic-threshold", type=float, help="Refuse above this cosine."),
        click.option("--semantic/--no-semantic", default=None,
                     help="Refuse near-duplicates by meaning."),
        click.option("--rouge-threshold", type=float, help="Refuse above this ROUGE-L F."),
        click.option("--target", type=int, help="Accepted records wanted."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@decision_options
def redecide(folder: Path, seeds: Path | None, **changes: Any) -> None:
    """Decide a run's answers again, under other thresholds; nothing is asked or paid.

    \b
    woolmill redecide runs/alpaca --rouge-threshold 0.6
    """
    given = {name: value for name, value in changes.items() if value is not None}
    done = anyio.run(redecide_run, folder, seeds, given)
    click.echo(
        f"accepted {done.accepted}{of_target(done.target)} from {done.answers} answers "
        f"(before: {done.accepted_before})  {folder}"
    )
    with RunStore.read(folder) as run:
        dataset = folder / dataset_of(run.manifest)[1]
    click.echo(f"write the dataset with: woolmill export {folder} -o {dataset}")


async def redecide_run(folder: Path, seeds: Path | None, changes: Mapping[str, Any]) -> Redecided:
    """Decide the answers of the run in ``folder`` again under its settings with ``changes``.

    Raises ConfigError where the seeds are not the run's or a setting is wrong, and what
    ``RunStore.open`` raises.
    """
    with RunStore.read(folder) as reader:
        stored = reader.manifest
    config, tasks = settings_of(folder, stored, seeds, changes)
    config = config.model_copy(update={"out": folder})
    recipe = config.make_recipe(tasks)
    wanted = make_manifest(config, recipe, tasks, str(stored.fixed["model"]))
    store = RunStore.open(
        folder,
        Manifest(
            fixed=stored.fixed,
            decision=stored.decision,
            free=wanted.free,
            engine_version=wanted.engine_version,
        ),
    )
    try:
        before = store.counts()
        store.forget_decisions(wanted.decision)
        keep_recipe(config.recipe, folder)
        accepted = await decide_stored(store, config, tasks)
    finally:
        await store.aclose()
    return Redecided(
        answers=before.answered,
        accepted=accepted,
        accepted_before=before.accepted,
        target=config.target,
    )
