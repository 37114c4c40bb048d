"""The end of ``woolmill generate``: write the dataset, and say what became of the run.

A person gets lines on standard output (what there is, what it cost, where to look) and, where
something went wrong, one line for each error on standard error. With ``--log-format json`` all of
it is one event, the last line on standard error.
"""

from __future__ import annotations

import shlex
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.cli.main import say_error, status_of
from engine.datasets import BAD_ROWS
from engine.datasets.bad_rows import BadRowError
from engine.errors import (
    DONE_WITH_DEAD_LETTERS,
    InternalError,
    SpentError,
    StoppedError,
    UnavailableError,
    WoolmillError,
)
from engine.recipes.base import RECIPE_ERROR
from engine.records import EVERY, SAMPLE
from engine.screen import drain
from engine.stages import BELOW
from engine.text import as_word, counted, in_money

if TYPE_CHECKING:
    from engine.run.generate import Result
    from engine.settings import RunConfig
    from engine.store import Counts, RunReader

__all__ = ["Ended", "finish", "say", "say_failure"]

END = (
    "status", "reason", "accepted", "target", "refused", "failed", "unsent", "bad_rows", "dropped",
    "undecided", "unused", "prompt_tokens", "completion_tokens", "cost", "tokens_without_answer",
    "cost_without_answer", "seconds", "dataset", "without_dataset", "resume", "traceback",
)  # fmt: skip
"""The fields of the event that ends the JSON logs, in every ending."""
REASONS = 6
"""Reasons of refusal that are named; the others are counted."""


INTERRUPTED = 130
"""What a shell reports of a program ended by Ctrl-C: 128 and the number of SIGINT, 2."""
TERMINATED = 143
"""The same of SIGTERM, 15."""
MAY_PASS = (UnavailableError.exit_code, StoppedError.exit_code, INTERRUPTED, TERMINATED)
"""Statuses of a start that failed, after which the same command may do better."""


@dataclass(slots=True, kw_only=True)
class Ended:
    """What a run came to, over all of its sessions."""

    result: Result
    dataset: Path | None = None
    failed: WoolmillError | None = None
    """Why there is no dataset, which comes second to what ended the run."""
    samples: int = 1
    """Requests for each input row, where there are any."""
    stages: Sequence[tuple[str, Counts]] = ()
    """The counts of each stage, by its name; the last one's rows are the dataset. Empty where the
    store cannot be read.
    """
    cost: float | None = None
    """Of all stages; None where nobody says what anything costs."""
    cost_without_answer: float | None = None
    """The most that attempts without an answer may have cost besides."""

    @property
    def status(self) -> int:
        """The exit status: that of what ended the run first."""
        stop = self.result.stop
        if stop.reached and self.failed is None:
            return DONE_WITH_DEAD_LETTERS if self.failed_requests else 0
        first = stop.error or (self.failed if stop.reached else None)
        return first.exit_code if first else 130 if stop.signum == 2 else 143

    @property
    def reason(self) -> str:
        """Why it ended, in words."""
        stop = self.result.stop
        if stop.error or self.failed:
            return str(stop.error or self.failed)
        if not stop.reached:
            return stopped_by(stop.signum)
        failed = self.failed_requests
        return f"done; {counted(failed, 'request')} failed permanently" if failed else "done"

    @property
    def failed_requests(self) -> int:
        """Requests of all stages that failed permanently: rows that are lost on the way."""
        progress = self.result.progress
        return progress.failed + sum(before.failed for before in progress.before.values())

    @property
    def unsent(self) -> int:
        """Of those: requests that were never sent, since the recipe could make no prompt."""
        return sum(map(_unsent, (counts for _, counts in self.stages)))

    @property
    def unsent_in(self) -> list[Path]:
        """The folders of the stages that have such requests."""
        folder, last = self.result.folder, len(self.stages) - 1
        return [
            folder if place == last else folder / BELOW / name
            for place, (name, counts) in enumerate(self.stages)
            if _unsent(counts)
        ]

    @property
    def refused(self) -> dict[str, int]:
        """Refused pieces by reason, the most frequent first. A sample that a row was made of is
        none.
        """
        counts = Counter(self.stages[-1][1].reasons if self.stages else {})
        del counts[SAMPLE]
        return dict(counts.most_common())

    @property
    def tokens(self) -> tuple[int, int]:
        """Prompt and completion tokens of all stages."""
        counts = [count for _, count in self.stages]
        return sum(c.prompt_tokens for c in counts), sum(c.completion_tokens for c in counts)

    @property
    def tokens_without_answer(self) -> int:
        """The most that attempts without an answer may have used besides, of all stages."""
        return sum(count.lost_tokens for _, count in self.stages)

    @property
    def dropped(self) -> int:
        """Requests of all stages that were on the wire when this session stopped, and whose answers
        were not waited for.
        """
        progress = self.result.progress
        if self.result.stop.reached and not progress.paid:
            return 0
        return progress.dropped + sum(before.dropped for before in progress.before.values())

    @property
    def undecided(self) -> int:
        """Answers behind a request that has none yet, or behind the target."""
        progress = self.result.progress
        return max(0, progress.answered - progress.decided_answers)

    @property
    def unused(self) -> int:
        """Answers behind the one that reached the target; a higher one uses them."""
        progress = self.result.progress
        if not self.result.stop.reached or not progress.paid or progress.target == EVERY:
            return 0
        return self.undecided

    @property
    def resume(self) -> str | None:
        """The command that goes on; None where nothing is left to do, or where it could only stop
        again.
        """
        stop = self.result.stop
        if isinstance(stop.error, SpentError) or (stop.reached and self.failed is None):
            return None
        return None if self.bad_row is not None else _command()

    @property
    def bad_row(self) -> BadRowError | None:
        """The input row that ended the run, which would end it again."""
        cause = self.result.stop.error and self.result.stop.error.__cause__
        return cause if isinstance(cause, BadRowError) else None


