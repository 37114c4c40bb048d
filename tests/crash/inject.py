"""Errors from the kernel: every write, sync, rename and the like on the store's files fails once.

``strace`` makes the nth call of a kind fail, for each n that an undisturbed run has. The run must
end with an exit code that says so, without a traceback; the store must open; and the run must go on
from there and keep every promise. Needs strace and the right to trace; where that is missing the
part says so and is skipped.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from benchmarks.server import Behaviour
from tests.crash.kills import uncut_run, verdict
from tests.crash.rig import ROOT, LedgerServer, Parent, Trial

CALLS = {
    "pwrite64": ("EIO", "ENOSPC", "EDQUOT"),
    "write": ("EIO", "ENOSPC"),
    "fdatasync": ("EIO",),
    "fsync": ("EIO",),
    "ftruncate": ("EIO",),
    "fallocate": ("ENOSPC", "EIO"),
    "rename": ("EIO", "ENOSPC"),
    "openat": ("EMFILE", "EACCES"),
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
TARGET = 15
EXPECTED = (0, 65, 73, 74, 75)
"""0: the error was in something that can be done without."""


class CannotTrace(Exception):
    """strace is missing or may not trace; says which."""


def injected_errors(folder: Path, *, every: int, seed: int = 0) -> Counter[str]:
    """One run for each call and error, or for one in ``every``. Raises CannotTrace."""
    folder.mkdir(parents=True)
    total: Counter[str] = Counter()
    rng = random.Random(seed)
    with Parent() as parent, LedgerServer(Behaviour(), folder / "other") as other:
        uncut = uncut_run(parent, folder / "uncut", target=TARGET, seed=1)
        probe = Trial(folder / "probe", other.url, TARGET, 4, 1)
        counts = _count(probe)
        if not counts["pwrite64"] or not counts["fdatasync"]:
            raise CannotTrace("strace sees no call on the store's files")
        cases = [
            (call, error, nth)
            for call, errors in CALLS.items()
            for error in errors
            for nth in range(1, counts[call] + 1)
        ]
        for case in cases:
            if rng.randrange(every):
                continue
            total += _case(parent, folder, uncut, *case)
    return total


def _case(
    parent: Parent, folder: Path, uncut: Path, call: str, error: str, nth: int
) -> Counter[str]:
    name = f"{call}-{error}-{nth}"
    total: Counter[str] = Counter(errors=1)
    with LedgerServer(Behaviour(), folder / f"{name}.ledger") as server:
        cut = Trial(folder / name, server.url, TARGET, 4, 1)
        status = _traced(cut, call, "-e", f"inject={call}:error={error}:when={nth}")
        log = (cut.folder / "run.log").read_text(errors="replace")
        total["tracebacks"] += "Traceback" in log
        total["unexpected_exit"] += status not in EXPECTED
        total[f"exit_{status}"] += 1
        parent.start(cut.order("run"))
        cut.status = parent.wait()
    return total + verdict(parent, cut, uncut)


def _count(trial: Trial) -> Counter[str]:
    """Calls of each kind on the store's files in a run without errors."""
    total: Counter[str] = Counter()
    for calls in ("rename", ",".join(call for call in CALLS if call != "rename")):
        out = trial.folder / "calls"
        _traced(trial, calls, "-o", str(out))
        total.update(re.findall(r"^\d+\s+(\w+)\(", out.read_text(), re.MULTILINE))
        shutil.rmtree(trial.folder / "run")
    return total


def _traced(trial: Trial, calls: str, *options: str) -> int:
    """The exit status of the child under strace, which sees ``calls`` on the store's files.

    Renames it sees everywhere: it knows them by the old name only, which is a temporary one.
    """
    files = () if calls == "rename" else FILES
    paths = [f"-P{trial.folder / 'run' / file}" for file in files]
    order = trial.order("run")
    argv = [
        "strace",
        "-f",
        "-qq",
        "--seccomp-bpf",
        "-e",
        f"trace={calls}",
        *paths,
        *options,
    ]
    if "-o" not in options:
        argv += ["-o", "/dev/null"]
    try:
        done = subprocess.run(
            [*argv, sys.executable, "-m", "tests.crash.child", json.dumps(order)],
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
    except FileNotFoundError as exc:
        raise CannotTrace("strace is not installed") from exc
    if "strace:" in done.stderr:
        raise CannotTrace(done.stderr.strip().splitlines()[0])
    return done.returncode
