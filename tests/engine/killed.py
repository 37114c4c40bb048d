"""Runs that are killed again and again, and one that nobody disturbs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["run_with_kills"]

ROOT = Path(__file__).parents[2]


def run_with_kills(
    folder: Path, settings: dict[str, Any], *, most: int, after_s: float, at_least: int
) -> tuple[Path, Path]:
    """The folders of two runs of the same settings, both at their end: one in peace, and one that
    was killed with SIGKILL up to ``most`` times, ``after_s`` to a second more after each start.
    """

    def command(out: str) -> list[str]:
        config = folder / f"{out}.toml"
        given = {"backend": "scripted", "out": str(folder / out), **settings}
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in given.items()]
        config.write_text("".join(lines))
        flags = ["--config", str(config), "--no-semantic", "--no-progress"]
        return [sys.executable, "-m", "engine", "generate", *flags]

    def to_the_end(out: str) -> Path:
        run = subprocess.run(command(out), env=env, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return folder / out

    env = os.environ | {"PYTHONPATH": str(ROOT)}
    whole = to_the_end("whole")
    draw, killed = random.Random(5), 0
    while killed < most:
        run = subprocess.Popen(
            command("killed"), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(after_s + draw.random())  # what is killed is to be anywhere
        if run.poll() is not None:
            break
        run.send_signal(signal.SIGKILL)
        run.wait()
        killed += 1
    assert killed >= at_least
    return whole, to_the_end("killed")
