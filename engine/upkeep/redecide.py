"""``woolmill redecide``: new decisions from the stored answers; nothing is asked, nothing is paid.

The old decisions are dropped in one transaction, together with the settings that they followed
from. From then on the run is one whose answers have not all been decided yet, so that a crash in
the middle costs nothing either: the same command, or the run going on, decides the rest. The old
decisions come back with the old settings.

A stage that others follow is first decided on trial, in a copy (``engine.upkeep.trial``), so that
the person knows beforehand how many of the answers behind it are about rows that go.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import anyio
import click

from engine.decide.decider import uses_semantic
from engine.decide.stored import decide_stored
from engine.embeddings.served import with_served
from engine.errors import UsageError
from engine.export import dataset_of
from engine.kept import keep_recipe, settings_of
from engine.recipes.load import is_code
from engine.run.advice import as_flags, generate_again
from engine.run.manifest import make_manifest
from engine.run.progress import of_target
from engine.run.settle import LOOKED_AT, check_carried
from engine.stages import Stage, carried_anew, remedy, samples_of, stage_named
from engine.store import RunReader, RunStore
from engine.text import as_word, counted
from engine.upkeep.changes import Accepted
from engine.upkeep.trial import Trial, copied, trial_of
from engine.upkeep.trial import drop_stale as drop

__all__ = ["Redecided", "decision_options", "redecide", "redecide_run"]


log = logging.getLogger(__name__)


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
        click.option("--carry", multiple=True, metavar="FIELD,…",
                     help="Fields of the input row that its rows keep, such as its id."),
        click.option("--language", metavar="CODE", help="How texts are cut, parsed and filtered."),
        click.option("--semantic-threshold", type=float, help="Refuse above this cosine."),
        click.option("--semantic/--no-semantic", default=None,
                     help="Refuse near-duplicates by meaning."),
        click.option("--semantic-model", metavar="MODEL", help="The embedding model."),
        click.option("--semantic-url", metavar="URL", help="Server that embeds."),
        click.option("--semantic-key-env", metavar="NAME",
                     help="Environment variable with the key of --semantic-url."),
        click.option("--rouge-threshold", type=float, help="Refuse above this ROUGE-L F."),
        click.option("--target", type=int, help="Accepted records wanted."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@decision_options
@click.option("--stage", metavar="NAME", help="Which stage of the run. [the last one]")
@click.option("--dry-run", is_flag=True, help="Only say what would change.")
@click.option("--drop-failed", is_flag=True,
              help="Drop the requests that failed, to be asked anew.")  # fmt: skip
@click.option("--drop-refused", metavar="REASON,…",
              help="Drop the answers that gave nothing but refusals for these reasons, to be asked "
              "anew: no_record,cut_off.")  # fmt: skip
@click.option("--drop-stale", is_flag=True,
              help="Drop later stages' answers about rows that go, to be asked anew.")  # fmt: skip
def redecide(
    folder: Path,
    seeds: Path | None,
    stage: str | None,
    dry_run: bool,
    drop_failed: bool,
    drop_refused: str | None,
    drop_stale: bool,
    **changes: Any,
) -> None:
    """Decide a run's answers again; nothing is asked or paid.

    Under other thresholds, filters or languages, or by a recipe that reads answers otherwise.

    \b
    woolmill redecide runs/alpaca --rouge-threshold 0.6
    woolmill redecide runs/alpaca --drop-failed
    woolmill redecide runs/judged --stage 1-ask --rouge-threshold 0.6 --dry-run
    """
    given = {name: value for name, value in changes.items() if value not in (None, ())}
    stages, place = stage_named(folder, stage)
    chosen, behind = stages[place].folder, stages[place + 1 :]
    if behind and "target" in given:
        raise UsageError("--target is the last stage's; leave it out for a stage before")
    if behind and "carry" in given:
        raise UsageError(
            "--carry passes through all stages; all of them take it up with: "
            f"woolmill redecide {as_word(stages[-1].folder)} {as_flags(given)}"
        )
    deciding = _deciding(stages[: place + 1], seeds, given)
    if drop_failed or drop_refused is not None:
        if drop_stale or given or seeds is not None:
            raise UsageError("--drop-failed and --drop-refused go with nothing but --dry-run")
        if behind:
            raise UsageError(
                "--drop-failed and --drop-refused are for the last stage: a row more in the middle "
                "of a stage before it would be another row for all that later stages asked about. "
                "Ask about input rows that came to nothing in a new run: woolmill export "
                f"{as_word(folder)} --outcomes names them"
            )
        reasons = _named_reasons(drop_refused)
        count = _drop_fruitless(chosen, drop_failed, reasons, dry_run=dry_run)
        click.echo(f"{counted(count, 'answer')} would be dropped" if dry_run else _dropped(count))
        return
    if drop_stale and not dry_run and not given and seeds is None and _is_decided(chosen):
        _drop(chosen, behind)
        return
    trial = None
    if behind or dry_run:
        trial = anyio.run(trial_of, chosen, behind, deciding)
        for line in _told(trial, dry_run=dry_run):
            click.echo(line)
    if dry_run:
        return
    with RunStore.read(chosen) as run:
        before = Accepted(run)
    done = anyio.run(deciding)
    with RunStore.read(chosen) as run:
        difference = before.compared_with(run)
    click.echo(
        f"accepted {done.accepted}{of_target(done.target)} from {done.answers} answers "
        f"(before: {done.accepted_before}; {difference})  {chosen}"
    )
    if trial is None:
        for line in difference.lines():
            click.echo(line)
    if trial is not None and trial.stale:
        if drop_stale:
            _drop(chosen, behind)
            click.echo(f"go on with: {generate_again(chosen)}")
        else:
            click.echo(f"go on with: {remedy(chosen)}")
            click.echo(f"and then:   {generate_again(chosen)}")
        return
    if given.keys() - {"target"}:
        click.echo(f"go on with: {generate_again(chosen)}")
    with RunStore.read(chosen) as run:
        dataset = chosen / dataset_of(run.manifest)[1]
    click.echo(f"write the dataset with: woolmill export {as_word(chosen)} -o {as_word(dataset)}")


def _is_decided(folder: Path) -> bool:
    """Whether all answers are, so that there is nothing to do but to drop those behind."""
    with RunStore.read(folder) as run:
        counts = run.counts()
    last = counts.last_decided
    return counts.answered_below == 0 or (last is not None and last[0] >= counts.answered_below - 1)


def _drop(folder: Path, behind: Sequence[Stage]) -> None:
    click.echo(_dropped(drop(folder, behind)))


def _named_reasons(drop_refused: str | None) -> frozenset[str]:
    reasons = frozenset(filter(None, map(str.strip, (drop_refused or "").split(","))))
    if drop_refused is not None and not reasons:
        raise UsageError("--drop-refused names no reason; woolmill report names those there are")
    return reasons


def _drop_fruitless(folder: Path, failed: bool, reasons: frozenset[str], *, dry_run: bool) -> int:
    """Drop requests that failed for good, and answers that brought nothing but refusals for
    ``reasons``; how many. Raises what ``RunStore.open`` raises, and UsageError for a reason that
    nothing was refused for.
    """
    with RunReader(folder) as run:
        manifest, known = run.manifest, run.counts().reasons
        if unknown := reasons - known.keys():
            raise UsageError(
                f"--drop-refused: nothing was refused as {', '.join(sorted(unknown))}; "
                f"reasons of this run: {', '.join(sorted(known)) or 'none'}"
            )
        dropped = {answer.index for answer, _ in run.all_answers() if failed and answer.failed}
        if reasons:
            brought = groupby(run.decisions(), lambda decision: decision.index)
            dropped |= {
                index for index, each in brought if all(piece.reason in reasons for piece in each)
            }
    if not dry_run and dropped:
        with closing(RunStore.open(folder, manifest)) as store:
            group = samples_of(store) or 1
            store.drop_answers(sorted(dropped), group=group, reseed=bool(reasons))
    return len(dropped)


def _dropped(count: int) -> str:
    return f"dropped {counted(count, 'answer')}; woolmill generate asks anew what it needs of them"


def _told(trial: Trial, *, dry_run: bool) -> Iterator[str]:
    """What would change, for the person."""
    verb = "would be" if dry_run else "will be"
    yield (
        f"{trial.accepted:,} rows {verb} accepted (now {trial.accepted_before:,}): {trial.changes}"
    )
    yield from trial.changes.lines()
    for reason in sorted(trial.reasons.keys() | trial.reasons_before.keys()):
        now, then = trial.reasons_before.get(reason, 0), trial.reasons.get(reason, 0)
        if now != then:
            yield f"  refused as {reason}: {then:,} (now {now:,})"
    for each in trial.behind:
        if not each.stale.requests:
            continue
        cost = f" ({each.cost:,.4g} at its prices)" if each.cost is not None else ""
        yield (
            f"stage {each.stage.name}: {len(each.stale.requests):,} of its {each.stale.answers:,} "
            f"answers become stale; they took {each.stale.spent.tokens:,} tokens{cost}, and asking "
            "them anew takes about as many"
        )
    if trial.behind and not trial.stale:
        yield "no answer of a later stage becomes stale"


def _deciding(
    stages: Sequence[Stage], seeds: Path | None, changes: Mapping[str, Any]
) -> Callable[..., Awaitable[Redecided]]:
    """What decides the last of ``stages`` again, or a copy of it in the same way.

    What rows carry comes from the first stage: where that changes, all stages decide again, each
    on the rows that the one before it gives by then.
    """

    async def decide(copy: Path | None = None) -> Redecided:
        before = None
        with ExitStack() as copies:
            for stage in stages[:-1] if "carry" in changes else ():
                own = copies.enter_context(copied(stage.folder)) if copy else None
                passed = _passed(stage.folder, changes)
                await redecide_run(stage.folder, seeds, passed, own, before=before)
                before = own or stage.folder
            return await redecide_run(stages[-1].folder, seeds, changes, copy, before=before)

    return decide


def _passed(folder: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``changes`` an earlier stage needs to carry other fields."""
    with RunStore.read(folder) as run:
        named = is_code(str(run.manifest.free.get("recipe_spec", "")))
    return {
        name: value
        for name, value in changes.items()
        if name == "carry" or (named and name == "recipe")
    }


