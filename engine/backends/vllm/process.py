"""The child process that vLLM's engine runs in, seen from here: its start, its debts, its end."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from engine.backends.openai.error_body import clean
from engine.backends.vllm.arguments import child_environment, last_error, refusal
from engine.errors import ConfigError
from engine.files import open_log
from engine.processes.children import Child, end_group, how_it_ended, python_command, start_async

__all__ = ["EngineDiedError", "EngineProcess"]

_PROGRAM = Path(__file__).with_name("child.py")
"""The program of the child process. It is started by its path, since the other environment may not
have this package."""
_CLOSE_S = 10.0
"""How long the child may take to shut down in order."""


class EngineDiedError(Exception):
    """The child has ended; ``str`` says how."""


class EngineProcess:
    """One child process and what it still owes. Its methods run in the event loop."""

    def __init__(self, log_file: Path, keep: bool) -> None:
        loop = asyncio.get_running_loop()
        self.log_file = log_file
        self._keep_log = keep
        self.tokens_in_the_making = 0
        """As the child last said."""
        self._ids = itertools.count(1)
        self._owed: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._ready: asyncio.Future[dict[str, Any]] = loop.create_future()
        self._exited: asyncio.Future[str] = loop.create_future()
        self._process: Child | None = None
        self._attending: list[asyncio.Task[None]] = []

    @classmethod
    async def spawn(cls, python: Path, log_file: Path | None) -> EngineProcess:
        """Start the process. Raises ConfigError where ``python`` cannot be run."""
        path = log_file
        if path is None:
            handle, name = tempfile.mkstemp(prefix="woolmill-vllm-", suffix=".log")
            os.close(handle)
            path = Path(name)
        child = cls(path, keep=log_file is not None)
        command = python_command(str(_PROGRAM), interpreter=python)
        with open_log(path) as err:
            try:
                child._attend(
                    await start_async(
                        command,
                        child_environment(),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=err,
                    )
                )
            except OSError as error:
                if log_file is None:
                    path.unlink()
                why = error.strerror or type(error).__name__
                raise ConfigError(f"--vllm-python: cannot run {python}: {why}") from error
        return child

    async def start(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Load the model; what the child found out about it.

        Raises ConfigError, or UnavailableError where memory does not suffice.
        """
        self._send({"start": arguments})
        try:
            ready = await self._ready
        except EngineDiedError as error:
            ready = {"refused": f"it died {error}"}
        if (refused := ready.get("refused")) is None:
            return dict(ready["ready"])
        # What a worker died of stands in the log alone.
        said = self.last_error()
        why = clean(refused) if said in refused or not said else f"{said} ({clean(refused)})"
        raise refusal(why, f"its log is {self.keep_log()}")

    def ask(self, message: dict[str, Any]) -> tuple[int, asyncio.Future[dict[str, Any]]]:
        """Send a request; its number and its reply, which fails with EngineDiedError."""
        request = next(self._ids)
        reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        if self._exited.done():
            reply.set_exception(EngineDiedError(self._exited.result()))
        else:
            self._owed[request] = reply
            self._send({"id": request, **message})
        return request, reply

    def forget(self, request: int, reply: asyncio.Future[dict[str, Any]]) -> None:
        """Stop waiting for a reply; one that is not there yet is not worked on any more."""
        if self._owed.pop(request, None) is not None and not self._exited.done():
            self._send({"cancel": request})
        if reply.done() and not reply.cancelled():
            reply.exception()  # seen; asyncio complains of failures that nobody looked at
        reply.cancel()

    def last_error(self) -> str:
        """What the log says last of why it went wrong."""
        return last_error(self.log_file)

    def keep_log(self) -> Path:
        """Leave the log where it is when the child is closed; its path."""
        self._keep_log = True
        return self.log_file

    async def close(self) -> None:
        """End the child and its workers."""
        if not self._exited.done():
            self._send({"close": True})
            await asyncio.wait([self._exited], timeout=_CLOSE_S)
        if self._process is not None:
            end_group(self._process.pid)
        await self._exited
        for task in self._attending:
            task.cancel()
        if not self._keep_log:
            self.log_file.unlink(missing_ok=True)

    def _attend(self, process: Child) -> None:
        """Hear what it says, and of its end. Workers of its own may hold its output open beyond."""
        self._process = process
        self._attending = [
            asyncio.create_task(self._hear(process)),
            asyncio.create_task(self._see_off(process)),
        ]

    async def _hear(self, process: Child) -> None:
        async for message in process.messages():
            self._heed(json.loads(message.head))

    def _heed(self, message: dict[str, Any]) -> None:
        """Give what the child says to whoever waits for it."""
        if "in_the_making" in message:
            self.tokens_in_the_making = int(message["in_the_making"])
            if "id" not in message:
                return
        reply = self._owed.pop(message["id"], None) if "id" in message else self._ready
        if reply is not None and not reply.done():
            reply.set_result(message)

    async def _see_off(self, process: Child) -> None:
        """When it has ended, tell all who wait, and end workers that it left behind."""
        how = how_it_ended(await process.wait())
        end_group(process.pid)
        for reply in [self._ready, *self._owed.values()]:
            if not reply.done():
                reply.set_exception(EngineDiedError(how))
        if self._ready.done() and not self._ready.cancelled():
            self._ready.exception()
        self._owed.clear()
        self._exited.set_result(how)

    def _send(self, message: dict[str, Any]) -> None:
        if self._process is not None:
            self._process.send(json.dumps(message).encode())
