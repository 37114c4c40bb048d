"""Kills at random moments: a few here, as many as wanted with python -m tests.trainer.crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.crash import crash

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def test_fault_129_a_resumed_run_is_exact_wherever_it_was_killed(tmp_path: Path) -> None:
    """Killed at random on one rank or two, with dropout and saves under way: the curve is bitwise
    that of a run that nothing cut.
    """
    assert crash(tmp_path, kills=2, seed=1) >= 1