def finish(result: Result, config: RunConfig) -> Ended:
    """Write the dataset of a run that has ended, and gather what is to be said of it."""
    from engine.export import dataset_of, export
    from engine.store import RunStore

    ended = Ended(result=result)
    try:
        with RunStore.read(config.out) as store:
            store.named_recipe = config.recipe
            ended.samples = store.manifest.fixed.get("samples") or 1
            _count(ended, store)
            format, name = dataset_of(store.manifest)
            if result.progress.accepted:
                export(store, format, config.out / name)
                ended.dataset = config.out / name
    except WoolmillError as error:
        ended.failed = error
    except Exception as error:  # noqa: BLE001 - it must not hide what ended the run
        ended.failed = InternalError.of(error)
    return ended


def _count(ended: Ended, last: RunReader) -> None:
    from engine.money import Prices
    from engine.stages import open_stages, stages_of_run

    stages = stages_of_run(last.folder)
    with open_stages(stages[:-1]) as before:
        runs = [*before, last]
        ended.stages = [(stage.name, run.counts()) for stage, run in zip(stages, runs, strict=True)]
        prices = [Prices.of(run.manifest.free) for run in runs]
    counts = [each for _, each in ended.stages]
    costs = [price.cost_if_known(each) for price, each in zip(prices, counts, strict=True)]
    known = [cost for cost in costs if cost is not None]
    # Where one stage's cost is not known, neither is the sum.
    ended.cost = sum(known) if len(known) == len(costs) else None
    lost = [price.cost_of_lost(each) for price, each in zip(prices, counts, strict=True)]
    ended.cost_without_answer = sum(lost) if all(price.known for price in prices) else None


def say(ended: Ended, *, as_json: bool) -> None:
    """Say how the run ended."""
    drain()  # the live block is gone before lines come where it stood
    if as_json:
        _say_event(_event_of(ended))
        return
    for line in _lines(ended):
        # Standard output may be gone: the run has its own end all the same.
        with suppress(OSError, ValueError, WoolmillError):
            click.echo(line)
    for error in (ended.result.stop.error, ended.failed):
        if error is not None:
            say_error(error)
    if ended.resume is not None:
        verb = "go on" if ended.result.stop.reached else "resume"
        click.echo(f"{verb} with: {ended.resume}", err=True)
    if (bad := ended.bad_row) is not None:
        click.echo(f"mend {bad.path}:{bad.line}, then resume with: {_command()}", err=True)
        click.echo(f"or leave such rows out with: {_command()} --on-bad-row skip", err=True)


def stopped_by(signum: int | None) -> str:
    """Why, of what a run or its start was ended by; None: whoever started it."""
    if signum is None:
        return "stopped"
    return "stopped by Ctrl-C" if signum == 2 else f"stopped by {signal.Signals(signum).name}"


def say_failure(error: BaseException) -> int:
    """Say in one event why no run began, and return its status."""
    status, known = status_of(error)
    fields: dict[str, Any] = {"status": status, "reason": str(known or error)}
    if known is None and status in (INTERRUPTED, TERMINATED):
        fields["reason"] = stopped_by(status - 128)
    elif known is None:
        fields["traceback"] = "".join(traceback.format_exception(error))
    _say_event({**fields, "resume": _command() if status in MAY_PASS else None})
    return status


