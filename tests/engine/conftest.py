"""Runs and a browser that several tests use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import browser
from tests.engine.synthetic import synthetic_run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 400 accepted rows with vectors. To be read only."""
    return synthetic_run(tmp_path_factory.mktemp("runs") / "run", 400)


@pytest.fixture
def chromium(tmp_path: Path) -> browser.Chromium:
    """A browser with a new profile. Without one the test fails, saying what to install."""
    program = browser.find()
    if program is None:
        pytest.fail("Chromium is missing: apt-get install chromium", pytrace=False)
    return browser.Chromium(program, tmp_path / "profile")
