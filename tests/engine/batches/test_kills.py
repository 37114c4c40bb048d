"""Runs in batches that are killed at every step, again and again: nothing is paid twice, nothing
that was acknowledged is lost, and the dataset is that of a live run.

``python -m tests.engine.batches.test_kills 200`` kills more often.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from engine.store import RunReader
from tests.engine.batches.runs import exported, generate, live_export
from tests.engine.batches.shapes import PROVIDERS
from tests.engine.batches.world import Provider

pytestmark = pytest.mark.slow

POINTS = (
    *("batch.recorded", "batch.uploaded", "batch.creating", "batch.created", "batch.open"),
    *("batch.downloaded", "answer.arrived", "batch.kept", "batch.collected", "batch.deleted"),
)


def killed_run(kind: type[Provider], folder: Path, points: list[str]) -> int:
    """A run that is killed at each of these points in turn, and wants more rows after each; how
    often it was. What must hold is checked after each kill.
    """
    out, kills = folder / "run", 0
    acknowledged: set[int] = set()
    with kind(listed_late=1, twice=2) as provider:
        for number, point in enumerate([*points, ""]):
            armed, target = f"{point}:1:kill" if point else "", 12 * (number + 1)
            run = generate(provider, out, failpoint=armed, target=target)
            if run.returncode == -signal.SIGKILL:
                kills += 1
            else:
                assert run.returncode == 0, (point, run.stderr)
            if (out / "run.sqlite").exists():
                with RunReader(out) as store:
                    here = {answer.index for answer, _ in store.all_answers()}
                    assert store.counts().wasted == 0
                assert acknowledged <= here, "an acknowledged answer is gone"
                acknowledged = here
            assert set(provider.paid.values()) <= {1}, f"paid twice, after {point}"
        assert len(acknowledged) == sum(provider.paid.values()), "an answer was paid in vain"
        assert exported(out) == live_export(provider, folder / "live", target=target)
    return kills


SHAPES = [kind for kind in PROVIDERS if kind.name in ("openai", "anthropic", "gemini")]
"""The others' APIs are like the first one's, and main() kills at all of them."""


@pytest.mark.parametrize("kind", SHAPES, ids=lambda kind: kind.name)
@pytest.mark.timeout(180)
def test_a_run_killed_at_each_step(kind: type[Provider], tmp_path: Path) -> None:
    points = [point for point in POINTS if point != "batch.uploaded" or kind.name != "anthropic"]
    assert killed_run(kind, tmp_path, points) >= 8


def main(wanted: int) -> None:
    """Kill at points drawn at random until it was often enough."""
    draw, kills, runs = random.Random(23), 0, 0
    while kills < wanted:
        kind = PROVIDERS[runs % len(PROVIDERS)]
        with tempfile.TemporaryDirectory() as folder:
            kills += killed_run(kind, Path(folder), draw.choices(POINTS, k=12))
        runs += 1
        sys.stdout.write(f"{kills} kills in {runs} runs, the last at {kind.name}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
