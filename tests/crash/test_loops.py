"""A small share of ``python -m tests.crash.loops``: one round, killed at each step's border."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.loops import BORDERS, Rig, differences

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_killed_at_every_border_it_comes_to_the_same(tmp_path: Path) -> None:
    """The real trainer learns from rows of the scripted backend; ledger, rows and model are those
    of a loop that nobody cut.
    """
    rig = Rig(tmp_path, rounds=1, backend="scripted")
    whole = rig.to_the_end("whole")
    assert rig.killed_at_borders("cut") == len(BORDERS)
    assert differences(whole, rig.to_the_end("cut")) == []
    assert any(path.name == "model.safetensors" for path in whole.glob("round-1/model/*/*"))
