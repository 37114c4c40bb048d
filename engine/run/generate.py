"""From settings to a finished run: put the parts together, run the pipeline, say how it ended."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anyio

from engine.backends.base import Backend
from engine.backends.batch.nobody import Nobody
from engine.datasets import BAD_ROWS
from engine.decide.decider import fetch_encoder, uses_semantic
from engine.decide.process import Deciding
from engine.embeddings.served import with_served
from engine.errors import ConfigError, InputError
from engine.kept import keep_recipe
from engine.limits import Pool
from engine.money import Spent
from engine.processes.garbage import seldom_collected
from engine.prompts.fit import Prompts, Rows
from engine.prompts.tokens import tokenizer_counter
from engine.recipes.base import Recipe
from engine.recipes.guard import RecipeFault
from engine.recipes.seeds import keep
from engine.run.advice import refuse_other_settings
from engine.run.batches.bulk import Bulk
from engine.run.batches.make import make_bulk, refuse_open_batches
from engine.run.chain import Following, OpenStage, link, refuse_stale, run_chain
from engine.run.display import Guarded
from engine.run.fleet import Keeper, make_fleet
from engine.run.inputs import InputRows
from engine.run.lessons import Lessons
from engine.run.manifest import make_manifest
from engine.run.pooled import Pooled
from engine.run.progress import Display, Owner, Progress, Stop
from engine.run.servers import make_backends, make_pool, served_model, server_at, started
from engine.run.settle import (
    Settled,
    about_carried,
    about_language,
    answered_by,
    earlier_manifest,
    refuse_other_stages,
    settle,
    stages_of,
)
from engine.run.slow_start import SlowStart
from engine.settings import RunConfig
from engine.stages import root_of
from engine.store import Manifest, RunStore
from engine.surroundings import allow_open_files
from engine.text import counted

__all__ = ["Result", "generate", "learn_lengths", "make_backends", "make_prompts", "try_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a run ended."""

    stop: Stop
    progress: Progress
    folder: Path
    seconds: float
    resent: int = 0
    """Requests that an earlier session had sent and got no answer to."""
    bad_rows: int = 0
    """Input rows that cannot be read and were left out, as far as the input was read."""


async def generate(config: RunConfig, display: Display, owner: Owner | None = None) -> Result:
    """Run to the target, a stop or a fault; go on where an earlier run in the folder stopped.

    A recipe of several stages is a chain of runs that go on together, each over the accepted rows
    of the one before it: see ``engine.run.chain``. In steps:

    1. ``settle``: recipe, seeds, input rows and settings, without a network.
    2. Each stage is opened with its store. Servers start here only where they alone know which
       model they serve, which is part of what a run is.
    3. Prompts are tried, so that mistakes are told before anything is waited for.
    4. All other servers start, and the deciding processes.
    5. Contexts are known now; prompts are tried again, as one may be too long.
    6. The pipelines run until the target, a stop or a fault.

    Raises:
        WoolmillError: a start is impossible. What ends a started run is in ``Result.stop``.
    """
    began = time.monotonic()
    allow_open_files()
    display, owner = SlowStart(Guarded(display), config), owner or Owner()
    chain = stages_of(settle(config))
    refuse_other_stages(chain)
    last = chain[-1].config
    for settled in chain:
        fetch_encoder(settled.config)
    async with AsyncExitStack() as stack:
        servers = _Servers(stack, display)
        stages: list[OpenStage] = []
        for settled in chain:
            before = stages[-1] if stages else None
            stages.append(await _opened(settled, servers, stack, display, before))
        owner.opened(last.target)
        resent = sum(len(stage.sent_again) for stage in stages)
        accepted = stages[-1].resume.counts.accepted
        if accepted >= last.target:
            done = Progress(target=last.target, accepted=accepted)
            seconds = time.monotonic() - began
            return Result(stop=Stop(), progress=done, folder=last.out, seconds=seconds)
        for stage in stages:
            _say_kept(stage, display, named=len(stages) > 1)
        for line in about_carried(chain):
            display.note(line)
        for stage in stages:
            _say_resent(stage, display)
            for line in about_language(stage.settled.config, stage.settled.tasks):
                display.note(line)
            if stage.before is None:
                try_out(stage.prompts, stage.settled.recipe)
            await stage.deciding.start()
        await servers.start()
        servers.spent(stages)
        for stage in stages:
            await _ready(stage)
        pipelines = link(stages, display, owner)
        owner.running(pipelines[-1].stopping.stop)
        with seldom_collected():
            stop = await run_chain(stages, pipelines, display)
    return Result(
        stop=stop,
        progress=pipelines[-1].progress,
        folder=last.out,
        seconds=time.monotonic() - began,
        resent=resent,
        bad_rows=_bad_rows(stages[0]),
    )


def _bad_rows(first: OpenStage) -> int:
    rows = first.rows
    return rows.bad.count if isinstance(rows, InputRows) else 0


