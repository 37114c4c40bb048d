"""``woolmill loop``: rounds on the command line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from engine.cli.generate import display_of
from engine.cli.options import Sectioned, section_options
from engine.loop.page import line_of
from engine.loop.rounds import Loop
from engine.loop.settings import LoopConfig, load_loop
from engine.settings import RunConfig

__all__ = ["loop"]

ENDING = (signal.SIGTERM, signal.SIGHUP)


@click.command(cls=Sectioned)
@section_options(LoopConfig)
def loop(config_file: Path | None, **flags: Any) -> None:
    """Generate, train, and go on from the model that was trained, round by round. The same command
    again goes on.

    A round's model is kept where the loss on seed tasks that are held out does not rise.

    \b
    woolmill loop --config loop.toml
    woolmill loop --rounds 3 --generate target=500 --train learning_rate=2e-5
    """
    given = {name: value for name, value in flags.items() if value is not None}
    config = load_loop(config_file, given)
    with _leaving_in_order(), Loop(config, _generate, _tell) as rounds:
        for done in rounds.rounds():
            click.echo(line_of(done, rounds.ledger))
        kept = rounds.ledger.kept
        click.echo(f"model    {rounds.model(kept.number if kept is not None else 0)}")
        click.echo(f"ledger   {rounds.ledger.path}")
        click.echo(f"look     woolmill report {config.out} -o rounds.html")


def _tell(line: str) -> None:
    click.echo(f"woolmill: {line}", err=True)


@contextmanager
def _leaving_in_order() -> Iterator[None]:
    """Signals that end do so by an exception, as Ctrl-C does."""
    before = {signum: signal.getsignal(signum) for signum in ENDING}
    _hear()
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _hear() -> None:
    for signum in ENDING:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signum, _end)


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    """What trains is asked to save where it is, on the way out."""
    raise SystemExit(128 + signum)


def _generate(config: RunConfig) -> None:
    """One run to its end, as ``woolmill generate`` shows it."""
    import anyio

    from engine.run.generate import generate

    uvloop = {"use_uvloop": sys.platform != "win32"}
    with ExitStack() as stack:
        shown = display_of(config, stack)
        stop = anyio.run(generate, config, shown, backend_options=uvloop).stop
    _hear()  # a run hears signals itself, and forgets who did before
    if stop.error is not None:
        raise stop.error
    if not stop.reached:
        raise SystemExit(130 if stop.signum == signal.SIGINT else 143)
