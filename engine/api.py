"""A run's records in Python: ``with open_run("runs/alpaca") as run: for record in run: ...``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from engine.errors import InputError
from engine.records import Decision, Record
from engine.store import Counts, Manifest, RunReader

__all__ = ["OpenRun", "open_run"]


class OpenRun:
    """A run as it was when it was opened; read-only, also while another process writes to it."""

    def __init__(self, folder: Path) -> None:
        self._reader = RunReader(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()

    def __len__(self) -> int:
        """How many records are accepted."""
        return self.counts.accepted

    def __iter__(self) -> Iterator[Record]:
        """The accepted records in plan order; streamed, so a large run needs no memory."""
        for decision in self._reader.decisions(accepted=True):
            if decision.record is None:
                raise InputError(f"{self._reader.path}: an accepted row has no record")
            yield decision.record

    def decisions(self, *, accepted: bool | None = None) -> Iterator[Decision]:
        """What became of every piece of every answer, with reasons and nearest neighbours."""
        return self._reader.decisions(accepted=accepted)

    @property
    def counts(self) -> Counts:
        return self._reader.counts()

    @property
    def settings(self) -> Manifest:
        return self._reader.manifest


def open_run(folder: str | os.PathLike[str]) -> OpenRun:
    """The run in ``folder``. Raises InputError where there is none, or it is damaged."""
    return OpenRun(Path(folder))
