"""``woolmill view``."""

from __future__ import annotations

import ipaddress
import os
import secrets
from contextlib import ExitStack
from pathlib import Path

import anyio
import click

from engine.errors import ConfigError, UsageError
from engine.kept import recipe_of
from engine.loop.ledger import is_loop
from engine.recipes.base import Recipe
from engine.stages import Stage, place_in_chain
from engine.store import RunStore

__all__ = ["view"]

PORT = 7878
TOKEN = "WOOLMILL_VIEW_TOKEN"
MIN_TOKEN_CHARS = 32


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True,
              help="The first port tried.")  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--expose", is_flag=True, help="Allow a --host that other machines reach.")
@click.option("--seeds", type=click.Path(path_type=Path, dir_okay=False),
              help="Seed tasks, to show the run's prompts. [those that it kept]")  # fmt: skip
@click.option("--recipe", default="",
              help="The run's recipe, where it is code: FILE.py:CLASS.")  # fmt: skip
def view(folder: Path, port: int, host: str, expose: bool, seeds: Path | None, recipe: str) -> None:
    """Browse and search a run's rows in a browser, live and read-only.

    Of a loop's folder: its rounds as curves, which follow it.

    Prints a link with a token, and needs it: other programs and pages cannot look in. The token is
    a new one each time, or that of the variable WOOLMILL_VIEW_TOKEN, which is not printed. Metrics
    for Prometheus are at /metrics, with the same as the bearer token.

    \b
    woolmill view runs/alpaca
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError as exc:
        raise UsageError(f"--host {host}: give an IP address, for example 127.0.0.1") from exc
    if not address.is_loopback and not expose:
        raise UsageError(f"--host {host}: other machines reach it; add --expose if that is meant")
    if address.is_unspecified:
        raise UsageError(f"--host {host}: give the one address that browsers are to use")
    token = os.environ.get(TOKEN) or secrets.token_urlsafe(32)
    if len(token) < MIN_TOKEN_CHARS or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{TOKEN}: give at least {MIN_TOKEN_CHARS} printable ASCII characters")
    try:
        from engine.view.app import Access, make_app, make_rounds_app
        from engine.view.rows import Rows
        from engine.view.server import bind, make_server
    except ImportError as exc:
        raise ConfigError("the view needs more packages: pip install 'woolmill[view]'") from exc
    of_loop = is_loop(folder)
    found = [] if of_loop else _recipes(folder, recipe, seeds)
    if any(each is None for _, each in found):
        click.echo(
            "the run's recipe is not here: prompts are not shown (see --seeds and --recipe)",
            err=True,
        )
    listener, other_port = bind(host, port)
    bound = listener.getsockname()[1]
    if other_port:
        click.echo(f"port {port} is in use; taking {bound}", err=True)
    shown = f"[{host}]" if ":" in host else host
    names = {shown, *(("localhost",) if address.is_loopback else ())}
    access = Access(
        token=token,
        hosts=frozenset(f"{name}:{bound}" for name in names),
        cookie=f"woolmill-{bound}",
    )
    os.nice(10)  # a run on this machine comes first
    with ExitStack() as stack:
        stack.callback(listener.close)
        rows: list[Rows] = []
        for stage, known in found:
            before = rows[-1] if rows else None
            rows.append(Rows(stage.folder, known, name=stage.name, before=before))
            stack.callback(rows[-1].close)
        # A token that somebody chose may be in use elsewhere, and what is printed ends in logs.
        printed = f"${TOKEN}" if os.environ.get(TOKEN) else token
        click.echo(f"http://{shown}:{bound}/enter?token={printed}")
        app = make_rounds_app(folder, access) if of_loop else make_app(rows, access)
        server = make_server(app)
        anyio.run(lambda: server.serve(sockets=[listener]))


def _recipes(folder: Path, named: str, seeds: Path | None) -> list[tuple[Stage, Recipe | None]]:
    """A run's stages, each with its recipe where that can be had."""
    found = []
    stages, place = place_in_chain(folder)
    for stage in stages[: place + 1]:
        with RunStore.read(stage.folder) as run:
            run.named_recipe = named
            found.append((stage, recipe_of(run, seeds)))
    return found
