"""Which seed tasks are held out: they follow from the texts, and none of the others is close."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engine.dedup.rouge import rouge_l
from engine.errors import ConfigError
from engine.export.split import ROUGE_LINK
from engine.loop.people import HELD_OUT, SHOWN, apart, set_apart
from engine.recipes.seeds import bundled_seeds, fingerprint, read_seeds
from engine.records import SeedTask

TASKS = read_seeds(bundled_seeds())


def task(name: str, instruction: str) -> SeedTask:
    return SeedTask(id=name, instruction=instruction, input="", output="x")


def test_the_order_of_the_file_does_not_matter() -> None:
    shown, held_out = apart(TASKS, 40)
    assert len(held_out) == 40
    assert sorted(t.id for t in [*shown, *held_out]) == sorted(t.id for t in TASKS)
    mixed = random.Random(1).sample(TASKS, len(TASKS))
    again = apart(mixed, 40)
    assert {t.id for t in again[1]} == {t.id for t in held_out}


def test_more_held_out_are_the_same_and_others() -> None:
    few, many = ({t.id for t in apart(TASKS, count)[1]} for count in (10, 30))
    assert few < many


def test_none_that_is_shown_is_close_to_one_that_is_held_out() -> None:
    tasks = [
        task("a", "Name three rivers of Europe that end in the sea."),
        task("b", "Name three rivers of Asia that end in the sea."),
        task("c", "Write a poem about bread."),
        task("d", "Why is the sky blue at noon?"),
    ]
    assert rouge_l(tasks[0].instruction, tasks[1].instruction) >= ROUGE_LINK
    shown, held_out = apart(tasks, 2)
    assert {t.id for t in held_out} == {"c", "d"}
    assert [t.id for t in shown] == ["a", "b"]
    with pytest.raises(ConfigError, match="of 4 seed tasks 2 stand apart"):
        apart(tasks, 3)


def test_some_must_be_left_to_show() -> None:
    with pytest.raises(ConfigError, match="some must be left to show"):
        apart([task("c", "Write a poem about bread."), task("d", "Why is the sky blue?")], 2)


def test_both_parts_are_seed_files(tmp_path: Path) -> None:
    set_apart(None, 40, tmp_path / "people")
    shown, held_out = (read_seeds(tmp_path / "people" / name) for name in (SHOWN, HELD_OUT))
    assert [fingerprint(part) for part in apart(TASKS, 40)] == [
        fingerprint(shown),
        fingerprint(held_out),
    ]
