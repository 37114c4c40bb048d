"""Fields of the input row that its rows keep: ``--carry``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from engine.cli.main import cli
from engine.errors import ConfigError

pytestmark = pytest.mark.slow

QUESTIONS = [
    {"id": "q-7", "question": "What is rain?", "level": 3, "output": "the row's own"},
    {"id": "q-9", "question": "What is snow?", "level": None, "output": "the row's own"},
]
TWO_STAGES = """
[recipe]
name = "two"
compare = "{{ asked }}"
[rows]
[[stage]]
name = "ask"
user = "Ask something about {{ question }}"
give = { asked = "{{ text }}" }
[[stage]]
name = "reply"
user = "Answer: {{ asked }}"
give = { reply = "{{ text }}" }
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in QUESTIONS))
    Path("two.toml").write_text(TWO_STAGES)


def say(*words: str) -> str:
    """What a command prints."""
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def run(recipe: str, *more: str) -> str:
    own = ("--recipe", recipe, "--backend", "scripted", "--no-semantic", "--out", "run")
    return say("generate", *own, *more)


def rows() -> list[dict[str, Any]]:
    say("export", "run", "-o", "out.jsonl", "--overwrite")
    return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("carry", [("--carry", "id,level"), ("--carry", "id", "--carry", "level")])
def test_rows_keep_the_fields_that_are_named(carry: tuple[str, ...]) -> None:
    run("respond", "--rows", "rows.jsonl", *carry)
    assert [(row["id"], row["level"]) for row in rows()] == [("q-7", 3), ("q-9", None)]
    assert "input" in rows()[0]


def test_a_field_that_the_recipe_gives_is_the_recipe_s() -> None:
    run("respond", "--rows", "rows.jsonl", "--carry", "output")
    assert all(row["output"] != "the row's own" for row in rows())


def test_every_stage_passes_them_on() -> None:
    run("two.toml", "--rows", "rows.jsonl", "--carry", "id")
    made = rows()
    assert [row["id"] for row in made] == ["q-7", "q-9"]
    assert all(row["asked"] and row["reply"] for row in made)


def test_samples_that_become_one_row_keep_them() -> None:
    give = 'give = { reply = "{{ text }}", length = "{{ text | length }}" }'
    stage = f'[stage]\nuser = "Answer: {{{{ question }}}}"\n{give}\nreduce = "best:length"\n'
    Path("best.toml").write_text(f'[recipe]\nname = "best"\n[rows]\nsamples = 3\n{stage}')
    run("best.toml", "--rows", "rows.jsonl", "--carry", "id")
    assert [row["id"] for row in rows()] == ["q-7", "q-9"]


def test_rows_get_them_later_without_asking_anybody() -> None:
    run("respond", "--rows", "rows.jsonl")
    assert "level" not in rows()[0]
    told = say("redecide", "run", "--carry", "id,level")
    assert "goes on with --carry id,level" in told
    assert [row["id"] for row in rows()] == ["q-7", "q-9"]
    assert "decided all 2 input rows" in run(
        "respond", "--rows", "rows.jsonl", "--carry", "id,level"
    )


@pytest.mark.parametrize("earlier", [False, True])
def test_a_field_that_is_not_there_is_named_before_anything_is_asked(earlier: bool) -> None:
    message = "--carry nr: the input rows have no such field; the first one has id, question"
    if earlier:
        run("respond", "--rows", "rows.jsonl")
        with pytest.raises(ConfigError, match=message):
            say("redecide", "run", "--carry", "nr")
    else:
        with pytest.raises(ConfigError, match=message):
            run("respond", "--rows", "rows.jsonl", "--carry", "id,nr")
        assert not Path("run").exists()


def test_a_run_without_rows_has_none_to_keep() -> None:
    with pytest.raises(ConfigError, match="--carry id: the run has no input rows; see --rows"):
        run("alpaca", "--carry", "id")
