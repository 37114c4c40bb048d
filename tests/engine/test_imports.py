"""What importing the packages loads, and what it must not."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "vllm", "transformers", "faiss", "sentence_transformers", "onnxruntime")


@pytest.mark.parametrize(
    "module", ["engine", "engine.cli.main", "engine.run.generate", "engine.dedup"]
)
def test_importing_the_engine_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"
