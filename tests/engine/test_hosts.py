"""The commands of docs/hosts.md, each against a double of its host.

A command is taken from the page as it stands, but for scheme and host of its URL.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from engine.cli.main import main
from engine.store import RunStore
from tests.engine.hosts.double import KEY, THOUGHT, Double
from tests.engine.hosts.doubles import (
    DOUBLES,
    Anthropic,
    AzureClassic,
    Gemini,
    OpenAIReasoning,
    OpenRouter,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "hosts.md"
ROW = re.compile(r"^\| ([^|]+) \| `(--base-url [^`|]+)` \| ([^|]*) \| ([^|]*) \|$", re.MULTILINE)
WORDS = {"chat": "by chat", "max_completion_tokens": "max_completion_tokens"}
"""What is learnt beside fields that are left out, and how it is said."""
IN_A_PROCESS = (OpenAIReasoning, OpenRouter)
HERE = [host for host in DOUBLES if host not in IN_A_PROCESS]
WRONG_KEYS = (AzureClassic, Anthropic, Gemini)
MANY = 16
"""Requests that may be refused alike before the lesson of the first is learnt."""


def rows() -> dict[str, tuple[str, str]]:
    """By host: the options of its command, and what the page says is learnt."""
    page = PAGE.read_text(encoding="utf-8")
    return {host: (options, learnt) for host, options, learnt, _ in ROW.findall(page)}


def arguments(double: Double, out: Path, key: str = KEY) -> tuple[list[str], dict[str, str]]:
    """The command of the double's row, and the environment with its key."""
    options = shlex.split(re.sub(r"https?://[^/\s\"]+", double.url, rows()[double.row][0]))
    variable = dict(pairwise(options)).get("--key-env", "OPENAI_API_KEY")
    command = ["generate", *options, "--target", "8", "--no-semantic", "--out", str(out)]
    return [*command, "--no-progress"], {variable: key}


def test_each_host_of_the_page_has_its_double() -> None:
    assert list(rows()) == [double.row for double in DOUBLES]


Run = Callable[[list[str], dict[str, str]], tuple[int, str]]
"""A command and what its environment has besides: its status, and all that it said."""


def in_a_process(command: list[str], key: dict[str, str]) -> tuple[int, str]:
    """As a person has it, with a process of its own."""
    program = [sys.executable, "-m", "engine", *command]
    done = subprocess.run(
        program, cwd=ROOT, env=os.environ | key, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process, which saves its start."""

    def run(command: list[str], key: dict[str, str]) -> tuple[int, str]:
        for name, value in key.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main(command)
        status = ended.value.code or 0
        assert isinstance(status, int)
        return status, "".join(capsys.readouterr())

    return run


@pytest.mark.parametrize("host", HERE, ids=lambda host: host.__name__)
def test_the_command_of_a_row(host: type[Double], tmp_path: Path, run: Run) -> None:
    """It ends with all rows and status 0, having learnt what the row says and what is told."""
    with host() as double:
        status, said = run(*arguments(double, tmp_path / "run"))
    assert status == 0, said
    check(double, tmp_path / "run", said)


@pytest.mark.parametrize("host", IN_A_PROCESS, ids=lambda host: host.__name__)
def test_the_command_of_a_row_as_a_person_has_it(host: type[Double], tmp_path: Path) -> None:
    with host() as double:
        status, said = in_a_process(*arguments(double, tmp_path / "run"))
    assert status == 0, said
    check(double, tmp_path / "run", said)


def check(double: Double, run: Path, said: str) -> None:
    """What a run has to show for itself, to whoever asked for it and to its host."""
    data = json.loads((run / "alpaca_data.json").read_text())
    assert len({row["instruction"] for row in data}) == 8
    assert KEY not in said
    assert not any(THOUGHT in text for row in data for text in row.values())
    with RunStore.read(run) as store:
        learnt, counts = store.manifest.learnt, store.counts()
        answers = store.answers(0, 1000)
    assert list(learnt.values()) == ([double.learnt] if double.learnt else [])
    left_out = double.learnt.get("left_out", [])
    promised = rows()[double.row][1]
    for name in left_out:
        assert f"`{name}`" in promised
        assert f"it does not take {name}" in said
    for name, words in WORDS.items():
        assert (name in double.learnt.values()) is (words in said)
        assert name not in double.learnt.values() or words in promised
    assert set(double.refused) <= {"api", "route", "upstream", "max_tokens", *left_out}
    assert all(times <= MANY for times in double.refused.values()), double.refused

    told = {"cached_tokens": counts.cached_tokens, "reasoning_tokens": counts.reasoning_tokens}
    told |= {"cost": counts.stated_nano}
    assert {name for name, count in told.items() if count} == double.told
    assert len(answers) <= double.answered  # those still on their way at the target are dropped
    for answer in answers:
        assert answer.completion is not None
        assert answer.completion.finish_reason == "stop"
        assert answer.completion.api == ("chat" if "api" in double.learnt else None)


FLAGGING = [host for host in DOUBLES if host.flagged_as]


@pytest.mark.parametrize("host", FLAGGING, ids=lambda host: host.__name__)
def test_one_flagged_prompt_costs_its_own_row(host: type[Double], tmp_path: Path, run: Run) -> None:
    """One of the first: the run goes on to its target, and says by its status that one failed.

    The target needs more answers than can arrive before the flagged prompt, so that it is decided.
    """
    with host(flag=1) as double:
        command, key = arguments(double, tmp_path / "run")
        status, said = run([*command, "--target", "80", "--max-in-flight", "2"], key)
    assert status == 3, said
    assert double.refused["prompt"] == (1 if host.flagged_as == "content_filter" else 4)
    with RunStore.read(tmp_path / "run") as store:
        failures = [answer.failure for answer, _ in store.all_answers()]
        assert list(filter(None, failures)) == [host.flagged_as]
        assert store.counts().accepted == 80


@pytest.mark.parametrize("host", WRONG_KEYS, ids=lambda host: host.__name__)
def test_a_wrong_key_ends_the_run_at_once(host: type[Double], tmp_path: Path, run: Run) -> None:
    """With status 77, after one confirmation; the list of models may be open to anybody."""
    wrong = "wrong-" + KEY
    with host() as double:
        status, said = run(*arguments(double, tmp_path / "run", wrong))
    assert status == 77, said
    assert double.answered == 0
    assert double.refused["key"] <= 4
    assert "the key was refused" in said
    assert wrong not in said
