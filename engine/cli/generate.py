"""``woolmill generate``: run, write the dataset, say how it ended."""

from __future__ import annotations

import gc
import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from engine.cli.main import say_error
from engine.cli.options import FILE, Sectioned, run_options
from engine.errors import DONE_WITH_DEAD_LETTERS, InternalError, WoolmillError
from engine.records import EVERY
from engine.screen import drain
from engine.settings import load_config

if TYPE_CHECKING:
    from engine.run.generate import Result
    from engine.run.progress import Display, Progress

__all__ = ["generate"]


@click.command(cls=Sectioned)
@run_options
@click.option("--no-progress", is_flag=True, help="Plain lines instead of the live block.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text",
              help="json: progress, notes and logs as JSON Lines.")  # fmt: skip
@click.option("--metrics-file", type=FILE,
              help="Keep counts for Prometheus' textfile collector here.")  # fmt: skip
def generate(
    config_file: Path | None,
    no_progress: bool,
    log_format: str,
    metrics_file: Path | None,
    **flags: Any,
) -> None:
    """Generate records until the target is reached. The same command again goes on.

    \b
    woolmill generate --target 20
    woolmill generate --base-url https://api.example.com/v1 --model M --target 52000
    """
    import anyio

    from engine.export import dataset_of, export
    from engine.run.display import Guarded
    from engine.run.generate import generate as run
    from engine.run.textfile import MetricsFile
    from engine.store import RunStore

    # What is loaded by now stays; to look through it again and again costs a tenth of a request.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    config = load_config(config_file, flags)
    uvloop = {"use_uvloop": sys.platform != "win32"}
    with ExitStack() as stack:
        display = _display(log_format, no_progress, stack)
        if metrics_file is not None:
            metrics = MetricsFile(display, metrics_file, config.out)
            display = stack.enter_context(Guarded(metrics, display))
        result = anyio.run(run, config, display, backend_options=uvloop)
    dataset, samples, stages = config.out, 1, list[str]()
    failed: WoolmillError | None = None
    try:
        with RunStore.read(config.out) as store:
            store.named_recipe = config.recipe
            samples = store.manifest.fixed.get("samples") or 1
            stages = _stages(config.out)
            format, name = dataset_of(store.manifest)
            dataset = config.out / name
            if result.progress.accepted:
                export(store, format, dataset)
    except WoolmillError as error:
        failed = error
    except Exception as error:  # noqa: BLE001 - it must not hide what ended the run
        failed = InternalError.of(error)
    _say_end(result, dataset, failed, samples, stages)


def _stages(folder: Path) -> list[str]:
    """A line for each stage of a run of several."""
    from engine.report.stages import main_reasons
    from engine.stages import open_stages, stages_of_run

    stages = stages_of_run(folder)
    if len(stages) == 1:
        return []
    with open_stages(stages) as runs:
        counts = [run.counts() for run in runs]
    return [
        f"stage {stage.name}: {count.accepted:,} accepted, {main_reasons(count.reasons)}"
        for stage, count in zip(stages, counts, strict=True)
    ]


def _display(log_format: str, no_progress: bool, stack: ExitStack) -> Display:
    from engine.run.display import Guarded, JsonDisplay, JsonLog, LiveDisplay, PlainDisplay

    if log_format == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonLog())
        return stack.enter_context(Guarded(JsonDisplay()))
    if no_progress or not LiveDisplay.fits():
        return stack.enter_context(Guarded(PlainDisplay()))
    return stack.enter_context(Guarded(LiveDisplay(), PlainDisplay()))


def _say_end(
    result: Result,
    dataset: Path,
    failed: WoolmillError | None,
    samples: int,
    stages: Sequence[str],
) -> NoReturn:
    """Say how the run ended, and leave with the code of what ended it; ``failed`` says why there is
    no dataset, which comes second. ``samples``: requests for each input row, where there are any.
    ``stages``: a line for each.
    """
    progress, stop = result.progress, result.stop
    drain()  # the live block is gone before lines come where it stood
    rows = "rows of the stage before" if stages else "input rows"
    _say(f"{_came_to(result, samples, rows)} in {result.seconds:.0f} s")
    for line in stages:
        _say(line)
    if progress.accepted and failed is None:
        _say(f"dataset  {dataset}")
    _say(f"store    {result.folder / 'run.sqlite'}")
    if progress.failed:
        _say(f"{progress.failed} requests failed for good: woolmill report {result.folder}")
    if progress.paid and stop.reached and (unused := _unused(progress)):
        _say(f"{unused} answers were paid that this target did not need; a higher one uses them")
    dropped = progress.sent - progress.answered - progress.in_batches
    if dropped > 0 and (progress.paid or not stop.reached):
        _say(_lost(dropped, result))
    first = stop.error or (failed if stop.reached else None)
    for error in (stop.error, failed):
        if error is not None:
            say_error(error)
    if stop.reached and failed is None:
        sys.exit(DONE_WITH_DEAD_LETTERS if progress.failed else 0)
    click.echo(f"{'go on' if stop.reached else 'resume'} with: {_command()}", err=True)
    sys.exit(first.exit_code if first else 130 if stop.signum == 2 else 143)


def _came_to(result: Result, samples: int, asked_about: str) -> str:
    """How many rows were accepted, of how many wanted; or of how many input rows, each decided."""
    progress = result.progress
    if progress.target != EVERY:
        return f"accepted {progress.accepted} of {progress.target}"
    rows = progress.decided_answers // samples
    decided = f"decided {'all ' if result.stop.reached else ''}{rows} {asked_about}"
    return f"{decided}{'' if result.stop.reached else ' so far'}, accepted {progress.accepted}"


def _unused(progress: Progress) -> int:
    """Answers behind the one that reached the target."""
    if progress.target == EVERY:
        return 0
    return max(0, progress.answered - progress.decided_answers)


def _lost(dropped: int, result: Result) -> str:
    if not result.progress.paid:
        return f"{dropped} unfinished answers given up; they cost nothing"
    again = "" if result.stop.reached else "; the same command sends them again"
    return f"{dropped} requests dropped: sent and perhaps billed, their answers not kept{again}"


def _say(line: str) -> None:
    """A line on standard output, which may be gone: the run has its own end all the same."""
    with suppress(OSError, ValueError, WoolmillError):
        click.echo(line)


def _command() -> str:
    program = "woolmill" if Path(sys.argv[0]).name != "__main__.py" else "python -m engine"
    return f"{program} {shlex.join(sys.argv[1:])}"
