"""Kill the run, at random and at every failpoint, until it is done; then let the checker judge.

The uncut run that a cut one is compared with has another number of requests in flight and other
faults on the way: what is exported depends on the answers alone.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.server import Behaviour
from engine.failpoints import POINTS
from tests.crash.rig import LedgerServer, Parent, Trial, judge, send_signal, start_and_wait
from tests.crash.share import ALONE, Share

VIOLATIONS = (
    "lost",
    "duplicates",
    "paid_again",
    "resent_unlisted",
    "resent_beyond_in_flight",
    "export_differs",
    "unfinished",
)
"""What must be zero: what the checker counts, and runs that did not get to their end."""

HOSTED = Behaviour(latency_s=0.02, owned_by="somebody", max_model_len=None)
"""As hosted APIs are: no context length is told, so that first calls go alone."""
FAULTY = replace(HOSTED, fault_rate=0.05)
SOUND = HOSTED
KILLS_A_TRIAL = 40
SEEDS = 4


def uncut_run(parent: Parent, folder: Path, *, target: int, seed: int) -> Path:
    """The export of a run that nothing disturbs."""
    with LedgerServer(FAULTY, folder.with_suffix(".ledger")) as server:
        trial = Trial(folder, server.url, target, in_flight=8, seed=seed)
        parent.start(trial.order("run"))
        if status := parent.wait():
            log = (folder / "run.log").read_text()
            raise RuntimeError(f"the uncut run ended with {status}: {log}")
        return trial.export(parent, "run")


def random_kills(
    count: int, folder: Path, share: Share = ALONE, *, seed: int, target: int = 600
) -> Counter[str]:
    """SIGKILL at random times, in trials of many kills each, until ``count`` kills hit."""
    count, rng = share.count(count), random.Random(f"{seed} {share.number}")
    folder.mkdir(parents=True)
    total: Counter[str] = Counter()
    with Parent() as parent:
        seeds = [rng.getrandbits(32) for _ in range(min(SEEDS, 1 + count // 50))]
        uncut = [
            uncut_run(parent, folder / f"uncut{i}", target=target, seed=seed)
            for i, seed in enumerate(seeds)
        ]
        while total["kills"] < count:
            which = rng.randrange(len(seeds))
            name = folder / f"trial{total['trials']}"
            with LedgerServer(FAULTY, name.with_suffix(".ledger")) as server:
                in_flight = rng.choice([16, 32, 64])
                cut = Trial(name, server.url, target, in_flight, seeds[which])
                most = min(count - total["kills"], KILLS_A_TRIAL)
                total += cut_run(parent, cut, rng, most)
            total += verdict(parent, cut, uncut[which])
            total["trials"] += 1
    return total


def cut_run(parent: Parent, cut: Trial, rng: random.Random, most: int) -> Counter[str]:
    """Start the run, kill it, start it again, until it ends by itself."""
    total: Counter[str] = Counter()
    while True:
        if total["kills"] < most:
            send_signal(start_and_wait(parent, cut, rng, 0.3), signal.SIGKILL)
        else:
            parent.start(cut.order("run"))
        cut.status = parent.wait()
        if cut.status != -signal.SIGKILL:
            return total
        total["kills"] += 1


def stops(
    count: int, folder: Path, share: Share = ALONE, *, seed: int, target: int = 400
) -> Counter[str]:
    """SIGINT, SIGTERM and SIGHUP at random times; nothing is lost, and nothing at all is sent
    twice.
    """
    count, rng = share.count(count), random.Random(f"{seed} {share.number}")
    folder.mkdir(parents=True)
    total: Counter[str] = Counter()
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    with Parent() as parent:
        uncut = uncut_run(parent, folder / "uncut", target=target, seed=seed)
        while total["stops"] < count:
            name = folder / f"trial{total['trials']}"
            with LedgerServer(SOUND, name.with_suffix(".ledger")) as server:
                cut = Trial(name, server.url, target, 32, seed)
                stopped = 0
                while True:
                    signum = rng.choice(signals)
                    if stopped < 8:
                        send_signal(start_and_wait(parent, cut, rng, 0.3), signum)
                    else:
                        parent.start(cut.order("run"))
                    cut.status = parent.wait()
                    if cut.status not in (130, 143, -signum):
                        break
                    # Ended by the signal itself: it came before there was anything to lose.
                    total["before_the_run"] += cut.status < 0
                    stopped += 1
            total["stops"] += stopped
            total["trials"] += 1
            total += verdict(parent, cut, uncut)
    total["resent"] = total.pop("resent_in_flight", 0)
    return total


def failpoint_kills(
    folder: Path, share: Share = ALONE, *, nths: tuple[int, ...], twice: bool
) -> Counter[str]:
    """Kill at each point's nth passing; with ``twice`` also at each point of the next start."""
    folder.mkdir(parents=True)
    total: Counter[str] = Counter()
    with Parent() as parent:
        uncut = uncut_run(parent, folder / "uncut", target=200, seed=1)
        for point in share.take(POINTS):
            for nth in nths:
                for second in POINTS if twice and nth == nths[0] else (None,):
                    settings = [f"{point}:{nth}:kill"]
                    settings += [f"{second}:1:kill"] if second else []
                    name = folder / f"{point}-{nth}-{second}"
                    total += killed_at(parent, name, uncut, settings)
    mine = share.take(POINTS)
    total["points_hit"] = sum(total[f"hit {point}"] > 0 for point in mine)
    total["points_not_hit"] = len(mine) - total["points_hit"]
    total["kills"] = sum(total.pop(name) for name in list(total) if name.startswith("hit "))
    return total


def killed_at(
    parent: Parent, folder: Path, uncut: Path, settings: Sequence[str], mutant: str | None = None
) -> Counter[str]:
    """One run of seed 1, started once for each failpoint setting and then left alone."""
    total: Counter[str] = Counter()
    with LedgerServer(FAULTY, folder.with_suffix(".ledger")) as server:
        cut = Trial(folder, server.url, 200, 16, 1, mutant)
        for setting in settings:
            parent.start(cut.order("run", setting))
            point = setting.partition(":")[0]
            total[f"hit {point}"] += was_killed(point, parent.wait(), folder)
        parent.start(cut.order("run"))
        cut.status = parent.wait()
    return total + verdict(parent, cut, uncut)


def was_killed(point: str, status: int, folder: Path) -> bool:
    """Whether a start passed the point: the run was killed there, or the process that decides, of
    which the run speaks.
    """
    if point.startswith("index."):
        return "ended by SIGKILL" in (folder / "run.log").read_text(errors="replace")
    return status == -signal.SIGKILL


def verdict(parent: Parent, cut: Trial, uncut: Path) -> Counter[str]:
    """What the checker says, and whether the run got to its end; a clean trial leaves no files."""
    if cut.status != 0:
        return Counter(unfinished=1)
    ledger = cut.folder.with_suffix(".ledger")
    total = Counter(judge(ledger, cut.acks("run"), cut.export(parent, "run"), uncut))
    if not any(total[name] for name in VIOLATIONS):
        shutil.rmtree(cut.folder)
        ledger.unlink()
    return total
