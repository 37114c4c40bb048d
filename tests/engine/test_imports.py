"""What importing the packages loads, and what it must not."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "vllm", "transformers", "faiss", "sentence_transformers", "onnxruntime")


def test_importing_the_package_loads_none_of_it() -> None:
    """The public names are loaded when they are asked for."""
    code = "import sys, engine; print([m for m in sys.modules if m.startswith('engine.')])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "module", ["engine", "engine.cli.main", "engine.run.generate", "engine.dedup"]
)
def test_importing_the_engine_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"
