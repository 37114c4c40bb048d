"""``woolmill batches``: which batches a run has, and an end to those that are not over."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anyio
import click

from engine.backends.base import Failure
from engine.backends.batch.jobs import Jobs, Order
from engine.errors import ConfigError, InputError, UsageError
from engine.money import Prices
from engine.run.batches.make import BATCHES, jobs_of, key_of
from engine.settings import RunConfig
from engine.stages import stages_of_run
from engine.store import BatchRow, RunReader, RunStore

__all__ = ["batches", "waiting"]

OF_THE_PROVIDER = (
    *("base_url", "endpoint", "key_env", "key_file", "header", "query", "ca_file", "proxy"),
    *("insecure_http", "vllm_python", "vllm_arg"),
)
"""Settings of a run by which its provider is reached."""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--cancel",
    is_flag=True,
    help="Stop those that are not over; what is answered by then is paid and kept.",
)
@click.option(
    "--forget",
    is_flag=True,
    help="Never collect those that are not over; what they hold is asked again.",
)
def batches(folder: Path, cancel: bool, forget: bool) -> None:
    """Show a run's batches, oldest first, as they were last seen.

    \b
    woolmill batches runs/large
    woolmill batches runs/large --cancel
    """
    if cancel and forget:
        raise UsageError("give --cancel or --forget: what is forgotten cannot be collected")
    for stage in stages_of_run(folder):
        with RunReader(stage.folder) as run:
            rows, manifest = run.batches(), run.manifest
            for line in _shown(run, rows, stage.name):
                click.echo(line)
        awaited = [row for row in rows if row.awaited]
        if forget and awaited:
            anyio.run(_forget, stage.folder)
            click.echo(f"forgot {_counted(awaited)}; woolmill generate asks for them again")
        if cancel and awaited:
            stopped = anyio.run(_cancel, stage.folder, manifest.free, awaited)
            click.echo(
                f"asked {awaited[0].provider} to stop {stopped} of {_counted(awaited)}; the run's"
                " own command collects what was answered"
            )


def _counted(rows: Sequence[BatchRow]) -> str:
    batches = "1 batch" if len(rows) == 1 else f"{len(rows)} batches"
    return f"{batches} with {sum(map(len, rows)):,} requests"


def _shown(run: RunReader, rows: Sequence[BatchRow], stage: str) -> list[str]:
    """A line for each batch, and one for all."""
    lines = [
        f"{row.tag[:8]}  {row.provider:<9} {_state(row):<28} {len(row):>7,} requests  "
        f"{_age(time.time() - row.made_s):>9}  {_came_to(row)}".rstrip()
        for row in rows
        if row.state != "void"
    ]
    free, counts = run.manifest.free, run.counts()
    prices = Prices(
        prompt=free.get("price_prompt"),
        completion=free.get("price_completion"),
        cached=free.get("price_cached"),
    )
    known = prices.known or counts.stated_nano
    cost = f", cost {prices.cost(counts):.4g}" if known else ""
    name = f"{stage}: " if stage else ""
    open_ = [row for row in rows if row.awaited]
    return [
        *lines,
        f"{name}{len(open_)} open with {sum(map(len, open_)):,} requests; {counts.answered:,}"
        f" answers so far, accepted {counts.accepted:,}{cost}",
    ]


def _state(row: BatchRow) -> str:
    return f"{row.seen or row.state}" if row.awaited else row.state


def _came_to(row: BatchRow) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in row.done.items())


def _age(seconds: float) -> str:
    minutes = max(0, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


async def _forget(folder: Path) -> None:
    """Void what is not over, as the only one who may write to the run."""
    with RunReader(folder) as run:
        manifest = run.manifest
    store = RunStore.open(folder, manifest)
    try:
        for row in store.batches():
            if row.awaited:
                await store.batch(replace(row, state="void"))
    finally:
        await store.aclose()


async def _cancel(folder: Path, free: object, rows: Sequence[BatchRow]) -> int:
    """Ask the provider to stop these; how many it has."""
    stopped = 0
    for row in rows:
        jobs = _jobs(folder, free, row)
        try:
            job = row.job
            if not job:
                found = await jobs.find(_order(folder, row))
                job = found.id if found is not None else ""
            if job:
                await jobs.cancel(job)
                stopped += 1
        except Failure as failure:
            verdict = failure.verdict
            raise verdict.error or ConfigError(
                f"{row.provider}: cannot cancel {row.job} ({verdict.reason}: {verdict.message})"
            ) from failure
        finally:
            await jobs.aclose()
    return stopped


def _jobs(folder: Path, free: object, row: BatchRow) -> Jobs:
    known = free if isinstance(free, dict) else {}
    given = {name: known[name] for name in OF_THE_PROVIDER if known.get(name)}
    try:
        config = RunConfig.model_validate(
            {**given, "backend": "batch", "provider": row.provider, "model": row.model}
        )
    except ValueError as exc:
        raise InputError(f"{folder}: its settings name no provider that can be asked") from exc
    return jobs_of(config, folder, key_of(config))


def _order(folder: Path, row: BatchRow) -> Order:
    return Order(
        tag=row.tag,
        path=folder / BATCHES / f"{row.tag}.jsonl",
        lines=len(row),
        model=row.model,
        api="chat",
        made_s=row.made_s,
        file=row.file,
    )


def waiting(folder: Path) -> list[tuple[Path, BatchRow]]:
    """(folder of its files, batch) of each that is carried elsewhere and not answered yet.

    Raises UsageError where there is none.
    """
    found = []
    for stage in stages_of_run(folder):
        with RunReader(stage.folder) as run:
            rows = [row for row in run.batches() if row.awaited and row.provider == "file"]
        found += [(stage.folder / BATCHES, row) for row in rows]
    if not found:
        raise UsageError(
            f"{folder}: no batch waits to be carried; make one with: woolmill generate --backend"
            f" batch --provider file --wait 0 --model NAME --out {folder}"
        )
    return found
