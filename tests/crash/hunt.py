"""Is every deliberate breakage caught? A mutant that nobody catches is a test that is missing.

A mutant is hunted with the tests that should catch it (they must pass without it and fail with it),
or with kills at failpoints, judged by the checker. It is put into every process by a
``sitecustomize`` of our own, or by the order that a child gets.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.crash.kills import VIOLATIONS, killed_at, uncut_run
from tests.crash.mutants import MUTANTS
from tests.crash.power import CannotMount, power_cuts
from tests.crash.rig import ROOT, Parent
from tests.crash.share import ALONE, Share

STORE, DAMAGE, FAULTS = (f"tests/engine/test_store{name}.py" for name in ("", "_damage", "_faults"))

TESTS = {
    "ignore_checksum": (DAMAGE, "fault_096"),
    "ignore_missing_rows": (DAMAGE, "missed"),
    "ignore_mark": (DAMAGE, "lost_its_log"),
    "ignore_format": (STORE, "fault_098"),
    "ignore_changed_settings": (STORE, "fault_101"),
    "drop_lock": (FAULTS, "fault_110"),
    "inherit_lock": (FAULTS, "fault_111"),
    "no_reserve": (FAULTS, "fault_080"),
    "retry_fsync": (FAULTS, "fault_085"),
    "swallow_disk_errors": (FAULTS, "fault_082"),
    "drop_cancelled": (STORE, "fault_069"),
    "overwrite_answers": (STORE, "fault_114"),
    "accept_on_eof": ("tests/engine", "fault_006 or fault_049"),
    "trust_snapshots": ("tests/engine/test_snapshot.py", "does_not_fit"),
    "log_keys": ("tests/crash", "canary"),
}
"""Mutant: file and ``-k`` of the tests that catch it."""
KILLS: dict[str, Sequence[str]] = {
    "acknowledge_before_commit": ["store.commit:6:kill", "store.commit:9:kill"],
    "send_before_recording": ["answer.arrived:5:kill"],
    "forget_in_flight": ["answer.arrived:5:kill"],
    "ask_again": [f"answer.kept:{n}:kill" for n in (20, 25, 30)],
    "decide_again": ["decision.kept:3:kill"],
    "decide_out_of_order": [],
}
"""Mutant: the failpoints at which its run is killed before it may go on to its end."""


def mutants(folder: Path, share: Share = ALONE) -> Counter[str]:
    """Hunt all; prints what caught each."""
    folder.mkdir(parents=True)
    total: Counter[str] = Counter()
    for name in share.take(list(MUTANTS)):
        try:
            caught = hunt(name, folder / name)
        except CannotMount as exc:
            print(f"  {name:28}SKIPPED: {exc}", flush=True)  # noqa: T201
            total["mutants_skipped"] += 1
            continue
        print(f"  {name:28}{caught or 'MISSED'}", flush=True)  # noqa: T201
        total["mutants_caught"] += bool(caught)
        total["mutants_missed"] += not caught
    return total


def hunt(name: str, folder: Path) -> str:
    """What caught the mutant; empty where nothing did."""
    if name == "no_fsync":
        total = power_cuts(8, folder, seed=1, mutant=name)
        return _wrong(total)
    if name in KILLS:
        folder.mkdir()
        with Parent() as parent:
            uncut = uncut_run(parent, folder / "uncut", target=200, seed=1)
            return _wrong(killed_at(parent, folder / "cut", uncut, KILLS[name], name))
    return _failing_tests(name, *TESTS[name])


def _wrong(total: Counter[str]) -> str:
    return ", ".join(f"{name} {total[name]}" for name in VIOLATIONS if total[name])


def _failing_tests(name: str, path: str, which: str) -> str:
    argv = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    # The mutant imports what pytest would rather have rewritten first.
    argv += ["-W", "ignore::pytest.PytestAssertRewriteWarning", path, "-k", which]
    sound = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if sound.returncode:
        raise RuntimeError(f"{path} -k {which!r} does not pass without a mutant: {sound.stdout}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(
            f"from tests.crash import mutants\nmutants.apply({name!r})\n"
        )
        env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
        broken = subprocess.run(
            argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
    failed = [line for line in broken.stdout.splitlines() if line.startswith("FAILED")]
    return failed[0].split(" - ")[0].removeprefix("FAILED ") if failed else ""
