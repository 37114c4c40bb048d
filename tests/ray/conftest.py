"""The interpreter that has Ray."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def python() -> str:
    """An interpreter that has Ray."""
    if (found := os.environ.get("WOOLMILL_RAY_PYTHON")) is None:
        pytest.skip("WOOLMILL_RAY_PYTHON is not set; run make ray")
    return found
