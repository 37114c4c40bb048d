"""A run's counts in a file for Prometheus, renewed while the run goes on.

node-exporter's textfile collector reads it
(https://github.com/prometheus/node_exporter#textfile-collector). A file and not a port: nothing to
listen on, nothing to keep out. The price: it is as old as ``EVERY_S``.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from engine.errors import OutputError, WoolmillError
from engine.files import new_file
from engine.limits import Pool
from engine.pipeline import Display, Progress
from engine.store import RunReader
from engine.view.metrics import metrics

__all__ = ["MetricsFile"]

EVERY_S = 15.0
FIRST = b"# HELP woolmill_"


class MetricsFile:
    """A display that also keeps ``path`` up to date; use as a context manager.

    A file that cannot be written is said once, and the run goes on.
    """

    def __init__(self, display: Display, path: Path, folder: Path) -> None:
        self._display = display
        self._path = path
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, "woolmill-metrics")
        self._writing: Future[None] | None = None
        self._due = time.monotonic()
        self._complained = False

    def __enter__(self) -> MetricsFile:
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
        if self._writing is not None:  # else the run never started
            self._writing = self._thread.submit(self._write)  # how it ended
        self._thread.shutdown()
        self._hear()

    def refresh(self, progress: Progress, pool: Pool) -> None:
        self._display.refresh(progress, pool)
        if time.monotonic() < self._due or not (self._writing is None or self._writing.done()):
            return
        self._hear()
        self._due = time.monotonic() + EVERY_S
        self._writing = self._thread.submit(self._write)

    def note(self, message: str) -> None:
        self._display.note(message)

    def _write(self) -> None:
        with RunReader(self._folder) as run:
            text = metrics(run)
        with new_file(self._path) as file:
            file.write(text.encode())

    def _hear(self) -> None:
        """Say how the last writing failed, if it did."""
        error = self._writing.exception() if self._writing is not None else None
        if isinstance(error, WoolmillError) and not self._complained:
            self._complained = True
            self.note(f"--metrics-file: {error}; the run goes on")
        elif error is not None and not isinstance(error, WoolmillError):
            raise error
