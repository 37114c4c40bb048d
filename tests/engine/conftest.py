"""Runs that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.synthetic import synthetic_run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 400 accepted rows with vectors. To be read only."""
    return synthetic_run(tmp_path_factory.mktemp("runs") / "run", 400)
