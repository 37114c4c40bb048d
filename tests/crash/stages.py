"""Runs of several stages, killed at random and at every failpoint.

Each is compared with a run of one call in flight that nothing disturbs; the killed one has 64 in
flight, on two endpoints, and one call in five fails.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from engine.failpoints import POINTS
from tests.crash import staged
from tests.crash.kills import HOSTED, cut_run, verdict
from tests.crash.rig import LedgerServer, Parent, Trial
from tests.crash.share import ALONE, Share

SOUND = replace(HOSTED, answer=staged.words, latency_spread=0.9)
FAULTY = replace(SOUND, fault_rate=0.2)
ROWS = 120
KINDS = {"Chain": 300, "Rounds": None, "Votes": None, "Pools": 400}
"""Recipe: rows wanted; None: of every input row."""

__all__ = ["kills", "points"]


def kills(count: int, folder: Path, share: Share = ALONE, *, seed: int) -> Counter[str]:
    """Each kind of run killed ``count`` times at random moments, and then left to its end."""
    total: Counter[str] = Counter()
    with Parent() as parent:
        for kind in share.take(list(KINDS)):
            uncut = undisturbed(parent, folder / kind, kind)
            rng, done = random.Random(f"{seed} {kind}"), 0
            while done < count:
                name = folder / kind / f"trial{done}"
                with ExitStack() as stack:
                    cut = trial(stack, name, kind)
                    killed = cut_run(parent, cut, rng, count - done)
                total += killed + verdict(parent, cut, uncut)
                done += killed["kills"]
    return total


def points(folder: Path, share: Share = ALONE, *, nths: tuple[int, ...]) -> Counter[str]:
    """Each kind of run killed at each failpoint's nth passing, whichever stage passes it."""
    total: Counter[str] = Counter()
    with Parent() as parent:
        for kind in share.take(list(KINDS)):
            uncut = undisturbed(parent, folder / kind, kind)
            hit = set()
            for point in POINTS:
                for nth in nths:
                    name = folder / kind / f"{point}-{nth}"
                    with ExitStack() as stack:
                        cut = trial(stack, name, kind)
                        parent.start(cut.order("run", f"{point}:{nth}:kill"))
                        if parent.wait() < 0:
                            total["kills"] += 1
                            hit.add(point)
                        parent.start(cut.order("run"))
                        cut.status = parent.wait()
                    total += verdict(parent, cut, uncut)
            total["points_not_hit"] += len(POINTS) - len(hit)
    return total


def undisturbed(parent: Parent, folder: Path, kind: str) -> Path:
    """The export of a run of one call in flight without a fault."""
    folder.mkdir(parents=True)
    with LedgerServer(SOUND, folder / "uncut.ledger") as server:
        alone = Trial(folder / "uncut", server.url, KINDS[kind], 1, seed=1, more=told(folder, kind))
        parent.start(alone.order("run"))
        if status := parent.wait():
            log = (folder / "uncut" / "run.log").read_text()
            raise RuntimeError(f"the uncut run ended with {status}: {log}")
        return alone.export(parent, "run")


def trial(stack: ExitStack, name: Path, kind: str) -> Trial:
    """A run of 64 in flight on two endpoints, which share a ledger."""
    ledger = name.with_suffix(".ledger")
    first, second = (stack.enter_context(LedgerServer(FAULTY, ledger)) for _ in range(2))
    more = (f"--base-url={second.url}", *told(name.parent, kind))
    return Trial(name, first.url, KINDS[kind], 64, seed=1, more=more)


def told(folder: Path, kind: str) -> tuple[str, ...]:
    recipe = f"--recipe={Path(staged.__file__)}:{kind}"
    if KINDS[kind] is not None:
        return (recipe,)
    rows = folder / "rows.jsonl"
    if not rows.exists():
        texts = [f"Text number {n} of many" for n in range(ROWS)]
        lines = [json.dumps({"instruction": text, "input": "", "output": ""}) for text in texts]
        rows.write_text("\n".join(lines), encoding="utf-8")
    return (recipe, f"--rows={rows}")
