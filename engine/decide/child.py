"""The process that decides: it reads answers from the run store, and says what they come to.

Messages are frames (``engine.processes.frames``); the body is that of rows:

    in   {"folder", "config", "tasks", "path", "careful", "skip", "semantic_key"} first
         {"below"}                             every request with a lower index has its answer
    out  {"ready": true}                       may be told what is answered
         {"at"}                                the answer that is decided next, where careful
         {"first", "end", "rows"} and the rows' bodies; without decisions, embeddings alone
         {"waits": true}                       a sign of life, while embeddings are waited for
         {"full": true}                        the target is reached; nothing follows
         {"note"} · {"log"} · {"error", "message"} · {"bug"}

End of input means that the run's process is gone, and ends this one at once.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from engine.decide.decider import (
    Decider,
    make_cascade,
    unreadable_note,
    uses_semantic,
    without_neighbours_note,
)
from engine.decide.embedded import StoredVectors
from engine.decide.snapshot import Snapshots
from engine.embeddings.remote import RemoteEncoder
from engine.errors import WoolmillError
from engine.processes.frames import frame, keep_pipes, read_frame
from engine.processes.garbage import seldom_collected
from engine.records import Answer, SeedTask
from engine.screen import sturdy_streams
from engine.secrets import Secret
from engine.settings import RunConfig
from engine.store import RunReader, decode, encode

BATCH = 256
"""Answers that are decided, sent and committed together."""
FORESEEN = 2
"""Batches read at a time where embeddings come from elsewhere: one is decided, one is asked for."""
EMBEDDINGS = 2_000
"""That are sent together before the first decision, as those of a dataset to stay clear of."""


class _Answered:
    """How far answers are there, as the parent says in another thread."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._below = 0
        self._changed = threading.Condition()

    def listen(self) -> NoReturn:
        """Take in what the parent says, and end with it."""
        try:
            while (message := read_frame(self._source)) is not None:
                with self._changed:
                    self._below = decode(message.head)["below"]
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
    first_message = read_frame(source)
    if first_message is None:
        return
    order = decode(first_message.head)
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
    snapshots = Snapshots(store, lambda line: send({"log": line}))
    cascade, (_, missing) = snapshots.restore(
        cascade, lambda: make_cascade(config, recipe, remote), recipe, counts
    )
    if missing and counts.accepted:
        send({"note": f"embedded {missing} accepted rows again: their vectors were missing"})
    decider = Decider(
        recipe,
        cascade,
        seed=config.seed,
        samples=config.samples or 1,
        api=config.asked_api,
        carry=config.carry,
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
    is_told = False
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
            if cascade.is_past_neighbours and not is_told:
                is_told = True
                send({"note": without_neighbours_note()})
            rows = store.rows_of(decisions, vectors, embedded.handed_over(sys.maxsize))
            packed, bodies = rows.pack()
            send({"first": first, "end": end, "rows": packed}, bodies)
            first = end
            if decisions:
                last = (decisions[-1].index, decisions[-1].position)
                snapshots.keep(cascade, last, config.target - left)
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
    source, out = keep_pipes()

    sending = threading.Lock()  # the thread that writes a snapshot has its word too

    def send(message: dict[str, Any], body: Sequence[bytes] = ()) -> None:
        with sending:
            out.writelines(frame(encode(message), body))
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
