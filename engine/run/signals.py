"""What signals do to a run: drain, leave, or bring a line."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import anyio
import anyio.abc

from engine.errors import Terminated
from engine.run.progress import Stop

__all__ = ["Stoppable", "listen", "until_listening"]


class Stoppable(Protocol):
    """A run, as signals see it."""

    @property
    def stopped(self) -> Stop | None: ...
    def halt_by_signal(self, signum: signal.Signals) -> None: ...
    def leave(self) -> None: ...
    def say_state(self, cause: str) -> None: ...


@contextmanager
def until_listening() -> Iterator[None]:
    """SIGTERM ends a start as Ctrl-C does, in order, and raises Terminated; it would end the
    process without a word. A run that listens hears it itself. A second one ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


async def listen(
    run: Stoppable, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    """Drain at a signal that ends; a second one of a person leaves at once. Started when signals
    are heard: nothing may be sent before.

    A terminal that is closed sends SIGHUP more than once (the kernel does, and the shell), so only
    SIGINT and SIGTERM count as a second. Under nohup SIGHUP is ignored from the start, and stays
    so. SIGUSR1 and SIGUSR2 would end the process unasked: they only bring a line. Signals are for a
    process's main thread; a run in another is stopped by its owner.
    """
    if threading.current_thread() is not threading.main_thread():
        task_status.started()
        return
    stopping = {signal.SIGINT, signal.SIGTERM, signal.SIGXCPU, signal.SIGHUP}
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        stopping.remove(signal.SIGHUP)
    asked = 0
    try:
        with anyio.open_signal_receiver(*stopping, signal.SIGUSR1, signal.SIGUSR2) as signals:
            task_status.started()
            async for signum in signals:
                if signum not in stopping:
                    run.say_state(signum.name)
                    continue
                asked += signum in (signal.SIGINT, signal.SIGTERM)
                if asked > 1:
                    run.leave()
                elif asked or run.stopped is None:
                    run.halt_by_signal(signum)
    finally:
        if run.stopped is not None and run.stopped.signum == signal.SIGHUP:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the next must not cut the end short
