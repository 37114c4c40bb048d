"""The process that decides: it reads answers from the run store, and says what they come to.

Messages are frames (``engine.processes.frames``); the body is that of rows:

    in   {"folder", "config", "tasks", "path", "careful", "skip"} first
         {"below"}                             every request with a lower index has its answer
    out  {"ready": true}                       may be told what is answered
         {"at"}                                the answer that is decided next, where careful
         {"first", "end", "rows"} and the rows' bodies
         {"full": true}                        the target is reached; nothing follows
         {"note"} · {"log"} · {"error", "message"} · {"bug"}

End of input means that the run's process is gone, and ends this one at once.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from engine.decide.decider import (
    Decider,
    make_cascade,
    unreadable_note,
    without_neighbours_note,
)
from engine.decide.snapshot import Snapshots
from engine.errors import WoolmillError
from engine.processes.frames import frame, keep_pipes, read_frame
from engine.processes.garbage import seldom_collected
from engine.records import SeedTask
from engine.screen import sturdy_streams
from engine.settings import RunConfig
from engine.store import RunReader, decode, encode

BATCH = 256
"""Answers that are decided, sent and committed together."""


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
    cascade = make_cascade(config, recipe)
    if cascade.unreadable:
        send({"note": unreadable_note(cascade.unreadable, len(cascade))})
    send({"ready": True})
    snapshots = Snapshots(store, lambda line: send({"log": line}))
    cascade, (_, missing) = snapshots.restore(
        cascade, lambda: make_cascade(config, recipe), recipe, counts
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
    with seldom_collected():
        while left > 0:
            count = min(1 if careful else BATCH, answered.wait_beyond(first) - first)
            if careful:
                send({"at": first})
            answers = store.answers(first, count)
            decisions, vectors = decider.decide(answers, limit=left)
            left -= sum(decision.accepted for decision in decisions)
            end = answers[-1].index + 1
            if cascade.is_past_neighbours and not is_told:
                is_told = True
                send({"note": without_neighbours_note()})
            packed, bodies = store.rows_of(decisions, vectors).pack()
            send({"first": first, "end": end, "rows": packed}, bodies)
            first = end
            if decisions:
                last = (decisions[-1].index, decisions[-1].position)
                snapshots.keep(cascade, last, config.target - left)
    send({"full": True})
    threading.Event().wait()  # for the end of input


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
