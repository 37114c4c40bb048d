"""Stages and pools in batches: what a stage or an epoch wants is a batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.stages import stages_of_run
from engine.store import RunReader
from tests.engine.batches.runs import exported, generate, live_export
from tests.engine.batches.shapes import OpenAI
from tests.engine.run.test_chain import RECIPES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("kind", "target"), [("Chain", 12), ("Pools", 60)])
def test_the_dataset_is_that_of_a_live_run(kind: str, target: int, tmp_path: Path) -> None:
    """Every answer of every stage was paid once, and stands in its store."""
    (tmp_path / "own.py").write_text(RECIPES)
    recipe = ("--recipe", f"{tmp_path / 'own.py'}:{kind}")
    out = tmp_path / "run"
    with OpenAI(twice=3) as provider:
        run = generate(provider, out, *recipe, target=target)
        assert run.returncode == 0, run.stderr
        assert not provider.live
        assert set(provider.paid.values()) == {1}
        answered = 0
        for stage in stages_of_run(out):
            with RunReader(stage.folder) as store:
                counts = store.counts()
                assert counts.wasted == 0
                answered += counts.answered
                assert not [row for row in store.batches() if row.awaited]
        assert answered == len(provider.paid)
        with RunReader(out) as store:
            assert store.counts().accepted == target
        assert exported(out) == live_export(provider, tmp_path / "live", *recipe, target=target)
