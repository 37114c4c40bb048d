"""Decisions in a process of their own, since under one interpreter's lock they and the network take
turns: on two cores a run does 1.4 times as much so.

Nothing is lost with such a process. It reads answers from the run store, like every other reader,
and all that it knows follows from what is committed there; where it dies, another goes on from
that.

A message is two lengths (4 bytes each, big-endian), so many bytes of JSON and so many of rows:

    in   {"folder", "config", "tasks", "path", "careful", "skip", "semantic_key"} first
         {"below"}                             every request with a lower index has its answer
    out  {"ready": true}                       may be told what is answered
         {"at"}                                the answer that is decided next, where careful
         {"first", "end", "rows"} and the rows' bodies; without decisions, embeddings alone
         {"waits": true}                       a sign of life, while embeddings are waited for
         {"full": true}                        the target is reached; nothing follows
         {"note"} · {"error", "message"} · {"bug"}

End of input means that the parent is gone, and ends the process at once.

A recipe's own code can hang so that nothing within the process ends it. Then the parent does, and
starts another that is careful: it decides one answer at a time and says which. Where that hangs
too, the answer is skipped, which refuses it.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any, BinaryIO, NoReturn

from engine import errors, models
from engine.decide.decider import (
    Decider,
    make_cascade,
    restore_cascade,
    unreadable_note,
    uses_semantic,
)
from engine.decide.embedded import StoredVectors
from engine.embeddings.remote import RemoteEncoder
from engine.errors import UnavailableError, WoolmillError
from engine.processes.children import (
    Child,
    Need,
    environment,
    how_it_ended,
    python_command,
    start_async,
)
from engine.processes.garbage import seldom_collected
from engine.recipes.load import CODED, module_folders
from engine.records import Answer, SeedTask
from engine.screen import sturdy_streams
from engine.secrets import Secret, read_key
from engine.settings import RunConfig
from engine.store import DecisionRows, RunReader, decode, encode

__all__ = ["Batch", "Deciding", "DiedError", "StuckError"]

BATCH = 256
"""Answers that are decided, sent and committed together."""
PIPE_BYTES = 1 << 20
"""Room for a batch or two, where the system grants it: fewer turns to take in one."""
MOST_AHEAD = 8
"""Batches that may wait to be taken; then the process waits."""
FORESEEN = 2
"""Batches read at a time where embeddings come from elsewhere: one is decided, one is asked for."""
EMBEDDINGS = 2_000
"""That are sent together before the first decision, as those of a dataset to stay clear of."""

STUCK_S = 60.0
"""Without a word while answers wait to be decided; a recipe's code that takes longer hangs."""
LOOKS = 12
"""Times that one looks meanwhile: one for all of a time in which the machine slept."""

Message = tuple[dict[str, Any], bytes]


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


