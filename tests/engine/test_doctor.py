"""The doctor tells what would really run, and what that lacks."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from engine import models
from engine.cli import doctor
from engine.cli.doctor import EXTRAS, diagnose
from engine.cli.main import cli

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def told(tmp_path: Path, settings: str) -> tuple[dict[str, Any], Result]:
    """What is found for these settings, and what the command says."""
    path = tmp_path / "woolmill.toml"
    path.write_text(settings)
    return diagnose(path), CliRunner().invoke(cli, ["doctor", "--config", str(path)])


def test_the_extras_are_those_of_the_package() -> None:
    """It offers nothing that does not exist, and forgets none that a person installs."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(declared["optional-dependencies"]) - {"bench", "dev"}
    for extra, packages in EXTRAS.items():
        wanted = {
            re.split(r"[\[>]", requirement)[0]
            for requirement in declared["optional-dependencies"][extra]
        }
        assert set(packages) <= wanted, extra


def test_a_backend_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would not run, and the line says what to install or to do instead."""
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "torch" else object())
    found, done = told(tmp_path, "target = 3\n")
    assert "pip install 'woolmill[local]'" in found["run"]["error"]
    assert done.exit_code == 78
    assert "would make" not in done.stdout
    found, done = told(tmp_path, 'base_url = ["http://127.0.0.1:9/v1"]\n')
    assert "error" not in found["run"]
    assert "rows with the model served by http (http://127.0.0.1:9/v1)" in done.stdout


@pytest.mark.parametrize(
    ("settings", "status", "says"),
    [
        ("targt = 3\n", 78, "targt"),
        ("target = \n", 78, "not TOML"),
        ('recipe = "no-such"\n', 78, "no-such"),
    ],
)
def test_it_ends_as_the_run_would(tmp_path: Path, settings: str, status: int, says: str) -> None:
    """A wrong setting has the status that ``generate`` has for it; all else that is wrong has 1."""
    found, done = told(tmp_path, settings)
    assert (done.exit_code, found["run"]["status"]) == (status, status)
    assert says in found["problems"][0]


def test_what_a_recipe_compares(tmp_path: Path) -> None:
    """Answers to questions are not compared, whatever is installed."""
    for recipe, looks in (("respond", "not looked for"), ("alpaca", "refused")):
        _, done = told(tmp_path, f'recipe = "{recipe}"\nbase_url = ["http://127.0.0.1:9/v1"]\n')
        assert f"near-duplicates by meaning are {looks}" in done.stdout


def test_embeddings_elsewhere(tmp_path: Path) -> None:
    """It says whose they are, and what is wrong with how they are to be had; it asks nobody."""
    url = 'semantic_url = "http://127.0.0.1:9/v1/embeddings"\n'
    found, done = told(tmp_path, url)
    assert found["run"]["embeddings"] == "http://127.0.0.1:9"
    assert "by meaning are refused, by embeddings of http://127.0.0.1:9" in done.stdout
    found, _ = told(tmp_path, url + 'semantic_key_env = "NO_SUCH_KEY_HERE"\n')
    assert (
        "NO_SUCH_KEY_HERE is not set; set it to the key of --semantic-url" in found["problems"][0]
    )
    found, done = told(tmp_path, 'semantic_url = "http://me:hidden@127.0.0.1:9/v1"\n')
    assert "--semantic-url: credentials" in found["problems"][0]
    assert "hidden" not in done.stdout


def test_models_that_are_here_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default one would be downloaded; a damaged one is a problem."""
    monkeypatch.setenv("WOOLMILL_HOME", str(tmp_path))
    found, done = told(tmp_path, "target = 3\n")
    assert found["models"] == dict.fromkeys(models.NAMES, "not here")
    assert "(this machine, once it is downloaded)" in done.stdout
    assert "get it with: woolmill models fetch minilm" in done.stdout
    (tmp_path / "models" / "minilm").mkdir(parents=True)
    found, done = told(tmp_path, "target = 3\n")
    assert found["models"]["minilm"] == "damaged"
    assert "problem: the model minilm is damaged" in done.stdout
    assert done.exit_code == 1


def test_a_key_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named variable must be set; a value that may be the key is not shown."""
    endpoint = '[[endpoint]]\nurl = "http://127.0.0.1:9/v1"\nkey_env = "{}"\n'
    _, done = told(tmp_path, endpoint.format("MISTRAL"))
    assert "problem: the environment variable MISTRAL is not set" in done.stdout
    monkeypatch.setenv("MISTRAL", "sk-of-mistral-0123456789")
    _, done = told(tmp_path, endpoint.format("MISTRAL"))
    assert "the key is set (MISTRAL)" in done.stdout
    assert "0123456789" not in done.stdout
    _, done = told(tmp_path, endpoint.format("a0f9e8d7c6b5a49382716"))
    assert done.exit_code == 78
    assert "a0f9e8d7c6b5a49382716" not in done.output


def test_servers_that_a_file_lists(tmp_path: Path) -> None:
    """Those that it lists now; a line that is no URL is a problem."""
    fleet = tmp_path / "fleet.txt"
    for listed, says in (
        ("http://127.0.0.1:9/v1\n", "by http (http://127.0.0.1:9/v1)"),
        ("# later\n", "fleet.txt, which lists no server yet)"),
        ("node-1\n", "problem: "),
    ):
        fleet.write_text(listed)
        _, done = told(tmp_path, f'endpoints_file = "{fleet}"\n')
        assert says in done.stdout
