"""A batch from its requests to the provider's yes.

Each step is in the store before the next begins. The one that cannot be taken back, ``create``, is
made with a tag; where it is not known whether it succeeded, the provider's own list tells, which
may lag behind.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.backends.base import Failure
from engine.backends.batch.jobs import Job, Order
from engine.backends.batch.lines import Writing, encoded, request_id
from engine.errors import StoppedError
from engine.failpoints import failpoint
from engine.records import Prompt
from engine.run.batches.desk import FIRST_WAIT_S, MOST_WAIT_S, Desk, Lane, error_of, patiently
from engine.run.deliver import most_tokens
from engine.store import BatchRow, runs_of

__all__ = ["Ordered", "find", "order", "place"]

CHUNK = 128
"""Requests that are made, recorded and written at a time."""
LISTING_S = 30.0
"""How long a new batch may be missing in its provider's list."""


@dataclass(slots=True)
class Ordered:
    """What became of a wish for a batch."""

    row: BatchRow
    lines: int = 0
    broke: bool = False
    """The budget, or the account's limit of enqueued tokens, bounded it."""


async def order(desk: Desk, lane: Lane, requests: Sequence[int]) -> Ordered:
    """Write the file of a batch of ``requests``, and record them as sent.

    What does not fit the limits of provider and budget is given back to the plan.
    """
    tag = uuid.uuid4().hex
    row = await desk.keep(
        BatchRow(
            tag=tag,
            provider=desk.jobs.name,
            model=desk.model,
            state="new",
            requests=runs_of(requests),
            made_s=time.time(),
            learnt=dict(desk.dialect.learnt),
        )
    )
    failpoint("batch.recorded")
    desk.folder.mkdir(mode=0o700, exist_ok=True)
    made = Ordered(row)
    with Writing(desk.folder / f"{tag}.jsonl") as file:
        await _write(desk, lane, requests, made, file)
    if not made.lines:
        made.row = await desk.keep(replace(row, state="void", requests=()))
        desk.forget_files(tag)
    return made


async def _write(
    desk: Desk, lane: Lane, requests: Sequence[int], made: Ordered, file: Writing
) -> None:
    spending, tokens, taken = desk.pool.spending, 0, list[int]()
    enqueued, full = desk.enqueued, False
    for start in range(0, len(requests), CHUNK):
        chunk = requests[start : start + CHUNK]
        if full or lane.stops:
            lane.unsent(chunk)
            continue
        prompts = lane.made(chunk)
        sent: list[Prompt] = []
        for place, prompt in enumerate(prompts):
            most = most_tokens(prompt)
            made.broke = not spending.fits(most, batch=True) or (
                desk.most_tokens is not None
                and enqueued + tokens + most > desk.most_tokens
                and enqueued + tokens > 0
            )
            line = _line(desk, prompt)
            full = made.broke or file.bytes + len(line) > desk.jobs.limits.bytes
            if full:
                lane.unsent([left.index for left in prompts[place:]])
                break
            spending.reserve(most, batch=True)
            tokens += most
            file.add(line)
            sent.append(prompt)
        if sent:
            lane.sent(len(sent))
            await desk.store.sent(sent, desk.model)
            taken += [prompt.index for prompt in sent]
    made.lines = file.lines
    made.row = replace(made.row, requests=runs_of(taken), tokens=tokens)


def _line(desk: Desk, prompt: Prompt) -> bytes:
    id = request_id(desk.store.run_id, prompt.index, prompt.key(desk.model))
    return encoded(desk.jobs.line(id, desk.body(prompt), desk.api))


async def place(desk: Desk, row: BatchRow, lines: int) -> tuple[BatchRow, Job]:
    """Hand a batch over that is written. Raises WoolmillError; Failure where it was refused."""
    asked = _order(desk, row, lines)
    file = await patiently(desk, "upload a batch", lambda: desk.jobs.upload(asked))
    failpoint("batch.uploaded")
    row = await desk.keep(replace(row, state="creating", file=file))
    failpoint("batch.creating")
    job = await _created(desk, replace(asked, file=file))
    failpoint("batch.created")
    desk.seen[row.tag] = job
    row = await desk.keep(replace(row, state="open", job=job.id, seen=job.state))
    failpoint("batch.open")
    return row, job


async def _created(desk: Desk, asked: Order) -> Job:
    """The batch, created once: where an attempt may have succeeded, it is looked for first."""
    loop = asyncio.get_running_loop()
    began_s, wait_s = loop.time(), FIRST_WAIT_S
    unsure = 0
    while True:
        try:
            return await desk.jobs.create(asked)
        except Failure as failure:
            verdict = desk.masking.verdict(failure.verdict)
        if verdict.kind == "ambiguous":
            unsure += 1
            if (found := await find(desk, asked)) is not None:
                return found
            if unsure >= desk.max_attempts:
                raise StoppedError(
                    f"{desk.jobs.name}: creating a batch failed {unsure} times ({verdict.reason}:"
                    f" {verdict.message}); run the same command again later"
                )
        elif verdict.kind not in ("unavailable", "throttled"):
            raise error_of(desk, "create a batch", verdict)
        elif loop.time() - began_s >= desk.pool.settings.max_outage_s:
            raise StoppedError(
                f"{desk.jobs.name}: takes no batch now ({verdict.reason}: {verdict.message}); run"
                " the same command again later"
            )
        await desk.pool.rest(max(wait_s, min(verdict.retry_after_s or 0.0, MOST_WAIT_S)))
        wait_s = min(2 * wait_s, MOST_WAIT_S)


async def find(desk: Desk, asked: Order | BatchRow, *, for_s: float | None = None) -> Job | None:
    """A batch by its tag in the provider's list, which is asked until it would have it."""
    if isinstance(asked, BatchRow):
        asked = _order(desk, asked, len(asked))
    others = frozenset(row.job for row in desk.store.batches() if row.job)
    wanted = replace(asked, others=others)
    loop = asyncio.get_running_loop()
    until_s = loop.time() + (LISTING_S if for_s is None else for_s)
    wait_s = FIRST_WAIT_S
    while True:
        job = await patiently(desk, "list batches", lambda: desk.jobs.find(wanted))
        if job is not None or loop.time() >= until_s:
            return job
        await desk.pool.rest(min(wait_s, max(until_s - loop.time(), 0.01)))
        wait_s = min(2 * wait_s, 5.0)


def _order(desk: Desk, row: BatchRow, lines: int) -> Order:
    return Order(
        tag=row.tag,
        path=desk.folder / f"{row.tag}.jsonl",
        lines=lines,
        model=row.model,
        api=desk.api,
        made_s=row.made_s,
        file=row.file,
    )
