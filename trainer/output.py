"""The output folder: claimed by one run, never overwritten unasked."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from trainer.cache import TokenDataset
from trainer.checkpoint import checkpoint_steps
from trainer.config import SaveSettings
from trainer.errors import ConfigError, OutputError, StoppedError
from trainer.metrics import say
from trainer.ranks import Ranks

__all__ = ["claimed", "name_dropped"]

PATIENCE_S = 10.0
"""How long a host looks for what rank 0 has written: network file systems show it late."""


@contextmanager
def claimed(settings: SaveSettings, ranks: Ranks) -> Iterator[None]:
    """Hold ``output_dir`` for this run.

    Raises:
        OutputError: it cannot be created, or an earlier run's result is there and neither
            ``resume`` nor ``overwrite`` was given.
        StoppedError: another run holds it.
        ConfigError: the hosts do not share it.
    """
    lock = ranks.together(lambda: _claim(settings) if ranks.rank == 0 else None)
    try:
        _check_shared(settings.output_dir, ranks)
        yield
    finally:
        if lock is not None:
            lock.close()


def _check_shared(folder: Path, ranks: Ranks) -> None:
    """Every host must see what rank 0 writes: a checkpoint whose parts lie on different disks would
    never load. Collective.
    """
    name = f".shared-{ranks.gather(secrets.token_bytes(16))[0].hex()}"
    file = folder / name

    def write() -> None:
        for left_by_a_kill in folder.glob(".shared-*"):
            left_by_a_kill.unlink()
        file.touch()

    ranks.together(lambda: write() if ranks.rank == 0 else None)
    try:
        ranks.together(lambda: _look_for(folder, name) if ranks.local_rank == 0 else None)
    finally:
        if ranks.rank == 0:
            file.unlink(missing_ok=True)


def _look_for(folder: Path, name: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    # Listed, not looked up: a network file system remembers that a name was not there.
    while not folder.is_dir() or name not in os.listdir(folder):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"--output_dir {folder}: is not shared by all hosts: {socket.gethostname()} does"
                " not see what rank 0 writes; name a folder on a shared disk"
            )
        time.sleep(0.05)


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


def name_dropped(parts: Mapping[str, TokenDataset], list_file: Path) -> None:
    """Name every record that is not trained on: all in ``list_file``, the first to the person."""
    every = [row for part in parts.values() for row in part.dropped]
    list_file.unlink(missing_ok=True)
    if every:
        lines = (json.dumps(asdict(row)) + "\n" for row in every)
        list_file.write_text("".join(lines), encoding="utf-8")
    for name, part in parts.items():
        if part.dropped:
            counts = Counter(row.reason for row in part.dropped)
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
            names = ", ".join(row.name for row in part.dropped[:3])
            more = f", ...; all are in {list_file.name}" if len(part.dropped) > 3 else ""
            total = len(part) + len(part.dropped)
            say(f"{name}: {reasons} dropped of {total}: {names}{more}")
