"""Settings of a loop: what is wrong in its tables is known before anything is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.loop.settings import load_loop

FILE = """
rounds = 3
[generate]
target = 50
base_url = "http://127.0.0.1:1/v1"
key_env = "A_KEY"
[train]
learning_rate = 1e-5
"""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"round": 3}, "unknown setting 'round'; did you mean 'rounds'"),
        ({"target": 3}, "unknown setting 'target'; settings of each round's run belong into"),
        ({"held_out": 0}, "held_out: "),
        ({"generate": {"targett": 3}}, r"\[generate\]: unknown setting 'targett'; did you mean"),
        ({"generate": {"out": "x"}}, "generate: out is given by the loop itself; see --out"),
        ({"generate": {"seeds": "x"}}, "generate: seeds is given by the loop itself; see --seeds"),
        ({"train": {"data_path": "x"}}, "train: data_path is given by the loop itself"),
        ({"train": {"--resume": "x"}}, "train: '--resume' is no flag of the trainer"),
        ({"train": {"a": {}}}, "train: a should be a text, a number, true, false or a list"),
        ({"train": {"run_name": "sk-proj-0123456789abcdefghij0123"}}, "looks like a secret"),
    ],
)
def test_what_cannot_be_right_is_said(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_loop(None, given)


def test_flags_go_before_the_file_entry_by_entry(tmp_path: Path) -> None:
    (tmp_path / "loop.toml").write_text(FILE)
    given = {"rounds": 4, "generate": {"target": "60"}, "train": None}
    config = load_loop(tmp_path / "loop.toml", given)
    assert config.rounds == 4
    assert config.run().target == 60
    assert config.run().base_url == ("http://127.0.0.1:1/v1",)
    assert config.train == {"learning_rate": 1e-5}


def test_what_is_fixed_is_what_rows_and_model_follow_from(tmp_path: Path) -> None:
    """No address, no key's name, and neither how many rounds nor where to."""
    (tmp_path / "loop.toml").write_text(FILE)
    fixed = load_loop(tmp_path / "loop.toml", {}).fixed()
    assert fixed["generate"] == {"target": 50}
    assert fixed["train"] == {"learning_rate": 1e-5}
    assert not {"rounds", "out", "keep", "always"} & fixed.keys()
    assert "A_KEY" not in json.dumps(fixed)


@pytest.mark.parametrize(
    ("generate", "itself"),
    [
        ({}, True),
        ({"backend": "transformers"}, True),
        ({"backend": "vllm"}, True),
        ({"model": "teacher"}, False),
        ({"base_url": "http://127.0.0.1:1/v1"}, False),
        ({"backend": "scripted"}, False),
    ],
)
def test_who_answers(generate: dict[str, Any], itself: bool) -> None:
    assert load_loop(None, {"generate": generate}).trains_itself is itself
