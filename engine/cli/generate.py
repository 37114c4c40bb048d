"""``woolmill generate``: run, write the dataset, say how it ended."""

from __future__ import annotations

import gc
import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.cli.ending import finish, say, say_failure
from engine.cli.options import Sectioned, run_options
from engine.settings import load_config, read_toml

if TYPE_CHECKING:
    from engine.cli.ending import Ended
    from engine.run.progress import Display
    from engine.settings import RunConfig

__all__ = ["display_of", "generate"]


@click.command(cls=Sectioned)
@run_options
def generate(config_file: Path | None, **flags: Any) -> None:
    """Generate records until the target is reached. The same command again goes on.

    \b
    woolmill generate --target 20
    woolmill generate --recipe respond --rows questions.jsonl --out runs/answered
    woolmill generate --base-url https://api.example.com/v1 --model M --target 52000
    """
    # What is loaded by now stays; to look through it again and again costs a tenth of a request.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    as_json = flags["log_format"] == "json"
    try:
        if flags["log_format"] is None and config_file is not None:  # before its mistakes are told
            as_json = read_toml(config_file).get("log_format") == "json"
        if as_json:
            _log_as_json()
        config = load_config(config_file, flags)
        ended = _run(config)
    except (Exception, BaseExceptionGroup, KeyboardInterrupt) as error:
        if not as_json:
            raise
        sys.exit(say_failure(error))
    say(ended, as_json=as_json)
    sys.exit(ended.status)


def _run(config: RunConfig) -> Ended:
    import anyio

    from engine.run.generate import generate as run
    from engine.run.signals import until_listening

    uvloop = {"use_uvloop": sys.platform != "win32"}
    with ExitStack() as stack:
        display = display_of(config, stack)
        stack.enter_context(until_listening())
        result = anyio.run(run, config, display, backend_options=uvloop)
    return finish(result, config)


def _log_as_json() -> None:
    """Log records and Python's own warnings are events from now on."""
    from engine.run.display import JsonLog

    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonLog())
    logging.captureWarnings(True)


def display_of(config: RunConfig, stack: ExitStack) -> Display:
    """What shows a run in this terminal, or file, until ``stack`` ends."""
    from engine.run.display import Guarded, JsonDisplay, PlainDisplay
    from engine.run.live import LiveDisplay
    from engine.run.textfile import MetricsFile

    if config.log_format == "json":
        display = Guarded(JsonDisplay())
    elif config.progress and LiveDisplay.fits():
        display = Guarded(LiveDisplay(), PlainDisplay())
    else:
        display = Guarded(PlainDisplay())
    shown: Display = stack.enter_context(display)
    if config.metrics_file is not None:
        metrics = MetricsFile(shown, config.metrics_file, config.out)
        shown = stack.enter_context(Guarded(metrics, shown))
    return shown
