"""Decisions in a process of their own, since under one interpreter's lock they and the network take
turns: on two cores a run does 1.4 times as much so. This is the run's side; the process's is
``engine.decide.child``.

Nothing is lost with such a process. It reads answers from the run store, like every other reader,
and all that it knows follows from what is committed there; where it dies, another goes on from
that.

A recipe's own code can hang so that nothing within the process ends it. Then the run does, and
starts another that is careful: it decides one answer at a time and says which. Where that hangs
too, the answer is skipped, which refuses it.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any, BinaryIO, NoReturn

from engine import errors, models
from engine.errors import UnavailableError
from engine.processes.children import (
    Child,
    Need,
    environment,
    how_it_ended,
    python_command,
    start_async,
)
from engine.processes.frames import read_frame
from engine.recipes.load import CODED, module_folders
from engine.records import SeedTask
from engine.secrets import Secret, read_key
from engine.settings import RunConfig
from engine.store import DecisionRows, decode, encode

__all__ = ["Batch", "Deciding", "DiedError", "StuckError"]

log = logging.getLogger(__name__)

PIPE_BYTES = 1 << 20
"""Room for a batch or two, where the system grants it: fewer turns to take in one."""
MOST_AHEAD = 8
"""Batches that may wait to be taken; then the process waits."""
STUCK_S = 60.0
"""Without a word while answers wait to be decided; a recipe's code that takes longer hangs."""
LOOKS = 12
"""Times that one looks meanwhile: one for all of a time in which the machine slept."""

Message = tuple[dict[str, Any], bytes]
"""As ``engine.decide.child`` lists them: what the head holds, and the rows' bodies."""


class DiedError(Exception):
    """The process has ended by itself; ``str`` says how."""


class StuckError(DiedError):
    """The process was ended, as the recipe's code in it hangs; another can go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Decisions on the answers ``first`` up to before ``end``; on the last perhaps only in part."""

    first: int
    end: int
    rows: DecisionRows

    @property
    def reasons(self) -> Iterator[tuple[int, str | None]]:
        """Of each decision in order: its request, and why the row was refused; None: accepted."""
        return ((request, reason) for request, _, reason, _, _ in self.rows.decisions)