def _lines(ended: Ended) -> Iterator[str]:
    result, progress = ended.result, ended.result.progress
    folder = shlex.quote(str(result.folder))
    yield f"{_came_to(ended)} in {_time(result.seconds)}"
    if len(ended.stages) > 1:
        from engine.report.stages import main_reasons

        for name, counts in ended.stages:
            yield f"stage {name}: {counts.accepted:,} accepted, {main_reasons(counts.reasons)}"
    elif ended.stages:
        yield f"refused  {_refusals(ended.refused)}"
    if any(ended.tokens) or ended.tokens_without_answer:
        yield f"tokens   {ended.tokens[0]:,} in, {ended.tokens[1]:,} out{_cost(ended)}"
    if bad := result.bad_rows:
        where = result.folder / BAD_ROWS
        yield f"left out {counted(bad, 'input row')} that cannot be read, named in {where}"
    if unsent := ended.unsent:
        why = " or ".join(
            f"woolmill export {as_word(where)} --refused -o refused.jsonl"
            for where in ended.unsent_in
        )
        yield f"unsent   {counted(unsent, 'request')}, with no prompt to send; why: {why}"
    if failed := ended.failed_requests - unsent:
        yield f"failed   {counted(failed, 'request')}, permanently; the report says why"
    if progress.failed:
        mended = "once mended: " if ended.unsent == ended.failed_requests else ""
        if progress.failed < ended.failed_requests:
            mended = f"{mended}those of stage {ended.stages[-1][0]}: "
        yield f"again    {mended}woolmill redecide {folder} --drop-failed   and the same command"
    if ended.undecided and not result.stop.reached:
        waiting = counted(ended.undecided, "answer")
        yield f"waiting  {waiting}, kept and to be decided once the requests before have theirs"
    if ended.unused:
        unused = counted(ended.unused, "answer")
        yield f"unused   {unused}, paid and not needed; a higher target goes on with them"
    if ended.dropped:
        yield f"dropped  {_lost(ended)}"
    if ended.dataset is not None:
        yield f"dataset  {ended.dataset}"
    yield f"store    {result.folder / 'run.sqlite'}"
    if progress.accepted or ended.refused:
        yield f"look     woolmill view {folder}   or   woolmill report {folder} --format md"


def _unsent(counts: Counts) -> int:
    sent = sum(n for reason, n in counts.reasons.items() if reason.startswith("failed:"))
    # The same reason stands where a recipe's parser fails, which is no failed request.
    return min(counts.reasons.get(RECIPE_ERROR, 0), max(0, counts.failed - sent))


def _refusals(refused: dict[str, int]) -> str:
    """How many, and the main reasons."""
    if not refused:
        return "none"
    named = [f"{reason} {count:,}" for reason, count in list(refused.items())[:REASONS]]
    if more := sum(list(refused.values())[REASONS:]):
        named.append(f"others {more:,}")
    return f"{sum(refused.values()):,} ({', '.join(named)})"


def _event_of(ended: Ended) -> dict[str, Any]:
    progress, stop = ended.result.progress, ended.result.stop
    prompt, completion = ended.tokens
    bug = stop.error if isinstance(stop.error, InternalError) else ended.failed
    cause = bug.__cause__ if bug is not None else None
    return {
        "status": ended.status,
        "reason": ended.reason,
        "accepted": progress.accepted,
        "target": None if progress.target == EVERY else progress.target,
        "refused": ended.refused,
        "failed": ended.failed_requests,
        "unsent": ended.unsent,
        "bad_rows": ended.result.bad_rows,
        "dropped": ended.dropped,
        "undecided": ended.undecided,
        "unused": ended.unused,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "cost": _rounded(ended.cost),
        "tokens_without_answer": ended.tokens_without_answer,
        "cost_without_answer": _rounded(ended.cost_without_answer),
        "seconds": round(ended.result.seconds, 1),
        "dataset": None if ended.dataset is None else str(ended.dataset),
        "without_dataset": None if ended.failed is None else str(ended.failed),
        "resume": ended.resume,
        "traceback": None if cause is None else "".join(traceback.format_exception(cause)),
    }


def _say_event(fields: dict[str, Any]) -> None:
    """Write the event ``end``: with all of its fields, null where a run did not begin."""
    from engine.run.display import event

    drain()
    click.echo(event("end", **{**dict.fromkeys(END), **fields}), err=True)


def _came_to(ended: Ended) -> str:
    """How many rows were accepted, of how many wanted; or of how many input rows, each decided."""
    progress = ended.result.progress
    if progress.target != EVERY:
        return f"accepted {progress.accepted} of {progress.target}"
    rows = progress.decided_answers // ended.samples
    about = "rows of the stage before" if len(ended.stages) > 1 else "input rows"
    reached = ended.result.stop.reached
    decided = f"decided {'all ' if reached else ''}{rows} {about}"
    return f"{decided}{'' if reached else ' so far'}, accepted {progress.accepted}"


def _lost(ended: Ended) -> str:
    if not ended.result.progress.paid:
        return f"{counted(ended.dropped, 'unfinished answer')}, which cost nothing"
    again = "" if ended.result.stop.reached else "; the same command sends them again"
    requests = counted(ended.dropped, "request")
    return f"{requests}, perhaps billed, whose answers were not waited for{again}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _cost(ended: Ended) -> str:
    """What the tokens cost, and what attempts without an answer may have taken besides."""
    lost, cost, besides = ended.tokens_without_answer, "", f"{ended.tokens_without_answer:,} tokens"
    if ended.cost is not None:
        cost = f"; cost {in_money(ended.cost)}"
    if ended.cost_without_answer:
        besides = in_money(ended.cost_without_answer)
    return f"{cost}, and up to {besides} for attempts of which no answer is kept" if lost else cost


def _rounded(cost: float | None) -> float | None:
    return None if cost is None else round(cost, 6)


def _command() -> str:
    program = "woolmill" if Path(sys.argv[0]).name != "__main__.py" else "python -m engine"
    return f"{program} {shlex.join(sys.argv[1:])}"
