"""Start vLLM servers on this machine, watch them, and stop them: ``woolmill serve MODEL``.

The choice: a server is an ordinary one, reached over HTTP like any other, so that several replicas
are several endpoints and nothing in the engine knows the difference. One that dies is started again
on its port, up to three times; meanwhile its requests go elsewhere or wait. Servers die with this
process (``tether.py``), but not of Ctrl-C, so that a run can drain. The price, against the backend
that runs vLLM in a child process: HTTP on both sides.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import click
import httpx

from engine import models
from engine.backends.vllm import child_environment, engine_arguments, last_error
from engine.errors import ConfigError, OutputError, UnavailableError, WoolmillError

__all__ = ["Server", "serve", "serving"]

log = logging.getLogger(__name__)

_TETHER = Path(__file__).with_name("tether.py")
_MAX_RESTARTS = 3
_STOP_S = 10.0
_ASK_S = 0.25
"""Between two looks at whether a starting server is up."""


class Server:
    """One server process, kept running from ``start`` to ``stop``.

    Args:
        command: what to run; it must listen on ``port`` and answer ``/health`` when it is up.
        port: on 127.0.0.1.
        environment: its whole environment.
        log_file: what it prints is added here.
    """

    def __init__(
        self, command: Sequence[str], port: int, environment: Mapping[str, str], log_file: Path
    ) -> None:
        self.base_url = f"http://127.0.0.1:{port}/v1"
        self.log_file = log_file
        self.gone = threading.Event()
        """Set when the server has died for good."""
        self._health = f"http://127.0.0.1:{port}/health"
        self._command = [sys.executable, "-P", str(_TETHER), *command]
        self._environment = dict(environment)
        self._stopping = threading.Event()
        self._process = self._spawn()
        self._watcher = threading.Thread(target=self._watch, name="woolmill-serve", daemon=True)

    def wait_until_up(self) -> None:
        """Wait for the first answer of ``/health``, then watch.

        Raises:
            ConfigError: the server ended instead, because of the model or an argument.
            UnavailableError: because memory does not suffice.
        """
        with httpx.Client(trust_env=False, timeout=2) as client:
            while self._process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if client.get(self._health).is_success:
                        self._watcher.start()
                        return
                self._stopping.wait(_ASK_S)
        said = last_error(self.log_file) or f"it ended with status {self._process.returncode}"
        if "memory" in said.lower():
            raise UnavailableError(
                f"vLLM has not memory enough: {said}; lower gpu_memory_utilization or "
                f"max_model_len, or choose a smaller model; its log is {self.log_file}"
            )
        raise ConfigError(f"vLLM cannot start: {said}; its log is {self.log_file}")

    def stop(self) -> None:
        """End the server in order, or by force where that takes too long."""
        self._stopping.set()
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(_STOP_S)
        self._kill()
        if self._watcher.is_alive():
            self._watcher.join()

    def _watch(self) -> None:
        """Start the server again when it dies, in a thread."""
        for restart in range(_MAX_RESTARTS + 1):
            code = self._process.wait()
            if self._stopping.is_set():
                return
            self._kill()
            said = last_error(self.log_file)
            log.warning("the server at %s ended with status %d: %s", self.base_url, code, said)
            if restart < _MAX_RESTARTS:
                self._process = self._spawn()
                if self._stopping.is_set():  # stopped between the two
                    self._kill()
                    return
        self.gone.set()

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self.log_file.open("ab") as out:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env=self._environment,
                start_new_session=True,
            )

    def _kill(self) -> None:
        """Kill what is left of the process group, workers included."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


