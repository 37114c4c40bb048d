"""Rows about which nothing is asked, and how they are told from requests that failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.cli.main import cli
from engine.store import RunStore
from engine.view.metrics import metrics

pytestmark = pytest.mark.slow


def generated(folder: Path, recipe: str) -> str:
    """What a run over three rows says, of which two hold no question."""
    rows = folder / "questions.jsonl"
    rows.write_text('{"id": "a", "question": "Why?"}\n{"id": "b"}\n{"id": "c", "question": null}\n')
    words = ["generate", "--recipe", recipe, "--rows", rows, "--backend", "scripted"]
    words += ["--no-semantic", "--carry", "id", "--out", folder / "run"]
    done = CliRunner().invoke(cli, [str(word) for word in words])
    return f"{done.exit_code}\n{done.output}"


def refused_of(folder: Path) -> list[tuple[str, str]]:
    words = ["export", folder / "run", "--refused", "-o", folder / "why.jsonl"]
    assert CliRunner().invoke(cli, [str(word) for word in words]).exit_code == 0
    lines = map(json.loads, (folder / "why.jsonl").read_text().splitlines())
    return [(line["id"], line["reason"]) for line in lines]


def test_a_row_without_a_question_is_no_failed_request(tmp_path: Path) -> None:
    """The recipe has nothing to ask about it: nothing failed, and nothing is to be sent again."""
    said = generated(tmp_path, "respond")
    assert said.startswith("0\n")
    assert "refused  2 (not_asked 2)" in said
    assert not any(word in said for word in ("\nfailed ", "unsent ", "again "))
    assert refused_of(tmp_path) == [("b", "not_asked"), ("c", "not_asked")]


@pytest.mark.parametrize("user", ["{{ question }}", " {{ question }}\\n"])
@pytest.mark.parametrize("system", ["", 'system = "Be brief."\n'])
def test_a_blank_prompt_about_a_row_is_not_asked(tmp_path: Path, user: str, system: str) -> None:
    """Also where a template makes it: what a model says to nothing is paid, and no row."""
    path = tmp_path / "own.toml"
    path.write_text(
        f'[recipe]\nname = "own"\n[rows]\n[stage]\n{system}user = "{user}"\n'
        'give = { answer = "{{ text }}" }\n'
    )
    rows = tmp_path / "questions.jsonl"
    rows.write_text('{"id": "a", "question": "Why?"}\n{"id": "b", "question": " \\n "}\n')
    words = ["generate", "--recipe", path, "--rows", rows, "--backend", "scripted"]
    words += ["--no-semantic", "--carry", "id", "--out", tmp_path / "run"]
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == 0
    assert "not_asked 1" in done.output
    assert refused_of(tmp_path) == [("b", "not_asked")]


def test_requests_without_a_prompt_are_told_apart_from_failed_ones(tmp_path: Path) -> None:
    """A template needs what a row does not have."""
    path = tmp_path / "own.toml"
    path.write_text(
        '[recipe]\nname = "own"\n[rows]\n[stage]\nuser = "{{ question | upper }}"\n'
        'give = { question = "{{ question }}", answer = "{{ text }}" }\n'
    )
    said = generated(tmp_path, str(path))
    assert said.startswith("3\n")
    assert "unsent   1 request, with no prompt to send" in said
    assert "\nfailed " not in said
    assert "again    once mended: woolmill redecide" in said
    assert "\ndropped " not in said
    assert ("b", "recipe_error") in refused_of(tmp_path)
    with RunStore.read(tmp_path / "run") as run:
        told = metrics(run).splitlines()
    assert "woolmill_requests_sent_total 2" in told
    assert 'woolmill_answers_total{backend="scripted"} 2' in told
    assert "woolmill_unsent_requests_total 1" in told
