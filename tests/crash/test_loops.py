"""A small share of ``python -m tests.crash.loops``: one round, killed where a step has done its
work and nothing says so yet.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.loops import Rig, differences

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_killed_at_the_borders_of_its_steps_it_comes_to_the_same(tmp_path: Path) -> None:
    """The real trainer learns from rows of the scripted backend; ledger, rows and model are those
    of a loop that nobody cut.
    """
    rig = Rig(tmp_path, rounds=1, backend="scripted")
    whole = rig.to_the_end("whole")
    borders = ["loop.first", "loop.generated", "loop.finished", "loop.round"]
    assert rig.killed_at("cut", borders) == len(borders)
    assert differences(whole, rig.to_the_end("cut")) == []
    assert any(path.name == "model.safetensors" for path in whole.glob("round-1/model/*/*"))