class _Servers:
    """Who answers: a pool for each of the settings' models, started once."""

    def __init__(self, stack: AsyncExitStack, display: Display) -> None:
        self._stack = stack
        self._display = display
        self._pools: dict[str, tuple[Pool, RunConfig]] = {}
        self._keepers: dict[str, Keeper] = {}
        """Of the pools whose servers come and go."""
        self._started: set[str] = set()

    async def of(self, settled: Settled) -> Pool:
        """The pool of a stage. It is started where only its servers know which model they serve,
        and asking is free.
        """
        name, config = settled.recipe.model, settled.config
        if name not in self._pools:
            fleet = make_fleet(config, self._display.note)
            pool = make_pool(config, make_backends(config) if fleet is None else ())
            self._stack.push_async_callback(_surely, pool.aclose)
            self._pools[name] = pool, config
            if fleet is not None:
                make = partial(server_at, config, key=fleet.key)
                self._keepers[name] = Keeper(fleet, pool, make, self._display.note)
                self._stack.push_async_callback(_surely, self._keepers[name].aclose)
            if not served_model(config, pool):
                await self._start(name)
        return self._pools[name][0]

    async def start(self) -> None:
        for name, (pool, config) in self._pools.items():
            if name in self._started or isinstance(next(iter(pool.backends), None), Nobody):
                continue
            model = served_model(config, pool)
            self._display.note(f"starting {config.chosen_backend} with {model}")
            loading = time.monotonic()
            await self._start(name)
            self._display.note(f"started after {time.monotonic() - loading:.1f} s")

    async def _start(self, name: str) -> None:
        pool, config = self._pools[name]
        self._started.add(name)
        if name in self._keepers:
            await self._keepers[name].begin(config.wait_for_server_s)
        else:
            await started(pool, config.wait_for_server_s, self._display)

    def teach(self, settled: Settled, lessons: Lessons) -> None:
        """Let the backends of a stage know what was learnt, those too that join later."""
        name = settled.recipe.model
        for backend in self._pools[name][0].backends:
            lessons.teach(backend)
        if name in self._keepers:
            self._keepers[name].prepare = lessons.teach

    def spent(self, stages: Sequence[OpenStage]) -> None:
        """Book what earlier sessions of the stages used."""
        for pool, _ in self._pools.values():
            used = Spent()
            for stage in stages:
                if stage.pool is pool:
                    used.take_over(stage.resume.counts)
            pool.spent(used)


