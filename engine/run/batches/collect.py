"""From a provider's files to answers in the store.

However a batch ended, what it has is fetched first: every whole line is an answer. Lines that are
missing, expired or cancelled were not paid, and their requests are sent again; lines that failed
are judged as if the host had refused them one by one.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.backends.base import Failure, Verdict
from engine.backends.batch.jobs import Job, Result
from engine.backends.batch.lines import (
    Survey,
    line_at,
    read_lines,
    request_of,
    result_of,
    survey,
)
from engine.backends.openai.error_body import as_json, read_error
from engine.backends.openai.reply import Reply
from engine.backends.openai.verdicts import classify
from engine.errors import WoolmillError
from engine.failpoints import failpoint
from engine.records import Answer, Completion, Prompt
from engine.run.batches.desk import FIRST_WAIT_S, Desk, Lane, patiently
from engine.run.deliver import Delivery, most_tokens
from engine.store import BatchRow

__all__ = ["collect"]

CHUNK = 128
"""Lines that are read, and their answers committed, at a time."""
MOST_COMMITTING = 4
"""Chunks that may wait for their commit."""
MOST_DOWNLOADS = 4
"""Times that a file is fetched which proves to be cut, or does not hold what was announced."""
MOST_NAMES = 16
"""Model names of answers that are kept apart; more come from a provider that makes them up."""


async def collect(desk: Desk, lane: Lane, row: BatchRow, job: Job) -> BatchRow:
    """Keep all that an ended batch has, and give back the rest of its requests.

    Raises WoolmillError where a line says that no request can succeed; what is there is kept first.
    """
    paths = await _fetched(desk, row, job)
    failpoint("batch.downloaded")
    reading = _Reading(desk, lane, row)
    await reading.answers(paths)
    await reading.failures(paths)
    failpoint("batch.kept")
    left = [index for index in row if index not in reading.seen and not lane.has_answer(index)]
    done = dict(reading.tally) | ({"unsent": len(left)} if left else {})
    row = await desk.keep(replace(row, state="collected", done=done, seen=job.state))
    failpoint("batch.collected")
    desk.pool.spending.settle(row.tokens - reading.settled, batch=True)
    lane.sent(-len(left))
    lane.unsent(left)
    desk.note(_said(desk, row, job))
    if reading.fatal is not None:
        raise reading.fatal
    return row


def _said(desk: Desk, row: BatchRow, job: Job) -> str:
    what = ", ".join(f"{count:,} {name}" for name, count in row.done.items() if count)
    return f"{desk.jobs.name}: batch {job.id} is over ({job.state}): {what or 'nothing'}"


async def _fetched(desk: Desk, row: BatchRow, job: Job) -> list[Path]:
    """The files of an ended batch, whole as far as the provider can give them whole."""
    for attempt in range(MOST_DOWNLOADS):
        if attempt:
            await desk.pool.rest(FIRST_WAIT_S * 2**attempt)
            job = await patiently(desk, "look at a batch", lambda: desk.jobs.status(row.job))
        paths, surveys = list[Path](), list[Survey]()
        for number, source in enumerate(job.outputs):
            path = desk.folder / f"{row.tag}.{number}.jsonl"
            await _download(desk, source, path)
            paths.append(path)
            surveys.append(await asyncio.to_thread(survey, path))
        announced = min((job.done or 0) + (job.failed or 0), len(row))
        lines = sum(found.lines for found in surveys)
        if lines >= announced and all(found.whole for found in surveys):
            return paths
    desk.note(
        f"{desk.jobs.name}: the files of batch {row.job} stay cut: {lines:,} lines of"
        f" {announced:,}; what is whole is kept, the rest is sent again and perhaps paid twice"
    )
    return paths


async def _download(desk: Desk, source: str, path: Path) -> None:
    desk.folder.mkdir(mode=0o700, exist_ok=True)
    await patiently(desk, "fetch answers", lambda: desk.jobs.download(source, path))


_Place = tuple[int, int, int]
"""A request, and the number of the file and the offset where a line about it begins."""


@dataclass(eq=False)
class _Reading:
    """The answers of one batch."""

    desk: Desk
    lane: Lane
    row: BatchRow
    seen: set[int] = field(default_factory=set)
    """Requests that came to an answer or to a failure for good."""
    tally: Counter[str] = field(default_factory=Counter)
    settled: int = 0
    """Of the tokens reserved."""
    fatal: WoolmillError | None = None
    names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._mine = frozenset(self.row)

    async def answers(self, paths: Sequence[Path]) -> None:
        """Keep every whole answer. Before any failure is looked at: after good answers, a refusal
        is about its own request.
        """
        await self._each(paths, self._answer)

    async def failures(self, paths: Sequence[Path]) -> None:
        """Judge the lines of requests that have no answer."""
        await self._each(paths, self._failure)

    async def _each(
        self, paths: Sequence[Path], read: Callable[[Prompt, Result], Answer | None]
    ) -> None:
        waiting: list[asyncio.Future[None]] = []
        places = await asyncio.to_thread(self._places, paths)
        for results in _chunks(self._results(paths, places)):
            prompts = {p.index: p for p in self.lane.made([index for index, _ in results])}
            kept = list[Answer]()
            for index, result in results:
                if index in prompts and index not in self.seen:  # else it stands there twice
                    answer = read(prompts[index], result)
                    kept += [answer] if answer is not None else []
            if kept:
                waiting.append(self.lane.keep(kept))
            if len(waiting) >= MOST_COMMITTING:
                await waiting.pop(0)
            await asyncio.sleep(0)
        for each in waiting:
            await each

    def _places(self, paths: Sequence[Path]) -> list[_Place]:
        """Where the lines about requests of this batch are, in the order of the plan: input rows
        are read in it, and decisions taken.
        """
        found = list[_Place]()
        for number, path in enumerate(paths):
            for offset, line in read_lines(path):
                result = result_of(line, self.desk.jobs)
                index = request_of(result.id, self.desk.store.run_id) if result else None
                if index is not None and index in self._mine:
                    found.append((index, number, offset))
        return sorted(found)

    def _results(
        self, paths: Sequence[Path], places: Sequence[_Place]
    ) -> Iterator[tuple[int, Result]]:
        """What is said of requests that are not answered yet."""
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("rb")) for path in paths]
            for index, number, offset in places:
                if index in self.seen or self.lane.has_answer(index):
                    continue
                result = result_of(line_at(files[number], offset), self.desk.jobs)
                if result is not None and result.ran:  # else its turn never came
                    yield index, result

    def _answer(self, prompt: Prompt, result: Result) -> Answer | None:
        outcome = self._outcome(prompt, result)
        if not isinstance(outcome, Completion):
            return None
        self.desk.pool.doubts.answered()
        self.tally["answered"] += 1
        return self._done(prompt, outcome)

    def _failure(self, prompt: Prompt, result: Result) -> Answer | None:
        outcome = self._outcome(prompt, result)
        if isinstance(outcome, Completion):
            return None  # of a second line, and the first was taken
        verdict = self.desk.masking.verdict(outcome)
        if self._is_final(prompt, result, verdict):
            self.tally["failed"] += 1
            return self._done(prompt, Failure(verdict))
        return None

    def _is_final(self, prompt: Prompt, result: Result, verdict: Verdict) -> bool:
        """Whether a request failed for good. If not, it is sent again."""
        desk = self.desk
        if verdict.kind == "dead":
            return True
        if verdict.kind == "overflow":
            return not self.lane.refit(prompt, verdict)
        if verdict.kind == "fatal":
            self.fatal = self.fatal or verdict.error
            return False
        if verdict.kind == "settings":
            if dict(desk.dialect.learnt) != self.row.learnt:
                return False  # refused for what has been learnt meanwhile
            text = read_error(as_json(result.body)).text
            lesson = desk.dialect.learn(verdict, text, desk.body(prompt), desk.api)
            if lesson is not None:
                desk.learnt(lesson)
                return False
            if desk.pool.doubts.believed(prompt.index, verdict.reason):
                self.fatal = self.fatal or verdict.error
                return False
        desk.tries[prompt.index] += 1
        return desk.tries[prompt.index] >= desk.max_attempts

    def _done(self, prompt: Prompt, outcome: Completion | Failure) -> Answer:
        desk = self.desk
        self.seen.add(prompt.index)
        most = most_tokens(prompt)
        if isinstance(outcome, Completion):
            outcome = desk.priced(outcome)
            desk.pool.spending.settle(most, outcome.usage, batch=True)
        else:
            desk.pool.spending.settle(most, batch=True)
        self.settled += most
        return Delivery(
            prompt=prompt,
            outcome=outcome,
            attempts=max(desk.tries[prompt.index], 1),
            backend=desk.jobs.name,
        ).answer()

    def _outcome(self, prompt: Prompt, result: Result) -> Completion | Verdict:
        """What one line comes to, as the same answer of a live host would."""
        where = self.desk.jobs.name
        if not 200 <= result.status < 300:
            return classify(status=result.status, body=as_json(result.body), where=where)
        try:
            reply = Reply.of_whole(result.body, 1)
        except Failure as failure:
            return failure.verdict
        if reply.error is not None:
            return classify(status=result.status, body=reply.error, where=where)
        reply.model = self._named(reply.model)
        outcome = self.desk.masking.outcome(reply.completions([prompt], 0.0)[0])
        if isinstance(outcome, Failure):
            return outcome.verdict
        assert isinstance(outcome, Completion)
        return replace(outcome, api=self.desk.api) if self.desk.api != prompt.api else outcome

    def _named(self, model: str) -> str:
        if model not in self.names:
            if len(self.names) >= MOST_NAMES:
                return "(another)"
            self.names.add(model)
        return model


def _chunks(results: Iterator[tuple[int, Result]]) -> Iterator[list[tuple[int, Result]]]:
    chunk: list[tuple[int, Result]] = []
    for each in results:
        chunk.append(each)
        if len(chunk) >= CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
