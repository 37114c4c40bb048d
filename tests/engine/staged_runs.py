"""A run of three stages, made once, and the command line on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import anyio
import pytest
from click.testing import CliRunner

from engine.cli.main import cli
from tests.engine.run.test_chain import ran, spec

__all__ = ["base", "chain", "code", "invoke", "made"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each kind, made once."""
    return tmp_path_factory.mktemp("staged")


@pytest.fixture(scope="module")
def made(base: Path) -> Path:
    async def make() -> None:
        await ran(base / "chain", base, "Chain", target=40)

    anyio.run(make)
    return base / "chain"


@pytest.fixture
def chain(made: Path, tmp_path: Path) -> Path:
    """A run of three stages: ask, answer, judge."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def invoke(*words: object) -> str:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def code(base: Path) -> tuple[str, str]:
    return "--recipe", spec(base, "Chain")