async def redecide_run(
    folder: Path,
    seeds: Path | None,
    changes: Mapping[str, Any],
    copy: Path | None = None,
    *,
    before: Path | None = None,
) -> Redecided:
    """Decide the answers of the run in ``folder`` again under its settings with ``changes``, or
    those of its ``copy``. What its rows carry is taken from the stage ``before``, where that was
    decided again.

    Raises ConfigError where the seeds are not the run's or a setting is wrong, and what
    ``RunStore.open`` raises.
    """
    with RunStore.read(folder) as reader:
        stored = reader.manifest
        answers = islice(reader.all_answers(), LOOKED_AT)
        rows = [answer.row for answer, _ in answers if answer.row is not None]
    out = copy or folder
    config, tasks = settings_of(folder, stored, seeds, changes)
    if config.carry and before is None:
        for line in check_carried(config, rows):
            log.info("%s", line)
    config = config.model_copy(update={"out": out})
    if uses_semantic(config):
        config = await with_served(config)
    recipe = config.make_recipe(tasks)
    wanted = make_manifest(config, recipe, tasks, str(stored.fixed["model"]))
    # Of which rows the answers are does not change, whatever is decided on them.
    identity = {"rows_identity": stored.free.get("rows_identity")}
    store = RunStore.open(
        out, replace(wanted, fixed=stored.fixed, decision=stored.decision,
                     free={**wanted.free, **identity}),
    )  # fmt: skip
    try:
        counts = store.counts()
        _forget(store, wanted.decision, before)
        if copy is None:
            keep_recipe(config.recipe, folder)
        accepted = await decide_stored(store, config, tasks)
    finally:
        await store.aclose()
    return Redecided(
        answers=counts.answered,
        accepted=accepted,
        accepted_before=counts.accepted,
        target=config.target,
    )


def _forget(store: RunStore, decision: Mapping[str, Any], before: Path | None) -> None:
    """Drop the decisions of ``store`` for others by ``decision``, on rows that carry what those of
    the stage ``before`` do.
    """
    if before is None:
        store.forget_decisions(decision)
        return
    with RunStore.read(before) as run:
        carry, samples = decision.get("carry") or (), samples_of(store) or 1
        store.forget_decisions(decision, carried_anew(run, store, carry, samples))
