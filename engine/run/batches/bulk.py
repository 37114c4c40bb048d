"""The batches of one stage: a task for each, from wherever an earlier session left it.

A task that only waits for its provider ends as soon as the run stops: the batch goes on there, and
the next start finds it in the store. One that hands over or collects is given the time that calls
in flight are given, and is taken up again at whichever step it was at.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import anyio
import anyio.abc

from engine.backends.batch.jobs import Job
from engine.errors import ConfigError, StoppedError, WoolmillError
from engine.failpoints import failpoint
from engine.records import Answer, Prompt
from engine.run.batches.collect import collect
from engine.run.batches.desk import Desk, Lane, error_of, patiently
from engine.run.batches.order import find, order, place
from engine.run.batches.route import SETTLE_S, Route, Way
from engine.run.progress import BatchView
from engine.store import BatchRow
from engine.text import as_word, counted

__all__ = ["Bulk"]

REFUSED_S = 60.0
"""How long no batch is tried after one was refused since too much was enqueued; doubles."""
T = TypeVar("T")
LOOK_S = 0.5
"""How often it is seen to whether there is nothing but batches to wait for."""


class Bulk:
    """What of a stage's requests goes in batches.

    Args:
        desk: what its parts share.
        live: the tail goes to the pool's hosts.
    """

    def __init__(self, desk: Desk, *, live: bool) -> None:
        self._desk = desk
        rows, counts = desk.store.batches(), desk.store.counts()
        for row in rows:
            if row.provider != desk.jobs.name and (row.awaited or row.state == "new"):
                raise ConfigError(
                    f"{desk.store.folder}: a batch is open at {row.provider}; go on with --provider"
                    f" {row.provider} until it is collected, or cancel it: woolmill batches"
                    f" {desk.store.folder} --cancel"
                )
        desk.rows |= {row.tag: row for row in rows if row.awaited or row.state == "new"}
        self._left_behind = [
            row for row in rows if row.state == "collected" and not row.cleared and row.job
        ]
        self._route = Route(live=live, scouts=not rows and not counts.answered)
        self._lane: Lane | None = None
        self._busy = 0
        """Tasks that do not merely wait for their provider."""
        self._held_until_s = 0.0
        self._held_s = REFUSED_S
        self._owes = True
        """There is something to send, as far as is known."""
        self._full = False
        """Nothing fits the budget or the account's limit until a batch is over."""
        self.shorter: dict[int, Prompt] = {}
        """Prompts of requests that did not fit the context, as they are asked the next time."""

    @property
    def awaited(self) -> frozenset[int]:
        """Requests whose answers may come from batches of earlier sessions."""
        return frozenset(index for row in self._desk.rows.values() if row.awaited for index in row)

    @property
    def recorded(self) -> frozenset[int]:
        """Requests that were recorded for batches which never came to be: nothing was sent."""
        new = [row for row in self._desk.rows.values() if row.state == "new"]
        return frozenset(index for row in new for index in row)

    def begin(self, lane: Lane, tasks: anyio.abc.TaskGroup) -> None:
        """Go on with the batches of earlier sessions. Once, before anything else."""
        self._lane = lane
        for row in list(self._desk.rows.values()):
            if row.awaited:
                self._desk.pool.spending.reserve(row.tokens, batch=True)
            tasks.start_soon(self._guarded, self._resumed, row)
        for row in self._left_behind:
            if not self._desk.keep_files:
                tasks.start_soon(self._guarded, self._cleared, row)
        tasks.start_soon(self._leave_in_time)

    # -- what goes where --------------------------------------------------------------------------

    def choose(self, wanted: int, expected: int, *, quiet: bool) -> Way:
        """The way of the next requests; see ``Route.choose``. Looks again by itself."""
        lane, loop = self._lane, asyncio.get_running_loop()
        assert lane is not None
        now_s = loop.time()
        way = self._route.choose(wanted, expected, quiet=quiet and not self._busy, now_s=now_s)
        held = self._full or now_s < self._held_until_s
        self._owes = wanted > 0 and not (held and way != "live")
        if way == "batch" and held:
            way = "wait"
        if way == "wait" and wanted > 0:
            loop.call_later(SETTLE_S / 2, lane.changed.set)
        return way

    @property
    def scouting(self) -> bool:
        """One request goes live before any batch, and no more than one."""
        return self._route.scouting

    def sent_live(self) -> None:
        self._route.sent_live()

    def answered(self, answers: Sequence[Answer]) -> None:
        """Answers are committed, whichever way they came."""
        self._route.answered()
        for answer in answers:
            self.shorter.pop(answer.index, None)

    @property
    def most(self) -> int:
        """Requests of one batch at most."""
        return min(self._desk.most_lines, self._desk.jobs.limits.lines)

    def hand_over(self, requests: Sequence[int], tasks: anyio.abc.TaskGroup) -> None:
        """Make a batch of these requests."""
        self._busy += 1  # at once, so that nothing else is chosen before it has begun
        tasks.start_soon(self._guarded, self._new, requests)

    def views(self) -> list[BatchView]:
        """Batches that are under way, oldest first."""
        desk, now_s, loop_s = self._desk, time.time(), asyncio.get_running_loop().time()
        return [
            BatchView(
                tag=row.tag,
                state=row.seen or row.state,
                lines=len(row),
                done=job.done if (job := desk.seen.get(row.tag)) else None,
                age_s=max(0.0, now_s - row.made_s),
                next_look_s=max(0.0, desk.looks_s.get(row.tag, loop_s) - loop_s),
            )
            for row in sorted(desk.rows.values(), key=lambda row: row.made_s)
            if row.awaited
        ]

    # -- tasks ------------------------------------------------------------------------------------

    async def _guarded(self, work: Callable[[T], Awaitable[None]], about: T) -> None:
        """One task; what it raises stops the run, and what is under way comes home."""
        assert self._lane is not None
        try:
            await work(about)
        except Exception as error:  # noqa: BLE001 - a bug too: the run ends in order
            self._lane.fail(error)
        finally:
            self._lane.changed.set()

    async def _new(self, requests: Sequence[int]) -> None:
        desk, lane = self._desk, self._lane
        assert lane is not None
        try:
            made = await order(desk, lane, requests)
            if not made.lines:
                self._full = made.broke
                if made.broke and not any(row.awaited for row in desk.rows.values()):
                    raise _out_of_budget(desk)
                return
            if lane.stops:
                return  # it is in the store as one that never came to be
            desk.note(f"{desk.jobs.name}: handing over a batch of {counted(made.lines, 'request')}")
            row, job = await place(desk, made.row, made.lines)
        finally:
            self._busy -= 1
        await self._follow(row, job)

    async def _resumed(self, row: BatchRow) -> None:
        """A batch of an earlier session, from the step that it was at."""
        desk = self._desk
        self._busy += 1
        try:
            if row.state == "new":
                await desk.keep(replace(row, state="void"))
                desk.forget_files(row.tag)
                return
            if row.state == "creating":
                found = await find(desk, row)
                if found is None:
                    await self._void(row)
                    return
                desk.note(f"{desk.jobs.name}: found batch {found.id}, which a crash had cut off")
                row = await desk.keep(replace(row, state="open", job=found.id, seen=found.state))
                failpoint("batch.open")
            job = await self._looked(row)
        finally:
            self._busy -= 1
        await self._follow(row, job)

    async def _follow(self, row: BatchRow, job: Job) -> None:
        """Look at a batch now and then; collect it when it is over, or leave when the run stops."""
        desk, lane = self._desk, self._lane
        assert lane is not None
        while job.running:
            desk.seen[row.tag] = job
            if (seen := _seen(job)) != row.seen:
                row = await desk.keep(replace(row, seen=seen))
            desk.looks_s[row.tag] = asyncio.get_running_loop().time() + desk.poll_s
            lane.changed.set()
            with anyio.move_on_after(desk.poll_s):
                await lane.changed.until(lambda: lane.stops)
            if lane.stops:
                return
            job = await self._looked(row)
        self._busy += 1
        try:
            await self._over(row, job)
        finally:
            self._busy -= 1
            self._full = False

    async def _looked(self, row: BatchRow) -> Job:
        jobs = self._desk.jobs
        return await patiently(self._desk, "look at a batch", lambda: jobs.status(row.job))

    async def _over(self, row: BatchRow, job: Job) -> None:
        desk = self._desk
        if job.failure is not None:
            await self._refused(row, job)
            return
        assert self._lane is not None
        row = await collect(desk, self._lane, row, job)
        self._held_s = REFUSED_S
        if not desk.keep_files:
            await self._cleared(row, job)
        desk.forget_files(row.tag)

    async def _refused(self, row: BatchRow, job: Job) -> None:
        """A batch that was refused as a whole: nothing of it ran."""
        desk, verdict = self._desk, job.failure
        assert verdict is not None
        await self._void(row)
        if verdict.kind not in ("throttled", "unavailable"):
            raise error_of(desk, "run a batch", verdict)
        others = any(each.awaited for each in desk.rows.values())
        hold_s, self._held_s = self._held_s, 2 * self._held_s
        self._held_until_s = asyncio.get_running_loop().time() + hold_s
        self._full = others
        when = "when another is over" if others else f"in {hold_s:.0f} s"
        desk.note(f"{desk.jobs.name}: refuses a batch for now ({verdict.message}); again {when}")
        desk.most_lines = max(1, min(desk.most_lines, len(row)) // 2)

    async def _void(self, row: BatchRow) -> None:
        """A batch that never ran: its requests are sent again."""
        desk, lane = self._desk, self._lane
        assert lane is not None
        file = row.file
        await desk.keep(replace(row, state="void"))
        desk.pool.spending.settle(row.tokens, batch=True)
        left = [index for index in row if not lane.has_answer(index)]
        lane.sent(-len(left))
        lane.unsent(left)
        if file and not desk.keep_files:
            await self._deleted(None, file)
        desk.forget_files(row.tag)

    async def _cleared(self, row: BatchRow, job: Job | None = None) -> None:
        """Delete what the provider keeps of a batch whose answers are all here."""
        desk = self._desk
        try:
            job = job or await desk.jobs.status(row.job)
            await desk.jobs.delete(job, row.file)
        except WoolmillError as error:
            desk.note(f"{desk.jobs.name}: files of batch {row.job} stay there ({error})")
            return
        failpoint("batch.deleted")
        await desk.store.batch(replace(row, cleared=True))

    async def _deleted(self, job: Job | None, file: str) -> None:
        try:
            await self._desk.jobs.delete(job, file)
        except WoolmillError as error:
            self._desk.note(f"{self._desk.jobs.name}: file {file} stays there ({error})")

    async def _leave_in_time(self) -> None:
        """Stop the run when nothing but batches was waited for, for as long as the person wants."""
        desk, lane = self._desk, self._lane
        assert lane is not None
        since_s: float | None = None
        while not lane.stops and desk.wait_s is not None:
            now_s = asyncio.get_running_loop().time()
            awaited = [row for row in desk.rows.values() if row.awaited]
            looked = all(row.tag in desk.looks_s for row in awaited)
            if not awaited or not looked or self._busy or self._owes or not lane.idle:
                since_s = None
            elif since_s is None:
                since_s = now_s
            if since_s is not None and now_s - since_s >= desk.wait_s:
                lane.fail(_still_running(desk, awaited))
                return
            with anyio.move_on_after(LOOK_S):
                await lane.changed.until(lambda: lane.stops)

    async def aclose(self) -> None:
        """Let go of the provider; batches go on there."""
        await self._desk.jobs.aclose()

    def left_running(self) -> str:
        """For the person, when the run has stopped: which batches go on, and how to collect them;
        empty where none does.
        """
        rows = [row for row in self._desk.rows.values() if row.awaited]
        if not rows:
            return ""
        folder = self._desk.store.folder
        return (
            f"{_how_many(self._desk, rows)} left running; the same command collects what they give,"
            f" woolmill batches {as_word(folder)} shows them, and --cancel with it stops them"
        )


def _seen(job: Job) -> str:
    """How far a batch is, in the provider's word for it."""
    counts = f" ({job.done:,} of {job.total:,})" if job.done and job.total else ""
    return job.state + counts


def _still_running(desk: Desk, rows: Sequence[BatchRow]) -> StoppedError:
    return StoppedError(f"{_how_many(desk, rows)} not over yet; come back with the same command")


def _how_many(desk: Desk, rows: Sequence[BatchRow]) -> str:
    requests = sum(map(len, rows))
    batches = f"{len(rows)} batches" if len(rows) != 1 else "1 batch"
    return f"{desk.jobs.name}: {batches} with {counted(requests, 'request')}"


def _out_of_budget(desk: Desk) -> StoppedError:
    return StoppedError(desk.pool.spending.short_of())
