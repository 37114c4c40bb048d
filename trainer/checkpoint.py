"""Checkpoints: every rank writes its shards, and a manifest written last makes them count.

torch's distributed checkpoint (DCP) lays the tensors out, in its safetensors form: nothing in a
checkpoint can execute, because nothing in it is a pickle. The manifest holds the SHA-256 of every
file and of itself, and everything else that a resumed run needs; it is verified before a file is
opened. A checkpoint without a manifest, or with one that does not match, does not exist, and the
next older one is taken. An older one is removed only when a newer is whole.

A save runs in a thread of its own on a copy in host memory, so training waits only for the copy and
for an earlier save that is not done. The price is the memory of that copy: three times the
parameters, in float32, divided by the ranks. The other price of safetensors instead of DCP's own
format: DCP's asynchronous API is not used.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from trainer.errors import ConfigError, DataError, DiskError, TrainerError
from trainer.failpoints import failpoint
from trainer.ranks import Ranks, noticing_lost_ranks

__all__ = ["Checkpoints", "Damaged", "Manifest", "beginning", "checkpoint_steps", "read_manifest"]

FORMAT = 1
"""Of the manifest, raised when older code could no longer read it right. Another one counts as
damage, since guessing at it might resume a run from the wrong state."""
MANIFEST = "manifest.json"
"""The file whose presence makes a checkpoint whole. It is the last to be written and the first to
be removed."""
_FOLDER = re.compile(r"checkpoint-(\d+)")
"""The name of a checkpoint's folder and its step: ``checkpoint-500``."""
PATIENCE_S = 60.0
"""How long rank 0 looks for a file that another host has written: network file systems show it
late, those with cached folders after half a minute."""


class Damaged(Exception):
    """A checkpoint that must not be used; says which file and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint is, besides tensors."""

    step: int
    """Steps done: the next one has this index."""
    updates: int
    """Steps in which the optimizer moved; the rest were skipped for a loss that was not finite."""
    tokens: int
    """Tokens trained on so far, padding not counted."""
    recipe: dict[str, Any]
    """What the loss curve follows from; a resumed run must have the same."""
    world_size: int
    torch: str
    files: dict[str, str]
    """SHA-256 by file name."""
    format: int = FORMAT


