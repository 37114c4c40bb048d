"""``woolmill serve``: vLLM servers for whoever asks, on this machine or on a Ray cluster."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import anyio
import click

from engine.backends.settings import ray_address
from engine.backends.vllm.ray_fleet import RayFleet
from engine.backends.vllm.servers import Server, serving
from engine.errors import UnavailableError
from engine.files import replace_file, write_private

__all__ = ["serve"]


@click.command()
@click.argument("model")
@click.option("--port", type=int, help="Of the first replica. [a free one]")
@click.option("--replicas", type=click.IntRange(min=1), help="[as many as the GPUs allow]")
@click.option("--ray", metavar="auto|HOST:PORT", help="On the nodes of this Ray cluster.")
@click.option(
    "--urls",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keep the servers' URLs in this file, for --endpoints.",
)
@click.option(
    "--vllm-python",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Interpreter of an environment with vllm. [this one]",
)
@click.option("--vllm-arg", multiple=True, metavar="KEY=VALUE", help="An argument of vLLM's own.")
@click.option(
    "--log-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where servers' logs go. [~/.cache/woolmill/logs]",
)
def serve(
    model: str,
    port: int | None,
    replicas: int | None,
    ray: str | None,
    urls: Path | None,
    vllm_python: Path | None,
    vllm_arg: tuple[str, ...],
    log_dir: Path | None,
) -> None:
    """Serve MODEL with vLLM until Ctrl-C: on this machine, or on a Ray cluster.

    \b
    woolmill serve smollm2 --vllm-python .venv-vllm/bin/python
    woolmill serve Qwen/Qwen3-8B --vllm-arg tensor_parallel_size=2
    woolmill serve Qwen/Qwen3-8B --ray auto --replicas 32 --urls fleet.txt
    """
    args = {}
    for text in vllm_arg:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--vllm-arg")
        args[name] = value
    signal.signal(signal.SIGTERM, _terminated)
    if ray is not None:
        if port is not None:
            raise click.UsageError("--port is for this machine; with --ray each finds a free one")
        if urls is None:
            raise click.UsageError("--ray needs --urls FILE, where runs find the servers")
        try:
            ray_address(ray)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--ray") from error
        fleet = RayFleet(
            ray,
            model,
            python=vllm_python,
            replicas=replicas,
            args=args,
            log_dir=log_dir,
            note=lambda text: click.echo(text, err=True),
        )
        anyio.run(_serve_on_ray, fleet, urls)
        return
    with serving(
        model, python=vllm_python, port=port, replicas=replicas, args=args, log_dir=log_dir
    ) as servers:
        for server in servers:
            click.echo(server.base_url)
        if urls is not None:
            _write(urls, [server.base_url for server in servers])
        click.echo(f"stop with Ctrl-C; logs are in {servers[0].log_file.parent}", err=True)
        _wait_for_all_gone(servers)


async def _serve_on_ray(fleet: RayFleet, urls: Path) -> None:
    """Keep the list as the fleet is until a signal ends it. Raises what ended the fleet, or
    SystemExit.
    """
    key_file = urls.with_name(f"{urls.name}.key")
    _write(urls, ())
    write_private(key_file, f"{fleet.key.reveal()}\n")
    click.echo(
        f"ask them with: woolmill generate --endpoints {urls} --key-file {key_file} "
        "--insecure-http; stop them with Ctrl-C",
        err=True,
    )
    heard: list[int] = []
    try:
        async with anyio.create_task_group() as tasks:

            async def hear() -> None:
                with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                    async for signum in signals:
                        heard.append(signum)
                        tasks.cancel_scope.cancel()

            tasks.start_soon(hear)
            tasks.start_soon(fleet.run)
            await _follow(fleet, urls)
            tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await fleet.aclose()
        _write(urls, ())
        key_file.unlink(missing_ok=True)
    if heard:
        raise SystemExit(128 + heard[0])
    assert fleet.ended is not None
    raise fleet.ended


async def _follow(fleet: RayFleet, urls: Path) -> None:
    """Write the list anew at each change, until no server will come any more."""
    shown: set[str] = set()
    changed = anyio.Event()

    def change() -> None:
        nonlocal changed
        changed.set()
        changed = anyio.Event()

    fleet.on_change = change
    while fleet.ended is None:
        await changed.wait()
        _write(urls, fleet.urls)
        for url in sorted(set(fleet.urls) - shown):
            click.echo(url)
        shown = set(fleet.urls)


def _write(path: Path, urls: Sequence[str]) -> None:
    text = "".join(f"{url}\n" for url in urls)
    replace_file(path, lambda file: file.write(text.encode()))


def _wait_for_all_gone(servers: Sequence[Server]) -> NoReturn:
    for server in servers:
        server.gone.wait()
    raise UnavailableError(servers[0].last_words())


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(143)
