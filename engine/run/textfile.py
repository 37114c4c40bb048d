"""A run's counts in a file for Prometheus, renewed while the run goes on.

node-exporter's textfile collector reads it
(https://github.com/prometheus/node_exporter#textfile-collector). A file and not a port: nothing to
listen on, nothing to keep out. The price: it is as old as ``EVERY_S``.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from engine.errors import OutputError, WoolmillError
from engine.export import OWN_FILES
from engine.files import new_file
from engine.limits import Pool
from engine.run.progress import Display, Progress
from engine.store import RunReader
from engine.view.metrics import metrics

__all__ = ["MetricsFile"]

EVERY_S = 15.0
"""Seconds between two writes: about as often as Prometheus is set to look."""
LAST_S = 5.0
"""How long the end of a run waits for the file."""
FIRST = b"# HELP woolmill_"


class MetricsFile:
    """A display that also keeps ``path`` up to date; use as a context manager.

    A file that cannot be written is said once; it is tried again, and the run goes on.
    """

    def __init__(self, display: Display, path: Path, folder: Path) -> None:
        self._display = display
        self._path = path
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._due = time.monotonic()
        self._making: int | None = None
        self._failed: Exception | None = None
        self._complained = False

    def __enter__(self) -> MetricsFile:
        name = self._path.name
        if name in OWN_FILES and self._path.parent.resolve() == self._folder.resolve():
            raise OutputError(
                f"--metrics-file {self._path}: this is where the run is stored; choose another name"
            )
        if os.path.lexists(self._path) and not self._ours():
            raise OutputError(
                f"--metrics-file {self._path}: exists, and holds no metrics of a run; "
                "choose another name"
            )
        return self

    def _ours(self) -> bool:
        """Whether an earlier session wrote the file that is there."""
        try:
            with self._path.open("rb") as file:
                return not self._path.is_symlink() and file.read(len(FIRST)) == FIRST
        except OSError:
            return False

    def __exit__(self, *exc_info: object) -> None:
        if self._thread is not None:  # else the run never started
            self._thread.join(LAST_S)
            if not self._thread.is_alive():
                self._making = None
                self._start()  # how it ended
                self._thread.join(LAST_S)
        self._hear()

    def refresh(self, progress: Progress, pool: Pool) -> None:
        self._display.refresh(progress, pool)
        self._making = progress.tokens_in_the_making
        writing = self._thread is not None and self._thread.is_alive()
        if time.monotonic() < self._due or writing:
            return
        self._hear()
        self._due = time.monotonic() + EVERY_S
        self._start()

    def note(self, message: str) -> None:
        self._display.note(message)

    def _start(self) -> None:
        # Daemon: a disk that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._write, name="woolmill-metrics", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        try:
            with RunReader(self._folder) as run:
                text = metrics(run, tokens_in_the_making=self._making)
            with new_file(self._path) as file:
                file.write(text.encode())
        except Exception as error:  # noqa: BLE001 - whatever it is, the run goes on
            self._failed = error

    def _hear(self) -> None:
        """Say how the last writing failed, if it did."""
        error, self._failed = self._failed, None
        if error is not None and not self._complained:
            self._complained = True
            what = str(error) if isinstance(error, WoolmillError) else repr(error)
            self.note(f"--metrics-file: {what}; the run goes on")
