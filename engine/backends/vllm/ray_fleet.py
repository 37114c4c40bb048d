"""vLLM servers that Ray places on the nodes of a cluster, as a fleet of endpoints.

Ray finds room for a server, starts it again elsewhere when its node dies, and waits for nodes that
are still to come. It carries no request: those go straight from here to the servers.

A child process (``ray_driver``) joins the cluster, and says in messages what happens there. So
nothing in this process imports Ray; and Ray ends a process that has lost its cluster, which then is
not the run's. The servers end with that process, whose stdin is closed when this one ends. One that
dies is started again: to the run all servers have left meanwhile.
"""

from __future__ import annotations

import logging
import secrets
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import orjson

from engine import errors, models
from engine.backends.vllm.arguments import engine_arguments
from engine.errors import ConfigError, UnavailableError, WoolmillError
from engine.files import open_log
from engine.processes.children import (
    Child,
    environment,
    how_it_ended,
    python_command,
    start,
    start_async,
)
from engine.processes.frames import Frames, frame
from engine.secrets import Secret

__all__ = ["RayFleet", "look_at"]

log = logging.getLogger(__name__)

AGAIN_S = 5.0
"""After a cluster was lost: how often it is looked for again."""
STOP_S = 30.0
"""How long the servers may take to end in order."""
LOOK_S = 60.0
"""How long joining a cluster may take for a look at it."""


class RayFleet:
    """See ``engine.backends.fleet.Fleet``.

    Args:
        address: of the cluster, as ``ray_address`` allows it; this machine is one of its nodes.
        model: a hub id, a fetched name, or a folder that is at the same place on each node.
        python: interpreter of an environment that has vLLM, at the same place on each node.
        replicas: servers; by default as many as the cluster's GPUs allow.
        args: vLLM's own arguments by name, as ``engine_arguments`` takes them.
        log_dir: on each node, where the servers' logs go; by default beside the fetched models.
        log_file: here, what Ray says.
        note: tells the person.
    """

    starts_servers = True

    def __init__(
        self,
        address: str,
        model: str,
        *,
        python: Path | None = None,
        replicas: int | None = None,
        args: Mapping[str, str] | None = None,
        log_dir: Path | None = None,
        log_file: Path | None = None,
        note: Callable[[str], None] = log.warning,
    ) -> None:
        gpus = engine_arguments(args or {}).get(
            "tensor_parallel_size", 1
        )  # raises for what is refused
        self.name = f"Ray ({address})"
        self.key = Secret(secrets.token_urlsafe(24))
        self.ended: WoolmillError | None = None
        self.on_change: Callable[[], None] = lambda: None
        self._up: dict[int, str] = {}
        self._dead: dict[int, WoolmillError] = {}
        self._wanted: int | None = None
        """Servers; None until the cluster has been seen."""
        self._process: Child | None = None
        self._log_file = log_file or models.home().parent / "logs" / "ray.log"
        self._note = note
        self._order = {
            "address": address,
            "replicas": replicas,
            "gpus": int(gpus),
            "server": {
                "model": model,
                "python": str(python) if python else None,
                "args": dict(args or {}),
                "log_dir": str(log_dir) if log_dir else None,
                "key": self.key.reveal(),
            },
        }

    @property
    def urls(self) -> Sequence[str]:
        return list(self._up.values())

    async def run(self) -> None:
        """See ``Fleet``. The first cluster must be there; one that is lost later may come back."""
        while self.ended is None:
            said = await self._one_cluster()
            if self.ended is None and self._wanted is None:
                self.ended = UnavailableError(said)
            self._up.clear()
            self._dead.clear()
            self.on_change()
            if self.ended is None:
                log.warning("%s; looking for it again every %g s", said, AGAIN_S)
                await anyio.sleep(AGAIN_S)

    async def aclose(self) -> None:
        """Let the servers end, and leave the cluster."""
        process, self._process = self._process, None
        if process is not None:
            await process.close(STOP_S)

    async def _one_cluster(self) -> str:
        """From joining a cluster until it is lost; how that came."""
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        with open_log(self._log_file) as said:
            process = self._process = await start_async(
                _COMMAND, _environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
            )
        process.send(orjson.dumps(self._order))
        async for message in process.messages():
            self._heed(orjson.loads(message.head))
        status = await process.wait()
        how = f"its driver ended {how_it_ended(status)}"
        return f"{self.name} is lost: {how}; its log is {self._log_file}"

    def _heed(self, event: Mapping[str, Any]) -> None:
        """One thing that happened; ``ray_driver`` says which there are."""
        match event["event"]:
            case "joined":
                self._wanted = int(event["replicas"])
                for note in event["notes"]:
                    self._note(note)
            case "up":
                self._up[event["replica"]] = event["url"]
                self._dead.pop(event["replica"], None)
            case "down":
                self._up.pop(event["replica"], None)
            case "dead":
                self._up.pop(event["replica"], None)
                self._dead[event["replica"]] = error = _error_of(event)
                if len(self._dead) == self._wanted:
                    self.ended = error
                else:
                    self._note(f"{error}; the other servers go on")
            case "failed":
                # A cluster that is lost may be back before long; settings will not change.
                if self._wanted is None or event["error"] != "UnavailableError":
                    self.ended = _error_of(event)
        self.on_change()


def look_at(address: str) -> dict[str, Any]:
    """What is seen of a cluster: its ``nodes``, and its ``CPU`` and ``GPU``. Raises ConfigError or
    UnavailableError.
    """
    process = start(
        _COMMAND,
        _environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            order = orjson.dumps({"address": address, "look": True})
            said, _ = process.communicate(b"".join(frame(order)), LOOK_S)
        except subprocess.TimeoutExpired:
            process.kill()
            said = b""
    for message in Frames().take_in(said):
        event = orjson.loads(message.head)
        if event["event"] == "failed":
            raise _error_of(event)
        if event["event"] == "seen":
            seen: dict[str, Any] = event["cluster"]
            return seen
    raise UnavailableError(f"the Ray cluster at {address} does not answer; see ray status")


_COMMAND = python_command("-m", "engine.backends.vllm.ray_driver")


def _environment() -> dict[str, str]:
    """Of the driver: Ray's own settings and token, and nothing that it would hand on to servers."""
    return environment("engine", "ray")


def _error_of(event: Mapping[str, Any]) -> WoolmillError:
    known = {kind.__name__: kind for kind in (ConfigError, UnavailableError, errors.OutputError)}
    return known.get(event["error"], UnavailableError)(event["message"])
