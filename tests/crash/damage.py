"""Damage to a small store, exhaustively: every bit flipped, the log cut at every byte."""

from __future__ import annotations

import mmap
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import numpy as np

from engine.errors import InputError, WoolmillError
from engine.store import RunReader, RunStore
from engine.upkeep.verify import problems
from tests.crash.kills import VIOLATIONS
from tests.crash.share import ALONE, Share
from tests.engine.store_rows import MANIFEST, answer, decision, prompt

WRONG = (
    *VIOLATIONS,
    "wrong_data",
    "tracebacks",
    "unexpected_exit",
    "not_reported",
    "calls_missed",
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


def smallest_run(folder: Path) -> Path:
    """A closed run with the fewest rows that there can be of all kinds: one answered, one decided
    each way, one vector, one in flight and sent again. SQLite needs a page for each table and
    index.
    """

    async def write() -> None:
        prompts = [prompt(0), prompt(1)]
        store = RunStore.open(folder, MANIFEST)
        await store.sent(prompts, "m")
        await store.answered([answer(0)])
        pair = [decision(0, 0), decision(0, 1, "rouge_l")]
        await store.decided(pair, [np.ones(4, np.float32), None])
        await store.aclose()
        store = RunStore.open(folder, MANIFEST)
        await store.sent(prompts[1:], "m")
        await store.aclose()

    anyio.run(write)
    return folder


def flipped_bits(
    original: Path, folder: Path, share: Share = ALONE, *, every: int = 1
) -> Counter[str]:
    """Each bit of a closed store (or one in ``every``), flipped alone: true data, or refused by
    name. What is refused, ``verify`` must name too.
    """
    run = Path(shutil.copytree(original, folder))
    expected = everything(run)
    total: Counter[str] = Counter()
    # SQLite reads with pread, from the same pages of the kernel's that are mapped here.
    with (run / "run.sqlite").open("r+b") as file, mmap.mmap(file.fileno(), 0) as image:
        for place in share.take(range(0, len(image) * 8, every)):
            offset, bit = divmod(place, 8)
            image[offset] ^= 1 << bit
            total["bits"] += 1
            try:
                total["wrong_data"] += everything(run) != expected
                total["harmless"] += 1
            except WoolmillError:
                total["refused"] += 1
                total["not_reported"] += next(problems(run), None) is None
            except Exception:  # noqa: BLE001  that is what is counted
                total["tracebacks"] += 1
            image[offset] ^= 1 << bit
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


def cut_logs(original: Path, folder: Path, share: Share = ALONE, *, every: int = 1) -> Counter[str]:
    """The log cut, and zero-filled, from each byte on (or one in ``every``): some prefix of the
    commits. Each commit that is opened at is counted as ``commit_N``.
    """
    killed = Path(shutil.copytree(original, folder))
    total: Counter[str] = Counter()
    with (killed / "run.sqlite-wal").open("r+b") as log:
        length = log.seek(0, 2)
        # From the end to the start: what is before the cut is still as it was.
        for size in share.take(range(length, -1, -every)):
            log.truncate(size)
            total += _opened(killed)
            log.truncate(length)
            total += _opened(killed)
    return total


def _opened(killed: Path) -> Counter[str]:
    total = Counter(cuts=1)
    try:
        with RunReader(killed) as run:
            answers, decisions = run.answers(0, 99), list(run.decisions())
            commits = run.counts().commits
    except InputError:
        total["refused"] = 1
        return total
    except Exception:  # noqa: BLE001  that is what is counted
        total["tracebacks"] = 1
        return total
    finally:
        (killed / "run.sqlite-shm").unlink(missing_ok=True)
    sound = answers == [answer(i) for i in range(len(answers))]
    sound &= decisions == [decision(i, 0) for i in range(len(decisions))]
    total["wrong_data"] = not sound or commits != len(answers) + len(decisions)
    total[f"opened_at_{commits}"] = 1
    return total
