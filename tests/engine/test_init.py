"""The settings file names every setting, and the doctor every lack."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.backends.batch.settings import BatchSection
from engine.cli.init import template
from engine.cli.main import cli
from engine.errors import OutputError
from engine.settings import EndpointConfig, RunConfig, load_config

NOT_HERE = {"endpoint", "stage", "semantic_dimension"}
"""A table of its own, and what a run itself sets."""
SETTING = re.compile(r"# (\w+) = (.*)")


def settings(text: str) -> dict[str, object]:
    """The settings of ``text`` as if every one were uncommented."""
    lines = [line.removeprefix("# ") for line in text.splitlines() if SETTING.match(line)]
    return tomllib.loads("\n".join(lines))


def test_the_file_names_every_setting() -> None:
    run, endpoint = template().split("[[endpoint]]")
    assert settings(run).keys() == RunConfig.model_fields.keys() - NOT_HERE
    assert settings(endpoint).keys() == EndpointConfig.model_fields.keys()


@pytest.mark.parametrize("name", sorted(RunConfig.model_fields.keys() - NOT_HERE))
def test_each_value_is_valid_and_the_default_where_there_is_one(name: str) -> None:
    value = settings(template().split("[[endpoint]]")[0])[name]
    more: dict[str, object] = {}
    if name == "backend":
        more = {"base_url": ["http://127.0.0.1:1/v1"]}
    elif name == "max_cost":
        more = {"price_prompt": 1.0, "price_completion": 2.0}
    elif name in ("extra_body", "header", "proxy", "query", "transport", "without"):
        more = {"base_url": "http://127.0.0.1:1/v1"}
    elif name == "ray":
        more = {"backend": "vllm", "serve": True}
    elif name in BatchSection.model_fields:
        more = {"backend": "batch", "provider": "openai", "model": "m"}
        more["base_url"] = "https://api.openai.com/v1"
    config = RunConfig.model_validate({**more, name: value})
    default = RunConfig.model_fields[name].default
    if default not in (None, (), {}):
        assert getattr(config, name) == default


def test_init_writes_a_file_that_loads(tmp_path: Path) -> None:
    path = tmp_path / "woolmill.toml"
    done = CliRunner().invoke(cli, ["init", str(path)])
    assert done.exit_code == 0
    assert load_config(path, {}) == RunConfig()
    again = CliRunner().invoke(cli, ["init", str(path)])
    assert isinstance(again.exception, OutputError)


def test_the_doctor_finds_what_is_wrong(tmp_path: Path) -> None:
    """An unknown setting ends it with 78, as the run; a good file shows what would run."""
    path = tmp_path / "woolmill.toml"
    path.write_text('base_url = ["http://127.0.0.1:9/v1"]\nkey_env = "NO_SUCH_KEY_HERE"\n')
    told = json.loads(
        CliRunner().invoke(cli, ["doctor", "--config", str(path), "--format", "json"]).stdout
    )
    assert told["run"]["backend"] == "http"
    assert told["run"]["keys"] == {"NO_SUCH_KEY_HERE": False}
    assert told["extras"]["view"]["starlette"]
    path.write_text("targett = 5\n")
    done = CliRunner().invoke(cli, ["doctor", "--config", str(path)])
    assert done.exit_code == 78
    assert "problem: " in done.stdout
    assert "did you mean 'target'" in done.stdout