async def _opened(
    settled: Settled,
    servers: _Servers,
    stack: AsyncExitStack,
    display: Display,
    before: OpenStage | None,
) -> OpenStage:
    """A stage with its store open, behind the stage ``before``."""
    pool = await servers.of(settled)
    model = served_model(settled.config, pool)
    settled = answered_by(settled, model, next(iter(pool.backends), None))
    if uses_semantic(settled.config):
        settled = replace(settled, config=await with_served(settled.config, display.note))
    config, recipe, tasks = settled.config, settled.recipe, settled.tasks
    manifest = make_manifest(config, recipe, tasks, model)
    if before is not None:
        manifest = replace(manifest, free={**manifest.free, "rows_identity": before.identity})
    _check_input(settled, before, manifest)
    store = RunStore.open(config.out, manifest)
    stack.push_async_callback(_surely, store.aclose)
    with suppress(OSError):  # a disk in trouble stops the store, and says so there
        keep(tasks, config.out)
        keep_recipe(config.recipe, config.out)
    servers.teach(settled, Lessons(store, display, any_api=settled.any_api))
    samples = config.samples or 1
    resume = store.resume()
    counts = resume.counts
    pool.doubts.answered_before |= counts.answered > counts.failed + counts.not_asked
    rows: InputRows | Following | None = settled.rows
    if settled.rows is not None:
        settled.rows.name_bad_rows(display.note, root_of(config.out) / BAD_ROWS)
    if before is not None:
        rows = Following(before.store, resume.answered_below // samples)
    bulk: Bulk | None = None
    if config.chosen_backend == "batch":
        bulk = make_bulk(settled, store, pool, display.note)
        stack.push_async_callback(_surely, bulk.aclose)
    else:
        refuse_open_batches(store)
    deciding = Deciding(config, tasks, display.note)
    stack.push_async_callback(_surely, deciding.aclose)
    pooled = Pooled(store) if recipe.pooled else None
    return OpenStage(
        settled=settled,
        store=store,
        resume=resume,
        pool=pool,
        prompts=make_prompts(settled, rows, pooled, counts.reseeds),
        deciding=deciding,
        rows=rows,
        before=before,
        pooled=pooled,
        bulk=bulk,
    )


def _check_input(settled: Settled, before: OpenStage | None, manifest: Manifest) -> None:
    """Raises ConfigError where the settings are others than the run was started with, or what was
    asked about earlier is no longer what the input gives.

    Before the store is opened, which notes of what input it is: a start that is refused here is
    refused the next time too.
    """
    config, rows = settled.config, settled.rows
    if earlier_manifest(config.out) is None:
        return  # new, or cut short while it was made; opening it says what else is wrong
    with RunStore.read(config.out) as earlier:
        # First of all: with another number of samples all rows would be others.
        refuse_other_settings(config.out, earlier.manifest, manifest)
        if before is not None and settled.earlier_rows not in (None, before.identity):
            refuse_stale(before.store, earlier, config.samples or 1)
        elif before is None and rows is not None and not settled.same_rows:
            rows.check(earlier, config.samples or 1)


async def _ready(stage: OpenStage) -> None:
    """Learn how long prompts are and may be, and wait until models are loaded."""
    await learn_lengths(stage.prompts, stage.settled.config, stage.pool.backends)
    if stage.before is None:
        try_out(stage.prompts, stage.settled.recipe)
    await stage.deciding.ready()


async def learn_lengths(prompts: Prompts, config: RunConfig, backends: Sequence[Backend]) -> None:
    """Learn from ``backends``, which have started, how long prompts are and may be."""
    known = [b.context_length for b in backends if b.context_length is not None]
    prompts.context_length = config.context_length or min(known, default=None)
    counter = tokenizer_counter(config.tokenizer) if config.tokenizer else None
    asked = next(iter(backends), None) or Nobody("", "")  # of a fleet all may have gone by now
    await prompts.count(counter or asked.count_tokens)


def _say_kept(stage: OpenStage, display: Display, *, named: bool) -> None:
    """What earlier sessions left: all of their answers, so that none looks lost."""
    counts = stage.resume.counts
    if not counts.answered:
        return
    of = f"stage {stage.settled.recipe.name.rpartition('/')[2]}, " if named else ""
    last = counts.last_decided
    waiting = counts.answered - (last[0] + 1 if last is not None else 0)
    rows = counted(counts.accepted, "row")
    display.note(
        f"going on with {of}{counted(counts.answered, 'answer')}: {rows} accepted, "
        f"{counts.decided - counts.accepted:,} refused"
        + (f", {counted(waiting, 'answer')} not decided yet" if waiting > 0 else "")
    )


def _say_resent(stage: OpenStage, display: Display) -> None:
    if waiting := stage.sent_again:
        numbers = ", ".join(str(request.index) for request in waiting[:8])
        by_session = Counter(request.session for request in waiting)
        sessions = stage.store.sessions()
        billed = sum(each.perhaps_billed(by_session[each.number]) for each in sessions)
        perhaps = f", of which {billed:,} may have been billed" if billed and stage.paid else ""
        display.note(
            f"sending again {counted(len(waiting), 'request')} without an answer{perhaps}: "
            f"{'numbers' if len(waiting) > 1 else 'number'} {numbers}"
            f"{' …' if len(waiting) > 8 else ''}"
        )


async def _surely(close: Callable[[], Awaitable[None]]) -> None:
    """Close to the end, also where the run is cancelled before it begins."""
    with anyio.CancelScope(shield=True):
        await close()


TRIED = 3
"""Requests that are made before anything is paid, to see whether the recipe can make one."""


def try_out(prompts: Prompts, recipe: Recipe) -> None:
    """Raises ConfigError where none of the first requests can be made, or fits the context as far
    as it is known; InputError where the input has no rows.
    """
    faults = []
    for index in range(TRIED):
        try:
            prompt = prompts.prompt(index)
        except RecipeFault as error:
            faults.append(f"recipe {recipe.name} makes no prompt: {error}")
            continue
        if index == 0 and prompt is None:
            raise InputError("the input holds no rows; see --rows")
        context, tokens = prompts.context_length, prompt.tokens if prompt is not None else None
        if context is None or tokens is None or tokens < context:
            return
        faults.append(
            f"the shortest prompt of recipe {recipe.name} takes some {tokens} of the {context}"
            " tokens of the context, which leaves none to answer; use a model with a longer one,"
            " or correct --context-length"
        )
    raise ConfigError(faults[0])


def make_prompts(
    settled: Settled, rows: Rows | None = None, pooled: Pooled | None = None, reseeds: int = 0
) -> Prompts:
    """What makes the prompts of a run with these settings, over ``rows`` or its own input."""
    config = settled.config
    given = config.model_dump(include={"max_tokens", "temperature", "top_p"}, exclude_none=True)
    return Prompts(
        settled.recipe,
        seed=config.seed,
        api=config.asked_api,
        sampling=config.sampling(),
        given={**given, **config.extra_body},
        send_seed=config.send_seed,
        fit=config.fit,
        rows=rows or settled.rows,
        pool=pooled.seen_by if pooled is not None else None,
        samples=config.samples or 1,
        reseeds=reseeds,
    )
