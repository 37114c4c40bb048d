"""Stages: runs that go on together, each over the accepted rows of the one before it.

    stage 0 ──accepted rows──▶ stage 1 ──accepted rows──▶ stage 2 ▶ the dataset
            ◀──rows wanted────         ◀──rows wanted────         ◀ the target

Every stage is a whole run, with a store, a plan and decisions of its own in a folder of its own:
the last one's is the run's folder, the others' are below its ``stages``. So each can be viewed,
exported, verified and decided again like any run, and each goes on after a crash like any run.

A row goes on as soon as its acceptance is committed; no stage waits for another to end. Which rows
there are, and in which order, follows from the answers alone: the input of a stage is the accepted
rows of the one before it in that one's plan order. Rows that nobody needed when the target was
reached serve a higher target later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import anyio
import orjson

from engine.decide.decider import uses_semantic
from engine.decide.process import Deciding
from engine.errors import ConfigError, InputError
from engine.limits import Pool
from engine.prompts.fit import Prompts
from engine.records import EVERY, Record
from engine.run.batches.bulk import Bulk
from engine.run.deliver import RetryPolicy
from engine.run.inputs import InputRows
from engine.run.pipeline import Pipeline
from engine.run.pooled import Pooled
from engine.run.progress import Display, Owner, Pace, Progress, Stop
from engine.run.settle import Settled
from engine.run.signals import listen
from engine.stages import remedy, stale_answers
from engine.store import RunReader, RunStore
from engine.store.reader import InFlight, Resume

__all__ = ["Following", "OpenStage", "link", "refuse_stale", "run_chain"]


class Following:
    """The accepted rows of a stage's store by rank, as they are committed.

    Args:
        store: of the stage that gives them.
        first: rows below this rank are not needed, but for a look back.
    """

    def __init__(self, store: RunReader, first: int) -> None:
        self._store = store
        self._first = first
        self._after = (-1, -1)
        self._rows: dict[int, Record] = {}
        self.count = 0
        if first and (before := store.accepted_place(first - 1)) is not None:
            self.count, self._after = first, before  # a large run goes on at once
        self.take_in()

    def take_in(self) -> None:
        """Take in what was committed since the last time."""
        for decision in self._store.decisions(accepted=True, after=self._after):
            if decision.record is not None:
                self._rows[self.count] = decision.record
            self.count += 1
            self._after = (decision.index, decision.position)

    def forget_below(self, rank: int) -> None:
        """Rows below ``rank`` are answered."""
        while self._first < rank:
            self._rows.pop(self._first, None)
            self._first += 1

    def row(self, number: int) -> Record | None:
        """The row of this rank; None: there are not so many yet."""
        if number >= self.count:
            return None
        if number in self._rows:
            return self._rows[number]
        place = self._store.accepted_place(number)
        decision = self._store.decision(*place) if place else None
        return decision.record if decision else None


def refuse_stale(before: RunReader, store: RunReader, samples: int) -> None:
    """Compare with what a stage asked about earlier. Raises ConfigError with how many of its
    answers belong to rows that are others now.
    """
    stale = len(stale_answers(before, store, samples).requests)
    if stale:
        raise ConfigError(
            f"{store.folder}: {stale:,} of its answers are about rows that {before.folder} no "
            "longer gives, as after deciding again with other settings; decide again as before, or "
            f"drop these answers, to be asked anew, with: {remedy(before.folder)}"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenStage:
    """One stage, opened."""

    settled: Settled
    store: RunStore
    resume: Resume
    pool: Pool
    prompts: Prompts
    deciding: Deciding
    rows: InputRows | Following | None
    before: OpenStage | None
    pooled: Pooled | None = None
    bulk: Bulk | None = None

    @property
    def paid(self) -> bool:
        """Its answers cost money, as far as anybody knows."""
        return self.settled.config.chosen_backend not in ("transformers", "vllm")

    @property
    def sent_again(self) -> list[InFlight]:
        """Requests that were in flight when the last session ended and no batch will answer."""
        if self.bulk is None:
            return list(self.resume.in_flight)
        others = self.bulk.awaited | self.bulk.recorded
        return [each for each in self.resume.in_flight if each.index not in others]

    @property
    def identity(self) -> list[str]:
        """What tells that its rows are as they were: which run they are of, and decided how."""
        settings = orjson.dumps(dict(self.store.manifest.decision), option=orjson.OPT_SORT_KEYS)
        return [self.store.run_id, sha256(settings).hexdigest()]


class _Link(Owner):
    """Between a stage and its neighbours; whoever owns the run hears of the last stage."""

    def __init__(self, owner: Owner | None, stage: OpenStage) -> None:
        self._owner = owner or Owner()
        self._samples = stage.settled.config.samples or 1
        self._input = stage.rows if isinstance(stage.rows, Following) else None
        self._pooled = stage.pooled
        self.pipeline: Pipeline | None = None
        """The stage itself."""
        self.feeding: Pipeline | None = None
        """The stage that gives the input."""
        self.fed: Pipeline | None = None
        self.output: Following | None = None
        self.fed_samples = 1

    def committed(self, below: int) -> None:
        self._owner.committed(below)
        if self._input is not None:
            self._input.forget_below(below // self._samples)
        self.show_pool(below)
        self.pass_on(grows=True)

    def ended(self) -> None:
        self._owner.ended()
        self.pass_on(grows=False)

    def show_pool(self, undecided: int) -> None:
        """Let the requests go that may see what is decided now."""
        if self._pooled is not None and self.pipeline is not None:
            self._pooled.take_in()
            self.pipeline.there_are(self._pooled.possible(undecided), grows=True)

    def pass_on(self, *, grows: bool) -> None:
        """Tell the next stage what it may ask about."""
        if self.fed is not None and self.output is not None:
            self.output.take_in()
            self.fed.there_are(self.output.count * self.fed_samples, grows=grows)

    def wants(self, requests: int) -> None:
        if self.feeding is not None:
            self.feeding.demand(math.ceil(requests / self._samples))


def link(stages: Sequence[OpenStage], display: Display, owner: Owner) -> list[Pipeline]:
    """The pipelines of the stages, each knowing its neighbours."""
    links = [_Link(owner if stage is stages[-1] else None, stage) for stage in stages]
    pipelines = [
        _pipeline(stage, display, own, is_last=stage is stages[-1], watches=watches)
        for stage, own, watches in zip(stages, links, _watching(stages), strict=True)
    ]
    for stage, own, pipeline in zip(stages, links, pipelines, strict=True):
        own.pipeline = pipeline
        decided = stage.resume.last_decided
        own.show_pool(decided[0] if decided else 0)
    for place in range(1, len(stages)):
        rows = stages[place].rows
        assert isinstance(rows, Following)
        links[place].feeding = pipelines[place - 1]
        links[place - 1].fed, links[place - 1].output = pipelines[place], rows
        links[place - 1].fed_samples = stages[place].settled.config.samples or 1
        links[place - 1].pass_on(grows=True)
    for stage, pipeline in zip(stages[:-1], pipelines, strict=False):
        name = stage.settled.recipe.name.rpartition("/")[2]
        pipelines[-1].progress.before[name] = pipeline.progress
    return pipelines


def _watching(stages: Sequence[OpenStage]) -> list[bool]:
    """Whether a stage watches its pool: one does for all that share it."""
    pools = [stage.pool for stage in stages]
    return [pool not in pools[place + 1 :] for place, pool in enumerate(pools)]


def _pipeline(
    stage: OpenStage, display: Display, owner: Owner, *, is_last: bool, watches: bool
) -> Pipeline:
    config, recipe = stage.settled.config, stage.settled.recipe
    samples_a_row = (config.samples or 1) if recipe.reduces else 1
    return Pipeline(
        store=stage.store,
        pool=stage.pool,
        prompts=stage.prompts,
        deciding=stage.deciding,
        policy=RetryPolicy(max_attempts=config.max_attempts),
        pace=Pace(
            target=config.target if is_last else 0,
            max_requests=config.max_requests,
            request_batch_size=config.request_batch_size,
            max_barren_requests=config.max_barren_requests * samples_a_row,
            max_refusals_in_a_row=config.max_refusals_in_a_row,
            drain_timeout_s=config.drain_timeout_s,
            at_least=8 if stage.paid else 16,
            by_meaning=uses_semantic(config),
            most_records=recipe.most,
            paid=stage.paid,
            feeds=not is_last,
        ),
        display=display,
        bulk=stage.bulk,
        owner=owner,
        leads=is_last,
        watches=watches,
    )


async def run_chain(
    stages: Sequence[OpenStage], pipelines: Sequence[Pipeline], display: Display
) -> Stop:
    """Run all stages; what stops the last one stops the run, and so does a fault of any, or a
    signal.
    """
    async with anyio.create_task_group() as hearing:
        await hearing.start(listen, pipelines[-1].stopping)
        if len(stages) == 1:  # how many rows come to a later stage, nobody knows
            hearing.start_soon(_count, stages[0], pipelines[0].progress, display)
        stop = await _run_stages(pipelines)
        hearing.cancel_scope.cancel()
    return stop


async def _count(stage: OpenStage, progress: Progress, display: Display) -> None:
    """Say how many requests the whole input is, where that is the goal; or that it has no end."""
    if isinstance(stage.rows, InputRows) and progress.target == EVERY:
        try:
            count = await stage.rows.counted()
        except InputError as error:  # long before the run comes there, and has paid so far
            display.note(f"the run will end at a row that cannot be read: {error}")
            return
        if progress.requests is None:
            progress.requests = count * (stage.settled.config.samples or 1)
            stage.store.keep_size(progress.requests)  # for the page, which has no input to count


async def _run_stages(pipelines: Sequence[Pipeline]) -> Stop:
    last = pipelines[-1]
    if len(pipelines) == 1:
        return await last.run()

    async def feed(place: int) -> None:
        stop = await pipelines[place].run()
        if stop.reached:
            pipelines[place].owner.ended()

    stopped: list[Stop] = []
    for pipeline in pipelines:
        pipeline.stopping.on_halt = _halts(pipeline, pipelines)

    def leave() -> None:
        for pipeline in pipelines[:-1]:
            pipeline.stopping.leave()

    last.stopping.on_leave = leave
    own = [pipeline.stopping.in_flight for pipeline in pipelines]
    last.stopping.in_flight = lambda: sum(in_flight() for in_flight in own)
    async with anyio.create_task_group() as feeding:
        for place in range(len(pipelines) - 1):
            feeding.start_soon(feed, place)
        stopped.append(await last.run())
    return stopped[0]


def _halts(one: Pipeline, pipelines: Sequence[Pipeline]) -> Any:
    """What happens when one stage sends nothing more."""

    def halt(stop: Stop) -> None:
        if stop.reached and one is not pipelines[-1]:
            return  # its input is at its end; the stages behind it go on
        for other in pipelines:
            if other is not one:
                other.stopping.halt(stop)

    return halt
