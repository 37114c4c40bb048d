"""Kill a loop at every step's border and at random moments, and compare with one that nobody cut.

    python -m tests.crash.loops [--kills 50] [--seed 0] [--folder DIR] [--no-borders]

The model answers in the loop's own process and is trained by the real trainer. It is tiny. What
must be the same, byte for byte: the ledger, every round's rows, the model that was kept last.
Another ``--seed`` in the same ``--folder`` adds kills at other moments; ``--no-borders`` leaves the
borders out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import models
from engine.failpoints import POINTS
from tests.engine.tiny_models import save_llama

__all__ = ["BORDERS", "Rig", "differences"]

ROOT = Path(__file__).resolve().parents[2]
BORDERS = tuple(name for name in POINTS if name.startswith("loop."))
KILLED = (
    "import sys; from engine import failpoints; failpoints.arm(sys.argv.pop(1) or None);"
    "from engine.cli.main import main; main()"
)
RECIPE = """
[recipe]
name = "babble"
compare = "{{ instruction }}"
[stage]
user = "Say something about {{ thing }}."
give = { instruction = "{{ text }}", output = "{{ text }} {{ thing }}" }
sampling = { temperature = 1.0, max_tokens = 48, stop = ["e"] }
"""
TRAIN = {
    "max_steps": 4,
    "save_steps": 1,
    "global_batch_size": 2,
    "per_device_train_batch_size": 1,
    "model_max_length": 384,
    "learning_rate": 1e-3,
}
OWN = ("metrics.jsonl", ".lock")
"""Of a model's folder: times, and nothing."""


class Rig:
    """A tiny model, rows and a recipe in a folder, and loops over them."""

    def __init__(self, folder: Path, *, rounds: int = 2, backend: str = "transformers") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        model = folder / "tiny"
        if not model.is_dir():
            made = folder / "making"
            shutil.rmtree(made, ignore_errors=True)
            sizes = {"max_position_embeddings": 512, "hidden_size": 16, "intermediate_size": 24}
            save_llama(made, Path(models.locate("smollm2")), **sizes).rename(model)
        (folder / "recipe.toml").write_text(RECIPE)
        rows = [json.dumps({"thing": f"thing {i}"}) for i in range(200)]
        (folder / "rows.jsonl").write_text("\n".join(rows))
        generate = {
            "recipe": str(folder / "recipe.toml"),
            "rows": str(folder / "rows.jsonl"),
            "backend": backend,
            "target": 12,
            "semantic": False,
        }
        lines = [f"rounds = {rounds}", f'model = "{model}"', "held_out = 5", "keep = 1"]
        for name, table in (("generate", generate), ("train", TRAIN)):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(v)}" for key, v in table.items())]
        (folder / "loop.toml").write_text("\n".join(lines))

    def start(self, out: str, failpoint: str = "") -> subprocess.Popen[bytes]:
        """Start the loop ``out``, or go on with it."""
        flags = ["--config", str(self.folder / "loop.toml"), "--out", str(self.folder / out)]
        with (self.folder / f"{out}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", KILLED, failpoint, "loop", *flags],
                env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def to_the_end(self, out: str) -> Path:
        """The folder of the loop ``out`` when it is finished."""
        process = self.start(out)
        assert process.wait() == 0, (self.folder / f"{out}.log").read_text()
        return self.folder / out

    def killed_at(self, out: str, borders: Sequence[str]) -> int:
        """Kill the loop ``out`` at each of ``borders``, and go on; at how many it was killed."""
        hit = 0
        for point in borders:
            status = self.start(out, f"{point}:1:kill").wait()
            assert status in (0, -signal.SIGKILL), (self.folder / f"{out}.log").read_text()
            hit += status == -signal.SIGKILL
        return hit


def differences(one: Path, other: Path) -> list[str]:
    """Which files of what must be the same are not: none, if all is well."""
    mine, theirs = _contents(one), _contents(other)
    return sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))


def _contents(folder: Path) -> dict[str, bytes]:
    paths = [folder / "ledger.jsonl", *folder.glob("people/*"), *folder.glob("round-*/data/*")]
    paths += [path for path in folder.glob("round-*/model/*/*") if path.name not in OWN]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def kills(rig: Rig, wanted: int, seed: int) -> dict[str, Any]:
    """Kill loops at random moments, ``wanted`` times; each is compared at its end."""
    began = time.monotonic()
    whole = rig.folder / "whole"
    if not whole.is_dir():
        rig.to_the_end("whole")
        (rig.folder / "takes").write_text(str(time.monotonic() - began))
    takes_s = float((rig.folder / "takes").read_text())
    draw, killed, finished, wrong = random.Random(seed), 0, 0, []
    out = f"cut-{seed}"
    while killed < wanted:
        shutil.rmtree(rig.folder / out, ignore_errors=True)
        while killed < wanted:
            process = rig.start(out)
            try:
                status = process.wait(draw.uniform(0.02, 0.35) * takes_s)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            if status == 0:
                break
            assert status == -signal.SIGKILL, (rig.folder / f"{out}.log").read_text()
            killed += 1
        rig.to_the_end(out)
        finished += 1
        wrong += differences(whole, rig.folder / out)
    return {"kills": killed, "loops": finished, "differences": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.loops", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="[a temporary folder]")
    parser.add_argument("--no-borders", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rig = Rig(args.folder or Path(temporary))
        result = kills(rig, args.kills, args.seed)
        if not args.no_borders:
            shutil.rmtree(rig.folder / "borders", ignore_errors=True)
            result["borders"] = rig.killed_at("borders", BORDERS)
            result["differences"] += differences(rig.folder / "whole", rig.to_the_end("borders"))
    print(json.dumps(result))  # noqa: T201
    sys.exit(bool(result["differences"]) or result.get("borders", len(BORDERS)) < len(BORDERS))


if __name__ == "__main__":
    main()
