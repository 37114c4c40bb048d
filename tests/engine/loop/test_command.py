"""``woolmill loop``: what it says, and that its page is where it says."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from engine.cli.main import cli
from engine.errors import StoppedError
from engine.loop import figures, rounds
from tests.engine.loop.test_rounds import Trainer

pytestmark = pytest.mark.slow

FILE = """
out = {out}
model = {model}
[generate]
backend = "scripted"
target = 15
semantic = false
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rounds, "trainer", Trainer(2.0, 1.5, 1.0))
    monkeypatch.setattr(figures, "_distinct_verbs", lambda run: None)
    (tmp_path / "first").mkdir()
    places = {name: json.dumps(str(tmp_path / name)) for name in ("loop", "first")}
    (tmp_path / "loop.toml").write_text(FILE.format(out=places["loop"], model=places["first"]))
    return tmp_path / "loop.toml"


def test_it_says_what_each_round_came_to_and_where_to_look(config: Path) -> None:
    done = CliRunner().invoke(cli, ["loop", "--config", str(config), "--rounds", "1"])
    assert done.exit_code == 0, done.output
    folder = config.parent / "loop"
    assert done.stdout.splitlines()[-3:] == [
        f"model    {folder}/round-1/model/first",
        f"ledger   {folder}/ledger.jsonl",
        f"look     woolmill report {folder} -o rounds.html",
    ]
    assert "round 1: held-out loss 2.0000 -> 1.5000 █▁, kept; 15 rows" in done.stdout
    assert "measuring" in done.stderr
    again = CliRunner().invoke(cli, ["loop", "--config", str(config), "--rounds", "1"])
    assert again.stdout == done.stdout
    assert "measuring" not in again.stderr


def test_flags_lie_over_the_tables_of_the_file(config: Path) -> None:
    more = ["--rounds", "1", "--generate", "target=8", "--train", "max_steps=3"]
    done = CliRunner().invoke(cli, ["loop", "--config", str(config), *more])
    assert done.exit_code == 0, done.output
    assert ", kept; 8 rows" in done.stdout


def test_what_ends_a_run_ends_the_loop(config: Path) -> None:
    """And the same command goes on with the round."""
    more = ["--rounds", "1", "--generate", "max_requests=1"]
    stopped = CliRunner().invoke(cli, ["loop", "--config", str(config), *more])
    assert isinstance(stopped.exception, StoppedError)
    done = CliRunner().invoke(cli, ["loop", "--config", str(config), "--rounds", "1"])
    assert done.exit_code == 0, done.output


def test_signals_end_it_in_order_while_it_trains(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run before has heard them for itself. What is trained is then asked to save."""
    double = Trainer(2.0)

    def signalled(program: str, *given: Any, **more: Any) -> None:
        if program == "trainer":
            os.kill(os.getpid(), signal.SIGTERM)
        double(program, *given, **more)

    monkeypatch.setattr(rounds, "trainer", signalled)
    before = signal.getsignal(signal.SIGTERM)
    done = CliRunner().invoke(cli, ["loop", "--config", str(config)])
    assert done.exit_code == 128 + signal.SIGTERM
    assert double.trained == []
    assert signal.getsignal(signal.SIGTERM) is before
