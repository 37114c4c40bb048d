"""The process that is killed: the real command line, saying what was acknowledged to it.

``python -m tests.crash.child`` carries out the first line on its standard input itself, so that
everything is imported and compiled, and forks a child for each of the others: a thousand kills do
not cost a thousand imports. When it forks it has one thread and no event loop.

    {"argv": […], "acks": PATH, "stderr": PATH, "failpoint": SETTING or null, "mutant": NAME or
    null}

With ``traced`` (``main`` or ``writer``) that thread writes its number into the file ``thread`` and
waits until somebody traces it. The parent answers each line with the child's pid, and with its exit
status when it has ended. With such a line as its argument, it is the child itself.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn

import engine.run.generate  # noqa: F401  imported before the fork
from engine import failpoints
from engine.cli.main import main
from engine.records import Answer, Decision, Prompt
from engine.store import DecisionRows, RunStore
from engine.store.schema import decode_decision
from engine.store.writer import Writer
from tests.crash import mutants

NOT_TRACED = 99
"""Exit status where nobody came to trace."""
TRACER_S = 10.0
SITE = Path(__file__).parent / "site"
"""What a Python process runs first: it has the one that decides write its index often, and breaks
the same protection there."""


def ledger_key(prompt: Prompt) -> str:
    """A request as the server's ledger names it."""
    text = f"{prompt.sampling.seed}\n{prompt.text}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def accepted(rows: DecisionRows) -> list[Decision]:
    return [decode_decision(body) for _, _, reason, body, _ in rows.decisions if reason is None]


def digest(decision: Decision) -> str:
    record = decision.record
    assert record is not None
    text = json.dumps([record["instruction"], record["input"], record["output"]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def witness(acks: str) -> None:
    """Write down what the store acknowledges, after it does: one unbuffered write for each call."""
    fd = os.open(acks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(lines: Sequence[str]) -> None:
        now = time.monotonic_ns()
        os.write(fd, "".join(f"{now} {line}\n" for line in lines).encode())

    say([f"start {os.getpid()}"])

    def sent(store: RunStore, prompts: Sequence[Prompt], _model: str) -> None:
        say([f"sent {stage(store)}{p.index} {ledger_key(p)}" for p in prompts])

    def answered(store: RunStore, answers: Sequence[Answer]) -> None:
        say([f"answered {stage(store)}{a.index}" for a in answers])

    def decided(store: RunStore, rows: DecisionRows) -> None:
        if not stage(store):  # the rows of the stages before it are in no export
            say([f"accepted {d.index}.{d.position} {digest(d)}" for d in accepted(rows)])

    wrap(RunStore, "sent", sent)
    wrap(RunStore, "answered", answered)
    wrap(RunStore, "decided_rows", decided)
    opened = RunStore.open.__func__  # type: ignore[attr-defined]

    def open_and_list(cls: type[RunStore], *args: Any) -> RunStore:
        store: RunStore = opened(cls, *args)
        again = store.resume().in_flight
        say([f"again {stage(store)}{request.index}" for request in again])
        return store

    RunStore.open = classmethod(open_and_list)  # type: ignore[method-assign, assignment]


def stage(store: RunStore) -> str:
    """What tells the requests of one stage from another's; empty where there is one."""
    return f"{store.folder.name}/" if store.folder.parent.name == "stages" else ""


def wrap(cls: type, name: str, say: Callable[..., None]) -> None:
    method = getattr(cls, name)

    def acknowledged(self: object, *args: Any, **given: Any) -> asyncio.Future[None]:
        future: asyncio.Future[None] = method(self, *args, **given)

        def tell(done: asyncio.Future[None]) -> None:
            if done.exception() is None:
                say(self, *args)

        future.add_done_callback(tell)
        return future

    setattr(cls, name, acknowledged)


def wait_for_tracer(path: str) -> None:
    """Say which thread this is, and go on as soon as it is traced."""
    thread = threading.get_native_id()
    with open(path, "w") as file:
        file.write(f"{thread}\n")
    given_up = time.monotonic() + TRACER_S
    while "TracerPid:\t0\n" in Path(f"/proc/self/task/{thread}/status").read_text():
        if time.monotonic() > given_up:
            os._exit(NOT_TRACED)
        time.sleep(0.001)  # the kernel tells nobody that a tracer has come


def hold_writer(path: str) -> None:
    run = Writer._run

    def traced(self: Writer) -> None:
        wait_for_tracer(path)
        run(self)

    Writer._run = traced  # type: ignore[method-assign]


def child(order: dict[str, Any]) -> NoReturn:
    status = 70
    try:
        os.setsid()
        err = os.open(order["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(err, 1)
        os.dup2(err, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ["PYTHONPATH"] = str(SITE)
        if order.get("mutant"):
            mutants.apply(order["mutant"])
            os.environ["WOOLMILL_MUTANT"] = order["mutant"]
        witness(order["acks"])
        if order.get("traced") == "main":
            wait_for_tracer(order["thread"])
        elif order.get("traced") == "writer":
            hold_writer(order["thread"])
        failpoint = order.get("failpoint")
        if failpoint and failpoint.startswith("index."):  # which the process that decides passes
            os.environ["WOOLMILL_FAILPOINT"] = failpoint
        else:
            failpoints.arm(failpoint)
        sys.argv = ["woolmill", *order["argv"]]
        main(order["argv"])
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else 1
    except BaseException:  # noqa: BLE001  nothing may get out of the fork
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def warm_up(order: dict[str, Any]) -> None:
    with suppress(SystemExit), open(order["stderr"], "w") as log, redirect_stderr(log):
        with redirect_stdout(log):
            main(order["argv"])
    gc.collect()
    assert threading.active_count() == 1


def serve() -> None:
    warm_up(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(order)
        print(pid, flush=True)  # noqa: T201
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(json.loads(sys.argv[1]))
    serve()