class Deciding:
    """The process that decides one run's answers; start it with ``start``.

    Args:
        config: the run's settings.
        tasks: its seed tasks.
        note: shows a line to the person.
    """

    def __init__(
        self, config: RunConfig, tasks: Sequence[SeedTask], note: Callable[[str], None]
    ) -> None:
        self._order: dict[str, Any] = {  # not by argv, which others can read
            "folder": str(config.out.absolute()),
            "config": config.model_dump(mode="json"),
            "tasks": [asdict(task) for task in tasks],
            "path": module_folders(config.recipe),
            "careful": False,
            "skip": [],
        }
        self._may_hang = config.recipe not in CODED
        self._begun = False
        self._below = self._decided = 0
        self._at: int | None = None
        """The answer that a careful process is at."""
        self._died_at: int | None = None
        """The answer at which a careful process died last."""
        self._needs: tuple[Need, ...] = ("engine",)
        self._semantic_key: Secret | None = None
        model = config.semantic_model
        if config.semantic_url is not None:
            self._needs = ("engine", "web")
            self._semantic_key = read_key(env=config.semantic_key_env)
        elif not (model is None or model in models.NAMES or Path(model).exists()):
            self._needs = ("engine", "hub")
        self._note = note
        self._process: Child | None = None
        self._inbox: asyncio.Queue[Message | None] = asyncio.Queue()
        """What the process has said and nobody has taken; None: the end of one process."""
        self._ahead = threading.Semaphore(MOST_AHEAD)
        """Room in the inbox: the thread that fills it waits for it, and so does the process."""
        self._closed = False

    async def start(self) -> None:
        """Start a process, or one in the place of another that died. It decides from what is
        committed, so nothing may be under way to the store.

        Raises UnavailableError where the machine has no room for another process.
        """
        try:
            await self._start()
        except OSError as error:
            raise UnavailableError(
                f"the process that decides cannot be started ({error}); is `ulimit -n` or the "
                "memory too small?"
            ) from error

    async def _start(self) -> None:
        end, out = os.pipe()
        with suppress(AttributeError, OSError):  # Linux
            fcntl.fcntl(out, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        try:
            # Its folder stays ours: settings name files by paths from here.
            command = python_command("-m", "engine.decide.child")
            self._process = await start_async(
                command, environment(*self._needs), stdin=PIPE, stdout=out
            )
        except BaseException:  # raised again, with no pipe left open
            os.close(end)
            raise
        finally:
            os.close(out)
        # Not by the loop: under load its turns take a tenth of a second, and a pipe holds little.
        source, loop = os.fdopen(end, "rb"), asyncio.get_running_loop()
        threading.Thread(target=self._listen, args=(source, loop), daemon=True).start()
        key = self._semantic_key.reveal() if self._semantic_key is not None else None
        self._send({**self._order, "semantic_key": key})  # the child's environment has no keys

    async def ready(self) -> None:
        """Wait until models are loaded and the seeds compared with.

        Raises WoolmillError for what makes that impossible.
        """
        self._begun = False
        try:
            await self._receive()
            self._begun = True
        except DiedError as error:
            raise UnavailableError(f"{error} before it began; is there memory enough?") from error

    def tell(self, below: int) -> None:
        """Every request with an index lower than ``below`` has its answer in the store."""
        self._below = below
        self._send({"below": below})

    async def batches(self) -> AsyncIterator[Batch]:
        """Decisions in plan order, up to the target. Raises WoolmillError, DiedError."""
        while True:
            head, body = await self._receive()
            self._decided = head["end"]
            rows = DecisionRows.unpack(head["rows"], body)
            yield Batch(first=head["first"], end=head["end"], rows=rows)

    async def aclose(self) -> None:
        """End the process, whatever it does: it has nothing of its own."""
        if self._process is None:
            return
        self._process.kill()
        await self._process.wait()
        self._closed = True
        self._ahead.release()  # whoever listens comes to the end

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process is not None
        self._process.send(encode(message))

    def _listen(self, source: BinaryIO, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread of its own: take in what one process says, to its end."""
        with source, suppress(RuntimeError):  # the loop is closed: nobody waits
            while (frame := read_frame(source)) is not None:
                if not self._closed:
                    self._ahead.acquire()
                message = decode(frame.head), frame.body
                loop.call_soon_threadsafe(self._inbox.put_nowait, message)
            loop.call_soon_threadsafe(self._inbox.put_nowait, None)

    async def _receive(self) -> Message:
        """The next message that is not for the person."""
        assert self._process is not None
        while (message := await self._next()) is not None:
            self._ahead.release()
            head = message[0]
            if "at" in head:
                self._at = head["at"]
                continue
            if "waits" in head:
                continue
            if "full" in head:
                self._may_hang = False  # nothing further is decided, whatever is answered
                continue
            if "error" in head:
                raise getattr(errors, head["error"])(head["message"])
            if "bug" in head:
                raise RuntimeError(f"in the process that decides:\n{head['bug']}")
            if "log" in head:
                log.info("%s", head["log"])
                continue
            if "note" not in head:
                return message
            self._note(head["note"])
        how = f"the process that decides ended {how_it_ended(await self._process.wait())}"
        if self._may_hang and self._begun:
            self._suspect(how)
        raise DiedError(how)

    def _suspect(self, how: str) -> None:
        """After a death that the recipe's code may have brought about: raises StuckError where
        another process can find out, or knows. Only two deaths at one answer are laid to it, since
        a process is also killed for want of memory.
        """
        at, self._at = self._at, None
        if not self._order["careful"]:
            self._order["careful"] = True
            raise StuckError(f"{how}; deciding one answer at a time from here on")
        if at is not None and at == self._died_at:
            self._order["skip"].append(at)
            raise StuckError(f"{how} at the answer to request {at} again; it is refused")
        if at is not None:
            self._died_at = at
            raise StuckError(f"{how} at the answer to request {at}; starting another")

    async def _next(self) -> Message | None:
        """The next message; None: the process has ended. Raises StuckError."""
        silent = 0
        while True:
            try:
                async with asyncio.timeout(STUCK_S / LOOKS):
                    return await self._inbox.get()
            except TimeoutError:
                waits = self._may_hang and self._begun and self._below > self._decided
                silent = silent + 1 if waits else 0
                if silent == LOOKS:
                    await self._end_stuck()

    async def _end_stuck(self) -> NoReturn:
        """End a process whose recipe hangs, so that another goes on more carefully."""
        assert self._process is not None
        self._process.kill()
        while await self._inbox.get() is not None:
            self._ahead.release()  # not committed: the next process decides it again
        await self._process.wait()
        if self._at is None:
            self._order["careful"] = True
            raise StuckError("the recipe's code hangs; deciding one answer at a time from here on")
        self._order["skip"].append(self._at)
        stuck, self._at = self._at, None
        raise StuckError(f"the recipe's code hangs at the answer to request {stuck}; it is refused")
