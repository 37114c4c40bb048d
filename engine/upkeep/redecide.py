"""``woolmill redecide``: new decisions from the stored answers; nothing is asked, nothing is paid.

The old decisions are dropped in one transaction, together with the settings that they followed
from. From then on the run is one whose answers have not all been decided yet, so that a crash in
the middle costs nothing either: the same command, or the run going on, decides the rest. The old
decisions come back with the old settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import click

from engine.decide.decider import Decider, make_cascade
from engine.errors import ConfigError
from engine.languages import ENGLISH
from engine.recipes.seeds import KEPT, kept_seeds
from engine.records import SeedTask
from engine.run.generate import make_manifest
from engine.settings import RunConfig
from engine.store import Manifest, RunStore

__all__ = [
    "Redecided",
    "decide_answers",
    "decision_options",
    "redecide",
    "redecide_run",
    "settings_of",
]

BATCH = 256


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
        f"accepted {done.accepted} of {done.target} from {done.answers} answers "
        f"(before: {done.accepted_before})  {folder}"
    )
    click.echo(f"write the dataset with: woolmill export {folder} -o {folder}/alpaca_data.json")


async def redecide_run(folder: Path, seeds: Path | None, changes: Mapping[str, Any]) -> Redecided:
    """Decide the answers of the run in ``folder`` again under its settings with ``changes``.

    Raises ConfigError where the seeds are not the run's or a setting is wrong, and what
    ``RunStore.open`` raises.
    """
    with RunStore.read(folder) as reader:
        stored = reader.manifest
    config, tasks = settings_of(folder, stored, seeds, changes)
    wanted = make_manifest(config, tasks, str(stored.fixed["model"]))
    cascade = await anyio.to_thread.run_sync(make_cascade, config, tasks)
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
        accepted = await decide_answers(
            store, Decider(cascade, api=config.asked_api, filters=config.checks()), config.target
        )
    finally:
        await store.aclose()
    return Redecided(
        answers=before.answered,
        accepted=accepted,
        accepted_before=before.accepted,
        target=config.target,
    )


async def decide_answers(store: RunStore, decider: Decider, target: int) -> int:
    """Decide the stored answers from the first on, up to ``target`` accepted records; how many."""
    accepted, index = 0, 0
    while accepted < target:
        answers = await anyio.to_thread.run_sync(store.answers, index, BATCH)
        if not answers:
            break
        limit = target - accepted
        decisions, vectors = await anyio.to_thread.run_sync(
            partial(decider.decide, answers, limit=limit)
        )
        await store.decided(decisions, vectors)
        accepted += sum(decision.accepted for decision in decisions)
        index = answers[-1].index + 1
    return accepted


def settings_of(
    folder: Path, stored: Manifest, seeds: Path | None, changes: Mapping[str, Any]
) -> tuple[RunConfig, Sequence[SeedTask]]:
    """A run's settings as its store has them, with ``changes``, and its seed tasks.

    Raises ConfigError where a setting is wrong, or where neither ``seeds`` nor what the run's
    folder keeps are its seed tasks.
    """
    tasks = kept_seeds(folder, stored.fixed.get("seeds"), seeds)
    if not tasks:
        raise ConfigError(
            f"{seeds or folder / KEPT}: not the seed tasks of the run, which its records are "
            "compared with; name those with --seeds"
        )
    known = {"language": ENGLISH, **stored.free, **stored.fixed, **stored.decision, "seeds": seeds}
    values = {
        name: value
        for name, value in known.items()
        # A merged run's list of runs is no setting. What was off has no value; a flag of now gives
        # it its default.
        if name in RunConfig.model_fields and not (name.startswith("semantic_") and value is None)
    }
    try:
        return RunConfig.model_validate(values | dict(changes)), tasks
    except ValueError as exc:
        raise ConfigError(f"the settings do not fit together: {exc}") from exc
