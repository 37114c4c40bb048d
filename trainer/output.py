"""The output folder: claimed by one run, never overwritten unasked."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from trainer.cache import TokenDataset
from trainer.checkpoint import checkpoint_steps
from trainer.config import SaveSettings
from trainer.errors import OutputError, StoppedError
from trainer.metrics import say
from trainer.ranks import Ranks

__all__ = ["claimed", "name_dropped"]


@contextmanager
def claimed(settings: SaveSettings, ranks: Ranks) -> Iterator[None]:
    """Hold ``output_dir`` for this run.

    Raises:
        OutputError: it cannot be created, or an earlier run's result is there and neither
            ``resume`` nor ``overwrite`` was given.
        StoppedError: another run holds it.
    """
    lock = ranks.together(lambda: _claim(settings) if ranks.rank == 0 else None)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _claim(settings: SaveSettings) -> TextIO:
    folder = settings.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as exc:
        raise OutputError(f"{folder}: cannot be created: {exc.strerror}") from exc
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise StoppedError(f"{folder}: another run is training there") from exc
    earlier = [folder / f"checkpoint-{step}" for step in checkpoint_steps(folder)]
    if (folder / "config.json").exists():
        earlier.append(folder / "config.json")
    if earlier and not (settings.resume or settings.overwrite):
        raise OutputError(
            f"{folder}: holds an earlier run ({earlier[0].name}); go on with --resume, replace it"
            " with --overwrite, or choose another --output_dir"
        )
    if settings.overwrite:
        for path in earlier:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return lock


def name_dropped(dataset: TokenDataset, source: Path, list_file: Path) -> None:
    """Name every record that is not trained on: all in ``list_file``, the first to the person."""
    if not dataset.dropped:
        return
    lines = (json.dumps(asdict(row)) + "\n" for row in dataset.dropped)
    list_file.write_text("".join(lines), encoding="utf-8")
    counts = Counter(row.reason for row in dataset.dropped)
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
    names = ", ".join(row.name for row in dataset.dropped[:3])
    more = ", ..." if len(dataset.dropped) > 3 else ""
    say(f"{source}: {reasons} dropped of {len(dataset) + len(dataset.dropped)}: {names}{more}")
