"""Figures of a round: those of its store, and the same however much came beyond its target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine
from engine import models
from engine.loop import figures
from engine.loop.figures import figures_of
from engine.run import chain
from engine.run.progress import Pace
from engine.store import RunStore

pytestmark = pytest.mark.slow


def made(folder: Path, recipe: str, **more: Any) -> Path:
    settings = {"backend": "scripted", "target": 25, "semantic": False, **more}
    for _ in engine.generate(recipe, out=folder, **settings):
        pass
    return folder


def answered(folder: Path) -> int:
    """Requests with an answer, in the run and its stages."""
    total = 0
    for path in folder.rglob("run.sqlite"):
        with RunStore.read(path.parent) as run:
            total += run.counts().answered
    return total


@pytest.mark.parametrize("recipe", ["alpaca", "self-instruct"])
def test_they_follow_from_the_rows_and_not_from_when_the_run_ended(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "find", lambda name: None)
    few = made(tmp_path / "few", recipe)
    # One that has more under way when it comes to its end.
    monkeypatch.setattr(chain, "Pace", lambda **given: Pace(**{**given, "at_least": 60}))
    many = made(tmp_path / "many", recipe)
    assert answered(few) < answered(many)
    told = figures_of(few, "")
    assert told == figures_of(many, "")
    assert told.accepted == 25
    assert told.distinct_verbs is None


def test_they_are_the_store_s(tmp_path: Path) -> None:
    """Counted from the rows here; reasons in the order of their number."""
    folder = made(tmp_path / "run", "alpaca", seeds=None)
    told = figures_of(folder, "")
    with RunStore.read(folder) as run:
        decisions = list(run.decisions())
        last = max(decision.index for decision in decisions)
        tokens = sum(
            answer.completion.usage.completion_tokens
            for answer, _ in run.all_answers()
            if answer.index <= last and answer.completion is not None
        )
        nearest = [max(d.most_similar.values()) for d in decisions if d.accepted]
    assert told.completion_tokens == tokens
    assert sum(told.refused.values()) == len(decisions) - 25
    assert list(told.refused.values()) == sorted(told.refused.values(), reverse=True)
    assert told.nearest_rouge_l == pytest.approx(np.mean(nearest), abs=1e-4)
    assert told.nearest_cosine is None
    # Scripted answers begin with one of thirty verbs; the parser does not take all for one.
    assert told.distinct_verbs is not None
    assert 5 <= told.distinct_verbs <= 30


def test_an_unfinished_run_has_figures_too(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(engine.WoolmillError):
        made(folder, "alpaca", max_requests=1, target=1000)
    told = figures_of(folder, "")
    assert told.accepted < 1000
    assert told.completion_tokens > 0


def test_a_run_in_another_language_has_no_verbs(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", "alpaca", language="zh")
    with RunStore.read(folder) as run:
        assert figures._distinct_verbs(run) is None
