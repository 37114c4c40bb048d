"""Errors from the kernel: every write, sync, rename and the like on the store's files fails once.

``strace`` makes the nth call of a kind fail in one of the two threads that make them (the main one
and the store's writer), for each n that there is: it goes on until there was no nth call. The run
must end with an exit code that says so, without a traceback; the store must open; and the run must
go on from there and keep every promise. Needs strace and the right to trace; where that is missing
the part says so and is skipped.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

from benchmarks.server import Behaviour
from tests.crash.child import NOT_TRACED
from tests.crash.kills import uncut_run, verdict
from tests.crash.rig import LedgerServer, Parent, Trial
from tests.crash.share import ALONE, Share

CALLS = {
    "pwrite64": ("EIO", "ENOSPC", "EDQUOT"),
    "write": ("EIO", "ENOSPC"),
    "fdatasync": ("EIO",),
    "fsync": ("EIO",),
    "ftruncate": ("EIO",),
    "fallocate": ("ENOSPC", "EIO"),
    "rename": ("EIO", "ENOSPC"),
    "openat": ("EMFILE", "EACCES", "EROFS"),
}
"""System calls and the errors that they are made to end with."""
FILES = (
    "run.sqlite",
    "run.sqlite-wal",
    "run.sqlite-shm",
    "run.lock",
    "run.reserve",
    "alpaca_data.json",
    "",
)
"""In the run's folder; the last is the folder."""
THREADS = ("main", "writer")
TARGET = 2
EXPECTED = (0, 65, 73, 74, 75)
"""0: the error was in something that can be done without."""


class CannotTrace(Exception):
    """strace is missing or may not trace; says which."""


def injected_errors(
    folder: Path,
    share: Share = ALONE,
    *,
    every: int = 1,
    calls: Mapping[str, Sequence[str]] = CALLS,
) -> Counter[str]:
    """One run for each call and error, or for one in ``every``. Raises CannotTrace."""
    folder.mkdir(parents=True)
    total: Counter[str] = Counter()
    with Parent() as parent:
        uncut = uncut_run(parent, folder / "uncut", target=TARGET, seed=1)
        if share.number == 0:
            total["calls_missed"] = _other_threads(parent, folder / "probe")
        for thread in THREADS:
            for call, errors in calls.items():
                for error in errors:
                    for nth in count(1 + share.number * every, share.of * every):
                        hit = _case(parent, folder, uncut, thread, call, error, nth)
                        if hit is None:
                            break
                        total += hit
                        total[f"{call}s"] += 1
    return total


def _case(
    parent: Parent, folder: Path, uncut: Path, thread: str, call: str, error: str, nth: int
) -> Counter[str] | None:
    """One failed call and what came of it; None where the run makes fewer such calls."""
    name = f"{thread}-{call}-{error}-{nth}"
    total: Counter[str] = Counter(errors=1)
    with LedgerServer(Behaviour(), folder / f"{name}.ledger") as server:
        cut = Trial(folder / name, server.url, TARGET, 1, 1)
        inject = f"inject={call}:error={error}:when={nth}"
        status, seen = _traced(parent, cut, thread, [call], "-e", inject)
        if "(INJECTED)" not in seen:
            shutil.rmtree(cut.folder)
            return None
        log = (cut.folder / "run.log").read_text(errors="replace")
        total["tracebacks"] += "Traceback" in log
        total["unexpected_exit"] += status not in EXPECTED
        total[f"exit_{status}"] += 1
        parent.start(cut.order("run"))
        cut.status = parent.wait()
    return total + verdict(parent, cut, uncut)


def _other_threads(parent: Parent, folder: Path) -> int:
    """How many threads besides the two make such calls in a run without errors; those of the
    process that decides are looked at too.
    """
    with LedgerServer(Behaviour(), folder.with_suffix(".ledger")) as server:
        probe = Trial(folder, server.url, TARGET, 1, 1)
        calls = [call for call in CALLS if call not in ("openat", "rename")]
        status, seen = _traced(parent, probe, "main", calls, "-f")
    lines = [line for line in seen.splitlines() if "(" in line.split()[1]]  # not how one ended
    threads = {line.split()[0] for line in lines}
    if status or len(threads) < len(THREADS):
        raise CannotTrace(f"strace sees no writer; the run ended with {status}")
    return len(threads) - len(THREADS)


def _traced(
    parent: Parent, trial: Trial, thread: str, calls: Sequence[str], *options: str
) -> tuple[int, str]:
    """The exit status of a child one of whose threads is under strace, and what that saw: ``calls``
    on the store's files.

    Renames it sees everywhere: it knows them by the old name only, which is a temporary one.
    """
    files = () if "rename" in calls else FILES
    paths = [f"-P{trial.folder / 'run' / file}" for file in files]
    seen, at = trial.folder / "seen", trial.folder / "thread"
    parent.start(trial.order("run") | {"traced": thread, "thread": str(at)})
    while not at.exists() or not at.read_text().endswith("\n"):
        time.sleep(0.001)
    argv = ["strace", "-qq", "-o", str(seen), "-e", f"trace={','.join(calls)}", *paths, *options]
    try:
        done = subprocess.run(
            [*argv, "-p", at.read_text().strip()], check=False, capture_output=True, text=True
        )
        said = done.stderr.strip()
    except FileNotFoundError:
        said = "strace is not installed"
    status = parent.wait()
    if status == NOT_TRACED:
        raise CannotTrace(said)
    return status, seen.read_text()