# The parent's side


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
        self._ahead = threading.Semaphore(MOST_AHEAD)
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
            command = python_command("-m", "engine.decide.process")
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
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        self._closed = True
        self._ahead.release()  # whoever listens comes to the end

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process is not None
        pipe = self._process.stdin
        assert pipe is not None
        if not pipe.is_closing():  # else it died, and whoever receives is told
            pipe.write(b"".join(_frame(message)))

    def _listen(self, source: BinaryIO, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread of its own: take in what one process says, to its end."""
        with source, suppress(RuntimeError):  # the loop is closed: nobody waits
            while message := _read(source):
                if not self._closed:
                    self._ahead.acquire()
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
        with suppress(ProcessLookupError):
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


def _frame(head: dict[str, Any], body: Sequence[bytes] = ()) -> Iterator[bytes]:
    encoded = encode(head)
    yield len(encoded).to_bytes(4, "big") + sum(map(len, body)).to_bytes(4, "big")
    yield encoded
    yield from body


def _read(source: BinaryIO) -> Message | None:
    """The next message; None at the end, in the middle of one too."""
    lengths = source.read(8)
    head_size, body_size = int.from_bytes(lengths[:4], "big"), int.from_bytes(lengths[4:], "big")
    head, body = source.read(head_size), source.read(body_size)
    if len(lengths) < 8 or len(head) < head_size or len(body) < body_size:
        return None
    return decode(head), body


# The process's side


class _Answered:
    """How far answers are there, as the parent says in another thread."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._below = 0
        self._changed = threading.Condition()

    def listen(self) -> NoReturn:
        """Take in what the parent says, and end with it."""
        try:
            while message := _read(self._source):
                with self._changed:
                    self._below = message[0]["below"]
                    self._changed.notify()
        finally:
            os._exit(0)

    def has(self, index: int) -> bool:
        """Whether the request ``index`` has its answer."""
        with self._changed:
            return self._below > index

    def wait_beyond(self, first: int) -> int:
        """Wait for the answer ``first``; every request below the returned index has one."""
        with self._changed:
            self._changed.wait_for(lambda: self._below > first)
            return self._below


def _work(source: BinaryIO, send: Callable[..., None]) -> None:
    """Decide what the parent says is answered, until the target."""
    first_message = _read(source)
    if first_message is None:
        return
    order = first_message[0]
    config = RunConfig.model_validate(order["config"])
    tasks = [SeedTask(**task) for task in order["tasks"]]
    # What a recipe can be imported from there, it can be here; last, so that nothing comes before
    # what is installed.
    sys.path += [entry for entry in order["path"] if entry not in sys.path]
    store = RunReader(Path(order["folder"]), snapshot=False)
    counts = store.counts()
    answered = _Answered(source)
    threading.Thread(target=answered.listen, daemon=True).start()
    recipe = config.make_recipe(tasks)
    embedded = StoredVectors(store)
    remote = _remote(config, order["semantic_key"], embedded, send)
    cascade = make_cascade(config, recipe, remote)
    if cascade.unreadable:
        send({"note": unreadable_note(cascade.unreadable, len(cascade))})
    send({"ready": True})
    missing = restore_cascade(cascade, store, recipe)
    if missing and counts.accepted:
        send({"note": f"embedded {missing} accepted rows again: their vectors were missing"})
    decider = Decider(
        recipe,
        cascade,
        seed=config.seed,
        samples=config.samples or 1,
        api=config.asked_api,
        after=counts.last_decided,
        skip=order["skip"],
    )
    careful = order["careful"]
    # The answer of the last decision is parsed again: the target may have fallen inside it. So are
    # those of the other samples where they become one row.
    first = counts.last_decided[0] if counts.last_decided else 0
    if recipe.reduces:
        first -= first % (config.samples or 1)
    left = config.target - counts.accepted
    _send_embeddings(embedded, store, counts.last_decided[0] if counts.last_decided else 0, send)
    foresees = cascade.foresees and not careful
    read: deque[list[Answer]] = deque()
    unread = first
    with seldom_collected():
        while left > 0:
            while not read or (foresees and len(read) < FORESEEN and answered.has(unread)):
                count = min(1 if careful else BATCH, answered.wait_beyond(unread) - unread)
                if careful:
                    send({"at": unread})
                read.append(store.answers(unread, count))
                unread = read[-1][-1].index + 1
                if foresees:
                    decider.foresee(read[-1])
            answers = read.popleft()
            decisions, vectors = decider.decide(answers, limit=left)
            left -= sum(decision.accepted for decision in decisions)
            end = answers[-1].index + 1
            rows = store.rows_of(decisions, vectors, embedded.handed_over(sys.maxsize))
            packed, bodies = rows.pack()
            send({"first": first, "end": end, "rows": packed}, bodies)
            first = end
    send({"full": True})
    threading.Event().wait()  # for the end of input


def _remote(
    config: RunConfig, key: str | None, embedded: StoredVectors, send: Callable[..., None]
) -> RemoteEncoder | None:
    """What embeds elsewhere, where the settings say so."""
    if config.semantic_url is None or not uses_semantic(config):
        return None
    # Its server's troubles are told as notes, by ``send``; not by the handler of last resort.
    logging.getLogger("engine.limits").addHandler(logging.NullHandler())
    return RemoteEncoder(
        config,
        None if key is None else Secret(key),
        embedded,
        note=lambda line: send({"note": line}),
        waits=lambda: send({"waits": True}),
    )


def _send_embeddings(
    embedded: StoredVectors, store: RunReader, at: int, send: Callable[..., None]
) -> None:
    """Hand over what references were embedded to, which may be too much for one message."""
    while some := embedded.handed_over(EMBEDDINGS):
        packed, bodies = store.rows_of((), (), some).pack()
        send({"first": at, "end": at, "rows": packed}, bodies)


def main() -> NoReturn:
    """Keep the pipes to ourselves and work."""
    source, out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what libraries print

    def send(message: dict[str, Any], body: Sequence[bytes] = ()) -> None:
        out.writelines(_frame(message, body))
        out.flush()

    with sturdy_streams():
        sys.stdout = sys.stderr  # a library's words must not fail on a terminal that is gone
        try:
            _work(source, send)
        except WoolmillError as error:
            send({"error": type(error).__name__, "message": str(error)})
        except BrokenPipeError:
            pass  # the parent is gone
        except BaseException:  # noqa: BLE001 - whatever it is, the parent must know
            send({"bug": traceback.format_exc()})
    os._exit(0)  # without waiting for the thread that listens


if __name__ == "__main__":
    main()
