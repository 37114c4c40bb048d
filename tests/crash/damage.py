"""Damage to a small store, exhaustively: every bit flipped, the log cut at every byte."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import anyio

from engine.errors import InputError, WoolmillError
from engine.store import RunReader, RunStore
from engine.upkeep.verify import problems
from tests.crash.kills import VIOLATIONS
from tests.engine.store_rows import MANIFEST, answer, decision, fill

WRONG = (
    *VIOLATIONS,
    "wrong_data",
    "tracebacks",
    "unexpected_exit",
    "not_reported",
    "points_not_hit",
    "resent",
    "mutants_missed",
)
"""What must be zero, of all parts."""


def everything(folder: Path) -> tuple[Any, ...]:
    """All that can be read of a run, in values that compare."""
    with RunReader(folder) as run:
        return (
            run.manifest,
            run.counts(),
            run.resume(),
            run.answers(0, 1000),
            list(run.all_answers()),
            list(run.decisions()),
            list(run.decisions(accepted=False)),
            [(d, None if v is None else v.tolist()) for d, v in run.accepted(vectors=True)],
            run.sessions(),
            run.sent_again(),
        )


def flipped_bits(folder: Path, *, every: int, seed: int) -> Counter[str]:
    """Each bit of a closed store (or one in ``every``), flipped alone: true data, or refused by
    name.
    """
    anyio.run(fill, folder / "run", 6)
    path = folder / "run" / "run.sqlite"
    good = path.read_bytes()
    expected = everything(folder / "run")
    rng = random.Random(seed)
    total: Counter[str] = Counter()
    with path.open("r+b", buffering=0) as file:
        for place in range(len(good) * 8):
            if rng.randrange(every):
                continue
            offset, bit = divmod(place, 8)
            file.seek(offset)
            file.write(bytes([good[offset] ^ 1 << bit]))
            total["bits"] += 1
            try:
                total["wrong_data"] += everything(folder / "run") != expected
                total["harmless"] += 1
            except WoolmillError:
                total["refused"] += 1
                if rng.randrange(20) == 0:
                    total["verified"] += 1
                    total["not_reported"] += not list(problems(folder / "run"))
            except Exception:  # noqa: BLE001  that is what is counted
                total["tracebacks"] += 1
            file.seek(offset)
            file.write(good[offset : offset + 1])
    return total


def unclosed_run(folder: Path, commits: int) -> Path:
    """A run as kill -9 leaves it after so many commits, half of them answers: its log is not folded
    in.
    """

    async def write() -> None:
        store = RunStore.open(folder / "run", MANIFEST)
        for i in range(commits // 2):
            await store.answered([answer(i)])
            await store.decided([decision(i, 0)])
        shutil.copytree(folder / "run", folder / "killed")
        await store.aclose()

    anyio.run(write)
    return folder / "killed"


def cut_logs(folder: Path, *, every: int) -> Counter[str]:
    """The log cut, and zero-filled, from each byte on (or one in ``every``): some prefix of the
    commits.
    """
    killed = unclosed_run(folder, 8)
    log = killed / "run.sqlite-wal"
    whole = log.read_bytes()
    total: Counter[str] = Counter()
    opened = set()
    for size in range(0, len(whole) + 1, every):
        for tail in (b"", bytes(len(whole) - size)):
            log.write_bytes(whole[:size] + tail)
            total["cuts"] += 1
            try:
                with RunReader(killed) as run:
                    answers, decisions = run.answers(0, 99), list(run.decisions())
                    commits = run.counts().commits
            except InputError:
                total["refused"] += 1
                continue
            except Exception:  # noqa: BLE001  that is what is counted
                total["tracebacks"] += 1
                continue
            finally:
                (killed / "run.sqlite-shm").unlink(missing_ok=True)
            sound = answers == [answer(i) for i in range(len(answers))]
            sound &= decisions == [decision(i, 0) for i in range(len(decisions))]
            total["wrong_data"] += not sound or commits != len(answers) + len(decisions)
            opened.add(commits)
    total["commits_opened_at"] = len(opened)
    return total