class Checkpoints:
    """The checkpoints of one output folder.

    Args:
        say: prints a line to the person; used from rank 0 only.
        limit: whole checkpoints to keep; None keeps all.
        beside: save in a thread.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        limit: int | None,
        beside: bool,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._ranks, self._limit, self._beside = folder, ranks, limit, beside
        self._say = say
        self._saving: threading.Thread | None = None
        self._error: TrainerError | None = None

    def newest(self) -> tuple[Path, Manifest] | None:
        """The newest whole checkpoint, None when there has never been one. Collective.

        Raises:
            DataError: there are checkpoints and none of them is whole.
        """
        # One rank reads and hashes; on a shared disk the others would read the same gigabytes
        # again.
        step = self._ranks.together(lambda: self._newest_whole() if self._ranks.rank == 0 else -1)
        # The others add 0, so the sum is what rank 0 found.
        step = int(self._ranks.sum([float(step if self._ranks.rank == 0 else 0)])[0])
        if step == -2:
            raise DataError(
                f"{self._folder}: none of its checkpoints is whole; start again with --overwrite"
            )
        return None if step < 0 else (self._at(step), read_manifest(self._at(step)))

    def at(self, folder: Path) -> tuple[Path, Manifest]:
        """The checkpoint in ``folder``, wherever that is. Collective.

        Raises:
            ConfigError: it is no checkpoint of this trainer.
            DataError: it is not whole.
        """
        folder = folder.expanduser()
        check = verify if self._ranks.rank == 0 else read_manifest
        return folder, self._ranks.together(lambda: _chosen(folder, check))

    def set_aside(self, step: int) -> None:
        """Rename checkpoints that are newer than ``step``, which a run that goes on from there
        would take for its own.
        """
        # Renamed and not removed: somebody may have gone back to an older one by mistake.
        for newer in checkpoint_steps(self._folder):
            if newer > step:
                names = (f"set-aside-{newer}{f'-{n}' if n else ''}" for n in itertools.count())
                name = next(name for name in names if not (self._folder / name).exists())
                self._at(newer).rename(self._folder / name)
                self._say(f"checkpoint-{newer} is newer and was renamed to {name}")

    def load(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Fill the tensors of ``state`` from the checkpoint in ``folder``, whatever the number of
        ranks that wrote it. Collective; :meth:`newest` or :meth:`at` has verified its files.

        Raises:
            DataError: it holds other tensors.
        """
        reader = HuggingFaceStorageReader(str(folder))
        try:
            with noticing_lost_ranks():
                dcp_load(dict(state), storage_reader=reader, process_group=self._ranks.saving)
        except (CheckpointException, SafetensorError) as exc:
            reason = str(exc).strip().splitlines()[-1]
            raise DataError(f"{folder}: does not fit this model: {reason}") from exc

    def save(self, state: Mapping[str, Tensor], facts: Manifest) -> None:
        """Save ``state`` (sharded tensors) as the checkpoint of ``facts.step``. Collective.

        Returns when the tensors are copied; a fault shows in the next :meth:`wait`.
        """
        self.wait()
        # Copied here and not in the thread: the next step changes the tensors in place.
        copy = {name: _copied(tensor) for name, tensor in state.items()}
        self._saving = threading.Thread(target=self._save, args=(copy, facts), daemon=True)
        self._saving.start()
        if not self._beside:
            self.wait()

    def wait(self) -> TrainerError | None:
        """Wait for the save that is under way; the fault of the last one, None if it is whole."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        return self._error

    def _save(self, state: dict[str, Tensor], facts: Manifest) -> None:
        folder = self._at(facts.step)
        try:
            with noticing_lost_ranks():
                self._write(folder, state, facts)
            self._error = None
        except (OSError, CheckpointException, TrainerError) as exc:
            # Training goes on: the checkpoints before this one are untouched.
            self._error = exc if isinstance(exc, TrainerError) else _disk_error(folder, exc)
            if self._ranks.rank == 0:
                self._say(f"{self._error}; older checkpoints are untouched, training goes on")

    def _write(self, folder: Path, state: dict[str, Tensor], facts: Manifest) -> None:
        ranks, group = self._ranks, self._ranks.saving
        rank0 = ranks.rank == 0
        ranks.together(lambda: _empty(folder) if rank0 else None, group)
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp_save(state, storage_writer=writer, process_group=group)
        own = ranks.together(lambda: _digest_own(folder, ranks.rank), group)
        found = {
            _shard_name(rank): (fact[:32].hex(), int.from_bytes(fact[32:]))
            for rank, fact in enumerate(ranks.gather(own, group))
            if any(fact)
        }
        files = {name: digest for name, (digest, _) in found.items()}
        sizes = {name: size for name, (_, size) in found.items()}
        # A manifest that lists what rank 0 cannot see would make a checkpoint that never loads.
        ranks.together(lambda: _wait_for(folder, sizes) if rank0 else None, group)
        ranks.together(lambda: _finish(folder, facts, files) if rank0 else None, group)
        ranks.together(lambda: self._prune(facts.step) if rank0 else None, group)

    def _newest_whole(self) -> int:
        """Its step; -1: there are no checkpoints at all; -2: none is whole."""
        steps = checkpoint_steps(self._folder)
        for step in reversed(steps):
            try:
                verify(self._at(step))
            except Damaged as damage:
                self._say(f"{self._at(step)} is not whole ({damage}); looking for an older one")
            else:
                return step
        # A first save that was cut short is no reason to refuse a fresh start.
        unfinished = all(not (self._at(step) / MANIFEST).exists() for step in steps)
        return -1 if unfinished else -2

    def _prune(self, newest: int) -> None:
        failpoint("save.whole")
        if self._limit is None:
            return
        whole = [s for s in checkpoint_steps(self._folder) if (self._at(s) / MANIFEST).exists()]
        kept = set(whole[-self._limit :]) | {newest}
        for step in checkpoint_steps(self._folder):
            if step not in kept:
                # The manifest goes first: half a removal must not look whole.
                (self._at(step) / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(self._at(step))
        failpoint("save.pruned")

    def _at(self, step: int) -> Path:
        return self._folder / f"checkpoint-{step}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the folders that have a checkpoint's name, ascending; whole or not."""
    matches = (_FOLDER.fullmatch(p.name) for p in folder.glob("checkpoint-*") if p.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, its own digest checked.

    Raises:
        Damaged: it is missing, torn, altered, or of a later format.
    """
    try:
        text = (folder / MANIFEST).read_text()
    except OSError as exc:
        raise Damaged(f"{MANIFEST}: {exc.strerror}") from exc
    # The last line is the SHA-256 of all above it, so a manifest cut anywhere is found out.
    body, _, digest = text.rpartition("\n")
    if hashlib.sha256(body.encode()).hexdigest() != digest:
        raise Damaged(f"{MANIFEST} is torn or altered")
    fields = json.loads(body)
    if fields["format"] != FORMAT:
        raise Damaged(f"{MANIFEST} has format {fields['format']}, known is {FORMAT}")
    return Manifest(**fields)


def verify(folder: Path) -> Manifest:
    """Check every file against the manifest, byte for byte.

    Raises:
        Damaged: names the first file that is missing, altered, or not listed.
    """
    manifest = read_manifest(folder)
    for name, digest in manifest.files.items():
        if name != Path(name).name:
            raise Damaged(f"{MANIFEST} names a file elsewhere: {name}")
        try:
            actual = _sha256(folder / name).hex()
        except OSError as exc:
            raise Damaged(f"{name}: {exc.strerror}") from exc
        if actual != digest:
            raise Damaged(f"{name}: its SHA-256 is not the manifest's")
    # DCP's reader opens whatever has the suffix.
    strange = {p.name for p in folder.glob("*.safetensors")} - set(manifest.files)
    if strange:
        raise Damaged(f"{min(strange)} is not in the manifest")
    return manifest


def _copied(tensor: Tensor) -> Tensor:
    """A copy in host memory that later steps do not touch."""
    detached = tensor.detach()
    if not isinstance(detached, DTensor):
        return detached.to("cpu", copy=True)
    return DTensor.from_local(
        detached.to_local().to("cpu", copy=True),
        detached.device_mesh,
        detached.placements,
        run_check=False,
        shape=detached.shape,
        stride=detached.stride(),
    )


def _empty(folder: Path) -> None:
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    failpoint("save.begin")


def _shard_name(rank: int) -> str:
    """The name that DCP's safetensors writer gives a rank's file."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def _digest_own(folder: Path, rank: int) -> bytes:
    """SHA-256 and size (8 bytes) of the file of ``rank``; all zero where it has none."""
    failpoint("save.shards")
    file = folder / _shard_name(rank)
    # A rank whose shards are all replicas of another's writes no file.
    if not file.exists():
        return bytes(40)
    return _sha256(file) + file.stat().st_size.to_bytes(8)


def _wait_for(folder: Path, sizes: Mapping[str, int]) -> None:
    """Return when every file is there, whole, as this host sees the folder."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        # Listed, not looked up: a network file system remembers that a name was not there.
        with os.scandir(folder) as entries:
            seen = {entry.name: entry.stat().st_size for entry in entries if entry.name in sizes}
        missing = sorted(name for name, size in sizes.items() if seen.get(name) != size)
        if not missing:
            return
        if time.monotonic() > deadline:
            raise DiskError(
                f"{folder}: {missing[0]}, which another process has written, is not there as rank 0"
                " sees it; --output_dir must be on a disk that all hosts share"
            )
        time.sleep(0.05)


def _chosen(folder: Path, check: Callable[[Path], Manifest]) -> Manifest:
    if not (folder / MANIFEST).is_file():
        inside = [f"{folder}/checkpoint-{step}" for step in checkpoint_steps(folder)]
        hint = f"; did you mean {inside[-1]}?" if inside else ""
        if (folder / "trainer_state.json").exists() or (folder / "config.json").exists():
            hint = f"; to begin from the weights of another trainer: --model_name_or_path {folder}"
        raise ConfigError(f"--resume {folder}: is no checkpoint of this trainer{hint}")
    try:
        return check(folder)
    except Damaged as damage:
        raise DataError(f"{folder} is not whole ({damage}); choose an older one") from damage


def _sha256(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _finish(folder: Path, facts: Manifest, files: dict[str, str]) -> None:
    failpoint("save.digests")
    body = json.dumps(asdict(facts) | {"files": files}, indent=1, sort_keys=True)
    temporary = folder / f".{MANIFEST}"
    with temporary.open("w") as stream:
        # Written whole and synced under another name: after a power cut the manifest's own name
        # must not stand for an empty file.
        stream.write(f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}")
        stream.flush()
        os.fsync(stream.fileno())
    failpoint("save.manifest")
    temporary.rename(folder / MANIFEST)
    # A rename lasts once its directory is on the disk; the parent holds the checkpoint's name.
    for directory in (folder, folder.parent):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _disk_error(folder: Path, exc: BaseException) -> DiskError:
    reasons = [str(exc)]
    if isinstance(exc, CheckpointException):
        reasons = [str(failure[0]) for failure in exc.failures.values()]
    return DiskError(f"{folder}: could not be written: {reasons[0].strip().splitlines()[-1]}")


def beginning(recipe: dict[str, Any]) -> Manifest:
    """The state of a run that has done no step."""
    return Manifest(
        step=0,
        updates=0,
        tokens=0,
        recipe=recipe,
        world_size=dist.get_world_size(),
        torch=torch.__version__,
        files={},
    )
