"""What importing the packages loads, and what it must not."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

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


def test_the_package_has_its_own_name() -> None:
    """``import woolmill`` gives what ``engine`` does, as late, and it is in the wheel."""
    code = (
        "import sys, woolmill, engine; print([m for m in sys.modules if m.startswith('engine.')]);"
        "assert all(getattr(woolmill, n) == getattr(engine, n) for n in engine.__all__);"
        "assert woolmill.__all__ == engine.__all__ and not hasattr(woolmill, 'nothing')"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert project["targets"]["wheel"]["only-include"] == ["engine", "trainer", "woolmill.py"]