@contextlib.contextmanager
def serving(
    model: str,
    *,
    python: Path | None = None,
    port: int | None = None,
    replicas: int | None = None,
    args: Mapping[str, str] | None = None,
    log_dir: Path | None = None,
) -> Iterator[list[Server]]:
    """vLLM servers for ``model``, up and healthy, until the context ends.

    Args:
        model: a fetched name, a safetensors folder or a hub id; also the name served.
        python: interpreter of an environment that has vLLM; by default this one.
        port: of the first replica, the others follow; by default free ones are found.
        replicas: servers; by default as many as this machine's GPUs allow, one without.
        args: vLLM's own arguments by name, as ``engine.backends.vllm`` takes them.
        log_dir: where ``vllm-PORT.log`` goes; by default beside the fetched models.

    Raises ConfigError, UnavailableError or OutputError, as ``Server.wait_until_up`` does.
    """
    arguments = engine_arguments(args or {})
    per_server = int(arguments.get("tensor_parallel_size", 1))
    gpus = _gpus()
    count = replicas or max(1, len(gpus) // per_server)
    if gpus and count * per_server > len(gpus):
        raise ConfigError(
            f"{count} replicas of {per_server} GPUs need {count * per_server}; "
            f"there are {len(gpus)}"
        )
    folder = log_dir or models.home().parent / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}") from error
    where = models.locate(model)
    interpreter = python or Path(sys.executable)
    if not os.access(interpreter, os.X_OK):
        raise ConfigError(f"--vllm-python: {interpreter} is no program; name vLLM's python")
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        servers = []
        for index in range(count):
            at = port + index if port else _free_port()
            environment = child_environment()
            if gpus:
                mine = gpus[index * per_server : (index + 1) * per_server]
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
            command = [str(interpreter), "-m", "vllm.entrypoints.openai.api_server"]
            command += ["--model", where, "--served-model-name", model]
            command += ["--host", "127.0.0.1", "--port", str(at), *_flags(arguments)]
            server = Server(command, at, environment, folder / f"vllm-{at}.log")
            stack.callback(server.stop)
            servers.append(server)
            log.info("starting vLLM at %s; its log is %s", server.base_url, server.log_file)
        for server in servers:
            server.wait_until_up()
        log.info("%d servers are up after %.1f s", count, time.monotonic() - started)
        yield servers


def _flags(arguments: Mapping[str, object]) -> list[str]:
    """Engine arguments as the server's flags."""
    flags = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
    return flags


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _gpus() -> list[str]:
    """The GPUs that may be used, by the names that CUDA_VISIBLE_DEVICES takes."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for name in allowed.split(",") if name.strip()]
    return [str(number) for number in range(len(glob.glob("/dev/nvidia[0-9]*")))]


@click.command()
@click.argument("model")
@click.option("--port", type=int, help="Of the first replica. [a free one]")
@click.option("--replicas", type=click.IntRange(min=1), help="[as many as the GPUs allow]")
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
    vllm_python: Path | None,
    vllm_arg: tuple[str, ...],
    log_dir: Path | None,
) -> None:
    """Serve MODEL with vLLM on this machine until Ctrl-C.

    \b
    woolmill serve smollm2 --vllm-python .venv-vllm/bin/python
    woolmill serve Qwen/Qwen3-8B --vllm-arg tensor_parallel_size=2
    """
    args = {}
    for text in vllm_arg:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--vllm-arg")
        args[name] = value
    signal.signal(signal.SIGTERM, _terminated)
    with serving(
        model, python=vllm_python, port=port, replicas=replicas, args=args, log_dir=log_dir
    ) as servers:
        for server in servers:
            click.echo(server.base_url)
        click.echo(f"stop with Ctrl-C; logs are in {servers[0].log_file.parent}", err=True)
        _wait_for_all_gone(servers)


def _wait_for_all_gone(servers: Sequence[Server]) -> NoReturn:
    for server in servers:
        server.gone.wait()
    said = last_error(servers[0].log_file)
    error: WoolmillError = UnavailableError(
        f"vLLM died {_MAX_RESTARTS + 1} times: {said}; its log is {servers[0].log_file}"
    )
    raise error


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(143)
