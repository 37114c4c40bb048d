"""Power cuts: what the disk holds at an instant, without the memory of the kernel above it.

The run lives on an ext4 file system inside an image file. At a random time the process is stopped
and the image is copied as the block device has it: pages that were written to files and not yet
synced are missing, as after a power cut. The run goes on from the copy, journal recovery included.
What a drive does that loses writes from its own cache is not shown; SQLite asks for the cache to be
flushed, which a loop device does with fdatasync.

Needs root and loop devices. Where they are missing the part says so and is skipped.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

from tests.crash.kills import FAULTY, KILLS_A_TRIAL, uncut_run, verdict
from tests.crash.rig import LedgerServer, Parent, Trial, send_signal, start_and_wait
from tests.crash.share import ALONE, Share

IMAGE_MIB = 96
BUSY_S = 10.0


class CannotMount(Exception):
    """No root, no loop device, or no mkfs.ext4; says which."""


class Disk:
    """An ext4 image, mounted at ``mount``."""

    def __init__(self, folder: Path) -> None:
        self.image = folder / "disk.img"
        self.mount = folder / "disk"
        self.mount.mkdir(parents=True)
        with self.image.open("wb") as file:
            file.truncate(IMAGE_MIB << 20)
        _command("mkfs.ext4", "-q", "-F", str(self.image))
        _command("mount", "-o", "loop", str(self.image), str(self.mount))

    def copy(self) -> Path:
        """The image at one instant: copied until two copies in a row agree."""
        first, second = (self.image.with_suffix(suffix) for suffix in (".1", ".2"))
        while True:
            for path in (first, second):
                subprocess.run(["cp", "--sparse=always", self.image, path], check=True)
            if subprocess.run(["cmp", "-s", first, second], check=False).returncode == 0:
                second.unlink()
                return first

    def become(self, copy: Path) -> None:
        """Take ``copy`` for the disk, as after the power is back."""
        self.close()
        copy.replace(self.image)
        _command("mount", "-o", "loop", str(self.image), str(self.mount))

    def close(self) -> None:
        """Take it out, as soon as no process is left that reads from it: the one that decides ends
        a moment after the run.
        """
        deadline = time.monotonic() + BUSY_S
        while True:
            try:
                return _command("umount", str(self.mount))
            except CannotMount as exc:
                if "busy" not in str(exc) or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)


def _command(*argv: str) -> None:
    try:
        subprocess.run(argv, check=True, capture_output=True, text=True)
    except FileNotFoundError as exc:
        raise CannotMount(f"{argv[0]} is not installed") from exc
    except subprocess.CalledProcessError as exc:
        raise CannotMount(f"{' '.join(argv[:3])}: {exc.stderr.strip()}") from exc


def power_cuts(
    count: int,
    folder: Path,
    share: Share = ALONE,
    *,
    seed: int,
    target: int = 600,
    mutant: str | None = None,
) -> Counter[str]:
    """Cut the power ``count`` times, in trials of many cuts each. Raises CannotMount."""
    count, rng = share.count(count), random.Random(f"{seed} {share.number}")
    folder.mkdir(parents=True)
    total: Counter[str] = Counter()
    with Parent() as parent:
        uncut = uncut_run(parent, folder / "uncut", target=target, seed=seed)
        while total["cuts"] < count:
            name = folder / f"trial{total['trials']}"
            disk = Disk(folder / f"disk{total['trials']}")
            try:
                with LedgerServer(FAULTY, name.with_suffix(".ledger")) as server:
                    cut = Trial(name, server.url, target, 32, seed, mutant)
                    most = min(count - total["cuts"], KILLS_A_TRIAL)
                    total += _cut_run(parent, cut, disk, rng, most)
                total += verdict(parent, cut, uncut)
            finally:
                disk.close()
            total["trials"] += 1
    return total


def _cut_run(parent: Parent, cut: Trial, disk: Disk, rng: random.Random, most: int) -> Counter[str]:
    total: Counter[str] = Counter()
    (disk.mount / "run").mkdir()
    (cut.folder / "run").symlink_to(disk.mount / "run")
    _command("sync", "-f", str(disk.mount))
    while True:
        if total["cuts"] < most:
            pid = start_and_wait(parent, cut, rng, 0.3)
            send_signal(pid, signal.SIGSTOP)
            copy = disk.copy()
            send_signal(pid, signal.SIGKILL)
        else:
            parent.start(cut.order("run"))
        cut.status = parent.wait()
        if cut.status != -signal.SIGKILL:
            return total
        total["cuts"] += 1
        disk.become(copy)
