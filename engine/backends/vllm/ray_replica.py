"""One vLLM server on a node of a Ray cluster, as long as the worker that holds it lives.

This runs in Ray's worker, on whichever node Ray chose. What goes in and out is plain data. The
server is a tethered child (``servers.Server``): it ends with the worker, however that ends, and is
started again here when it dies by itself, up to three times.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.backends.vllm.arguments import child_environment, engine_arguments
from engine.backends.vllm.servers import Server, free_ports, server_of
from engine.errors import WoolmillError

__all__ = ["Replica"]

KEY_VARIABLE = "VLLM_API_KEY"
"""Where vLLM's server reads the key that it asks for; an argument would be seen by all."""
LOOK_EVERY_S = 1.0


class Replica:
    """The actor.

    Args:
        order: ``model``, ``python``, ``args``, ``log_dir`` and ``key``, as ``RayFleet`` has them.
    """

    def __init__(self, order: Mapping[str, Any]) -> None:
        self._order = order
        self._server: Server | None = None
        self._starting = asyncio.Lock()
        self._gone = asyncio.Event()
        _end_with_the_node()

    async def up(self) -> dict[str, str]:
        """The server's ``url`` as soon as it answers; or the ``error`` and its ``message``."""
        async with self._starting:
            if self._server is None:
                try:
                    self._server = await asyncio.to_thread(self._start)
                except WoolmillError as error:
                    return {"error": type(error).__name__, "message": f"{_node()}: {error}"}
                self._watch(self._server)
        return {"url": self._server.base_url}

    async def gone(self) -> dict[str, str]:
        """Returns when the server has died for good, with its last words."""
        await self._gone.wait()
        assert self._server is not None
        return {"error": "UnavailableError", "message": f"{_node()}: {self._server.last_words()}"}

    async def stop(self) -> None:
        """End the server in order."""
        if self._server is not None:
            await asyncio.to_thread(self._server.stop)

    def _start(self) -> Server:
        order, host = self._order, _node()
        server = server_of(
            order["model"],
            engine_arguments(order["args"]),
            child_environment() | {KEY_VARIABLE: order["key"]},
            port=free_ports(1, host)[0],
            host=host,
            python=Path(order["python"]) if order["python"] else None,
            log_dir=Path(order["log_dir"]) if order["log_dir"] else None,
        )
        try:
            server.launch()
            server.wait_until_up()
        except BaseException:  # raised again: a start that fails or is cancelled leaves no server
            server.stop()
            raise
        return server

    def _watch(self, server: Server) -> None:
        """Let ``gone`` return when the server is; a thread of its own waits for that."""
        loop = asyncio.get_running_loop()

        def wait() -> None:
            server.gone.wait()
            loop.call_soon_threadsafe(self._gone.set)

        threading.Thread(target=wait, name="woolmill-gone", daemon=True).start()


def _end_with_the_node() -> None:
    """End this worker when the raylet that started it has ended, as when the head is gone for long.

    Ray's own way waits for the calls that are under way, and ``gone`` always is: the server would
    keep its GPU on a node that belongs to no cluster any more.
    """
    raylet = os.getppid()

    def watch() -> None:
        while os.getppid() == raylet:
            time.sleep(LOOK_EVERY_S)  # nobody tells a process that its parent has ended
        os._exit(1)  # the tether sees it

    threading.Thread(target=watch, name="woolmill-raylet", daemon=True).start()


def _node() -> str:
    """The address of this node, by which the others reach it."""
    import ray

    address: str = ray.util.get_node_ip_address()
    return address
