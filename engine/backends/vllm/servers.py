"""Start vLLM servers on this machine, watch them, and stop them: for ``woolmill serve MODEL``, and
for the time of a run with ``woolmill generate --serve``.

The choice: a server is an ordinary one, reached over HTTP like any other, so that several replicas
are several endpoints and nothing in the engine knows the difference. One that dies is started again
on its port, up to three times; meanwhile its requests go elsewhere or wait. Servers die with this
process (``processes.tether``), but not of Ctrl-C, so that a run can drain. The price, against the
backend that runs vLLM in a child process: HTTP on both sides.
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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import httpx
from anyio import to_thread

from engine import models
from engine.backends.base import Failure, Verdict
from engine.backends.openai.backend import HttpBackend
from engine.backends.vllm.arguments import (
    child_environment,
    engine_arguments,
    last_error,
    refusal,
)
from engine.errors import ConfigError, OutputError, UnavailableError
from engine.files import open_log
from engine.processes.children import end_group, how_it_ended, python_command, start, tethered
from engine.records import Completion, Prompt

__all__ = [
    "ServedBackend",
    "Server",
    "flags_of",
    "free_ports",
    "plan",
    "server_of",
    "serving",
]

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
_MAX_RESTARTS = 3
_STOP_S = 10.0
_ASK_S = 0.25
"""Between two looks at whether a starting server is up."""


class Server:
    """One server process, kept running from ``start`` to ``stop``.

    Args:
        command: what to run; it must listen on ``port`` and answer ``/health`` when it is up.
        port: at ``host``.
        environment: its whole environment.
        log_file: what it prints is added here.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        environment: Mapping[str, str],
        log_file: Path,
        *,
        host: str = LOOPBACK,
    ) -> None:
        origin = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.base_url = f"{origin}/v1"
        self.log_file = log_file
        self.gone = threading.Event()
        """Set when the server has died for good."""
        self._health = f"{origin}/health"
        self._command = tethered(*command)
        self._environment = dict(environment)
        self._stopping = threading.Event()
        self._started: subprocess.Popen[bytes] | None = None
        self._watcher = threading.Thread(target=self._watch, name="woolmill-serve", daemon=True)

    def launch(self) -> None:
        """Start the process, unless it was started already. Raises OutputError."""
        if self._started is None:
            try:
                self.log_file.parent.mkdir(parents=True, exist_ok=True)
                self._started = self._spawn()
            except OSError as error:
                raise OutputError(f"cannot write {self.log_file}: {error.strerror}") from error
            log.info("starting vLLM at %s; its log is %s", self.base_url, self.log_file)

    @property
    def _process(self) -> subprocess.Popen[bytes]:
        assert self._started is not None, "not launched"
        return self._started

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
        self.gone.set()
        said = last_error(self.log_file) or f"it died {how_it_ended(self._process.returncode)}"
        raise refusal(said, f"its log is {self.log_file}")

    def last_words(self) -> str:
        """Why a server that is gone for good is gone."""
        said = last_error(self.log_file) or f"it died {how_it_ended(self._process.returncode)}"
        return f"vLLM died {_MAX_RESTARTS + 1} times: {said}; its log is {self.log_file}"

    def stop(self) -> None:
        """End the server in order, or by force where that takes too long."""
        self._stopping.set()
        if self._started is None:
            return
        end_group(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
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
                self._started = self._spawn()
                if self._stopping.is_set():  # stopped between the two
                    self._kill()
                    return
        self.gone.set()

    def _spawn(self) -> subprocess.Popen[bytes]:
        with open_log(self.log_file) as out:
            return start(
                self._command, self._environment, stdin=subprocess.PIPE, stdout=out, stderr=out
            )

    def _kill(self) -> None:
        """Kill what is left of the process group, workers included."""
        end_group(self._process.pid)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


class ServedBackend(HttpBackend):
    """The ``Backend`` of a server that starts with the run and ends with it.

    Args:
        server: its own.
        fleet: all servers of the run, which load at the same time.
        model: as it is served.
    """

    def __init__(self, server: Server, fleet: Sequence[Server], model: str) -> None:
        super().__init__(server.base_url, model)
        self._server = server
        self._fleet = fleet

    async def start(self) -> None:
        """Wait for the server. Raises ConfigError, UnavailableError or OutputError."""
        for server in self._fleet:
            await to_thread.run_sync(server.launch)
        # A cancelled start leaves the thread behind; it ends when the server is stopped.
        await to_thread.run_sync(self._server.wait_until_up, abandon_on_cancel=True)
        await super().start()

    async def complete(self, prompts: Sequence[Prompt]) -> list[Completion | BaseException]:
        """One attempt, as over HTTP anywhere; with no server left, the run stops at once."""
        try:
            return await super().complete(prompts)
        except Failure as failure:
            if not all(server.gone.is_set() for server in self._fleet):
                raise
            error = UnavailableError(self._server.last_words())
            what = Verdict(kind="fatal", reason="engine_died", message=str(error), error=error)
            raise Failure(what) from failure

    async def aclose(self) -> None:
        """Hang up, and stop the server."""
        await super().aclose()
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(self._server.stop)


def plan(
    model: str,
    *,
    python: Path | None = None,
    port: int | None = None,
    replicas: int | None = None,
    args: Mapping[str, str] | None = None,
    log_dir: Path | None = None,
) -> list[Server]:
    """The vLLM servers for ``model``, none of them started.

    Args:
        model: a fetched name, a safetensors folder or a hub id; also the name served.
        python: interpreter of an environment that has vLLM; by default this one.
        port: of the first replica, the others follow; by default free ones are found.
        replicas: servers; by default as many as this machine's GPUs allow, one without.
        args: vLLM's own arguments by name, as ``engine.backends.vllm.arguments`` takes them.
        log_dir: where ``vllm-PORT.log`` goes; by default beside the fetched models.

    Raises ConfigError for what can be seen to be wrong beforehand.
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
    servers = []
    for index, at in enumerate(range(port, port + count) if port else free_ports(count)):
        environment = child_environment()
        if gpus:
            mine = gpus[index * per_server : (index + 1) * per_server]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        servers.append(
            server_of(model, arguments, environment, port=at, python=python, log_dir=log_dir)
        )
    return servers


def server_of(
    model: str,
    arguments: Mapping[str, Any],
    environment: Mapping[str, str],
    *,
    port: int,
    host: str = LOOPBACK,
    python: Path | None = None,
    log_dir: Path | None = None,
) -> Server:
    """One vLLM server for ``model`` on this machine, not started. Raises ConfigError.

    Args:
        arguments: as ``engine_arguments`` gives them.
        host: the address to listen on.
        python, log_dir: as for ``plan``.
    """
    where = models.locate(model)
    interpreter = python or Path(sys.executable)
    if not os.access(interpreter, os.X_OK):
        raise ConfigError(f"--vllm-python: {interpreter} is no program; name vLLM's python")
    command = python_command("-m", "vllm.entrypoints.openai.api_server", interpreter=interpreter)
    command += ["--model", where, "--served-model-name", model]
    command += ["--host", host, "--port", str(port), *flags_of(arguments)]
    log_file = (log_dir or models.home().parent / "logs") / f"vllm-{port}.log"
    return Server(command, port, environment, log_file, host=host)


@contextlib.contextmanager
def serving(model: str, **options: Any) -> Iterator[list[Server]]:
    """The servers of ``plan``, up and healthy, until the context ends.

    Raises ConfigError, UnavailableError or OutputError, as ``Server.wait_until_up`` does.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        servers = plan(model, **options)
        for server in servers:
            stack.callback(server.stop)
            server.launch()
        for server in servers:
            server.wait_until_up()
        log.info("%d servers are up after %.1f s", len(servers), time.monotonic() - started)
        yield servers


def flags_of(arguments: Mapping[str, object]) -> list[str]:
    """Engine arguments as the server's flags."""
    flags = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
    return flags


def free_ports(count: int, host: str = LOOPBACK) -> list[int]:
    """Ports of ``host`` that nobody listens on now."""
    with ExitStack() as stack:  # all held at once, so that they differ
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        probes = [stack.enter_context(socket.socket(family)) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _gpus() -> list[str]:
    """The GPUs that may be used, by the names that CUDA_VISIBLE_DEVICES takes."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for name in allowed.split(",") if name.strip()]
    return [str(number) for number in range(len(glob.glob("/dev/nvidia[0-9]*")))]
