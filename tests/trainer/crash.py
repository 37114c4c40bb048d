"""Kill training at random moments, many times, and compare with a run that nothing cut.

    python -m tests.trainer.crash [--kills 50] [--seed 0]

Each round starts the command on one or two ranks, kills every rank with SIGKILL after a random
time, and resumes. What is left after the last kill runs to its end; then a new run begins, until
enough kills have happened. Every finished curve must be the uncut one, bit for bit.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path

from tests.trainer.conftest import make_model_folder, make_tokenizer, toy_records, write_records
from tests.trainer.launch import curve, finish, start

__all__ = ["crash"]

STEPS = 16


def crash(folder: Path, kills: int, seed: int) -> int:
    """Kill ``kills`` times in ``folder``; how many runs were finished, each compared.

    Raises:
        AssertionError: a run ended otherwise than by our kill, or with another curve.
    """
    chance = random.Random(seed)
    model = make_model_folder("opt", folder / "model", make_tokenizer())  # it has dropout
    data = write_records(folder / "data.json", toy_records(40))
    arguments = [
        *("--model_name_or_path", str(model), "--data_path", str(data)),
        *("--dataset_cache_dir", str(folder / "cache"), "--max_steps", str(STEPS)),
        *("--global_batch_size", "4", "--per_device_train_batch_size", "1"),
        *("--model_max_length", "200", "--learning_rate", "3e-3", "--save_steps", "2"),
        *("--save_total_limit", "2", "--resume", "--output_dir"),
    ]
    takes_s = 0.0
    for name in ("first", "whole"):  # the first waits for the fork server's imports too
        started = time.monotonic()
        (done,) = finish(start([*arguments, str(folder / name)], folder / "logs"))
        assert done.exit_code == 0, done.output
        takes_s = time.monotonic() - started
    expected = curve(folder / "whole")

    finished = 0
    while kills > 0:
        out = folder / "cut"
        while kills > 0:
            run = start([*arguments, str(out)], folder / "logs", ranks=chance.choice([1, 2]))
            deadline = time.monotonic() + chance.uniform(0.2, 1.1) * takes_s
            for process in run.processes:
                process.join(max(0.0, deadline - time.monotonic()))
            alive = [process for process in run.processes if process.exitcode is None]
            for process in alive:
                process.kill()
            ends = finish(run)
            if not alive:
                assert {end.exit_code for end in ends} == {0}, [end.output for end in ends]
                break
            kills -= 1
        (done,) = finish(start([*arguments, str(out)], folder / "logs"))
        assert done.exit_code == 0, done.output
        assert curve(out) == expected
        shutil.rmtree(out)
        finished += 1
    return finished


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        finished = crash(Path(folder), arguments.kills, arguments.seed)
    print(f"{arguments.kills} kills, {finished} runs finished, every curve bitwise the uncut one")  # noqa: T201


if __name__ == "__main__":
    main()
