"""One vLLM server of the small model for all tests that ask one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import models
from engine.backends.vllm.servers import Server, serving

__all__ = ["ARGUMENTS"]

ARGUMENTS = {"max_model_len": "2048", "max_num_seqs": "16"}


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter that has vLLM."""
    if (named := os.environ.get("WOOLMILL_VLLM_PYTHON")) is None:
        pytest.skip("WOOLMILL_VLLM_PYTHON is not set; run make test-vllm")
    models.fetch("smollm2")
    return Path(named)


@pytest.fixture(scope="session")
def server(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A vLLM server for the session."""
    logs = tmp_path_factory.mktemp("logs")
    with serving("smollm2", python=python, args=ARGUMENTS, log_dir=logs) as [server]:
        yield server
