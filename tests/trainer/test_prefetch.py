"""The steps that are made ahead."""

from __future__ import annotations

import threading

import pytest

from trainer.prefetch import ahead


def test_steps_come_in_order_and_some_are_made_ahead() -> None:
    """Two wait and a third is in the making while the first is used; nothing runs further."""
    made: list[int] = []
    third = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if len(made) == 4:
            third.set()
        return step * step

    steps = ahead(make, range(5, 15))
    assert next(steps) == 25
    assert third.wait(10)
    assert made == [5, 6, 7, 8]
    assert list(steps) == [step * step for step in range(6, 15)]


def test_a_fault_shows_when_its_step_is_asked_for() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise OSError("the disk is gone")
        return step

    steps = ahead(make, range(5))
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)


def test_the_thread_ends_with_the_loop() -> None:
    """A loop that stops early leaves no thread behind."""
    steps = ahead(lambda step: step, range(1000))
    next(steps)
    (thread,) = [t for t in threading.enumerate() if t.name == "prefetch"]
    steps.close()  # type: ignore[attr-defined]
    thread.join(10)
    assert not thread.is_alive()
