"""Seed tasks apart: some for demonstrations and training, some to measure by and never seen.

The held-out tasks are people's, not the model's, and none of the others is close to them: a task
that a model was shown in other words would measure memory. They are drawn by a hash of their text,
so that the order of the file does not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from engine.dedup.rouge import rouge_l_of_tokens, tokenize
from engine.errors import ConfigError
from engine.export.split import ROUGE_LINK
from engine.files import new_folder
from engine.languages import detect
from engine.recipes.seeds import as_lines, bundled_seeds, read_seeds
from engine.records import SeedTask

__all__ = ["HELD_OUT", "SHOWN", "apart", "set_apart"]

SHOWN, HELD_OUT = "shown.jsonl", "held_out.jsonl"


def set_apart(seeds: Path | None, count: int, folder: Path) -> None:
    """Write both parts into ``folder``, which appears whole. Raises InputError, ConfigError."""
    shown, held_out = apart(read_seeds(seeds or bundled_seeds()), count)
    with new_folder(folder) as made:
        (made / SHOWN).write_bytes(as_lines(shown))
        (made / HELD_OUT).write_bytes(as_lines(held_out))


def apart(tasks: Sequence[SeedTask], count: int) -> tuple[list[SeedTask], list[SeedTask]]:
    """The tasks to show, and ``count`` to hold out, each in the order of ``tasks``.

    Raises ConfigError where there are not so many that stand apart from all others.
    """
    language = detect(f"{task.instruction}\n{task.input}" for task in tasks)
    words = [tokenize(task.instruction, language) for task in tasks]
    held_out: set[int] = set()
    for place in sorted(range(len(tasks)), key=lambda place: _chance(tasks[place])):
        if len(held_out) == count:
            break
        if not any(_close(words[place], others) for others in words if others is not words[place]):
            held_out.add(place)
    if len(held_out) < count or len(held_out) == len(tasks):
        raise ConfigError(
            f"--held-out {count}: of {len(tasks)} seed tasks {len(held_out)} stand apart from all"
            " others, and some must be left to show; lower it, or give more --seeds"
        )
    shown = [task for place, task in enumerate(tasks) if place not in held_out]
    return shown, [tasks[place] for place in sorted(held_out)]


def _chance(task: SeedTask) -> bytes:
    return hashlib.sha256(f"{task.instruction}\n{task.input}".encode()).digest()


def _close(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two texts are alike; most are told apart by their lengths alone."""
    m, n = len(one), len(other)
    return 2 * min(m, n) >= ROUGE_LINK * (m + n) > 0 and rouge_l_of_tokens(one, other) >= ROUGE_LINK
