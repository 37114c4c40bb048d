"""Runs that are killed again and again, and one that nobody disturbs."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

__all__ = ["run_with_kills"]

ROOT = Path(__file__).parents[2]


def run_with_kills(
    folder: Path,
    settings: dict[str, Any],
    *,
    kills: int,
    flags: Sequence[str] = ("--no-semantic",),
) -> tuple[Path, Path]:
    """The folders of two runs of the same settings, both at their end: one in peace, and one that
    was killed with SIGKILL about ``kills`` times, wherever it was in a part of its way.
    """

    def command(out: str) -> list[str]:
        config = folder / f"{out}.toml"
        given = {"backend": "scripted", "out": str(folder / out), **settings}
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in given.items()]
        config.write_text("".join(lines))
        more = ["--config", str(config), "--no-progress", *flags]
        return [sys.executable, "-m", "engine", "generate", *more]

    def to_the_end(out: str) -> Path:
        run = subprocess.run(command(out), env=env, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return folder / out

    env = os.environ | {"PYTHONPATH": str(ROOT)}
    whole, out = to_the_end("whole"), folder / "killed"
    total = written(whole)
    draw, killed = random.Random(5), 0
    while killed < kills:
        # How far it comes, and not for how long it runs: no machine is too fast or too slow.
        enough = written(out) + draw.uniform(0, 2 / kills) * total
        run = subprocess.Popen(
            command("killed"), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while run.poll() is None and written(out) < enough:
            time.sleep(0.02)
        if run.poll() is not None:
            break
        run.send_signal(signal.SIGKILL)
        run.wait()
        killed += 1
    assert total
    assert killed >= kills / 2
    return whole, to_the_end("killed")


def written(folder: Path) -> int:
    """The answers in a run's store and in those of its stages."""
    return sum(map(answers, folder.rglob("run.sqlite")))


def answers(store: Path) -> int:
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True, timeout=60)) as database:
        try:
            return int(database.execute("SELECT count(*) FROM answer").fetchone()[0])
        except sqlite3.OperationalError:  # it was made a moment ago
            return 0
