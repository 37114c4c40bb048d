"""Which rooms may know which: the rules of the house, read from the imports themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RULES = {
    "recipes": {"backends", "limits", "store", "run", "decide", "prompts", "export", "view"},
    "prompts": {"limits", "store", "run", "decide", "dedup", "export", "view"},
    "backends": {"limits", "store", "recipes", "run", "decide", "prompts", "dedup"},
    "dedup": {"backends", "limits", "run", "decide", "prompts", "export", "view"},
    "embeddings": {"store", "decide", "recipes", "prompts", "export", "view"},
    "store": {"backends", "limits", "recipes", "run", "decide", "prompts", "dedup"},
    "export": {"run", "backends", "limits", "prompts"},
    "report": {"run", "backends", "limits", "prompts"},
    "view": {"run", "backends", "limits"},
    "processes": {"run", "store", "limits", "backends", "recipes", "decide"},
}
"""Package of ``engine``: packages that nothing in it may import."""


def imports(file: Path) -> set[str]:
    """The modules of this project that a file imports, wherever in it, but for types alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


@pytest.mark.parametrize("package", RULES)
def test_a_package_knows_only_what_it_may(package: str) -> None:
    for file in sorted((ROOT / "engine" / package).rglob("*.py")):
        known = {name.split(".")[1] for name in imports(file) if name.startswith("engine.")}
        assert not known & RULES[package], file.relative_to(ROOT)


def test_the_trainer_never_imports_the_engine() -> None:
    for file in sorted((ROOT / "trainer").rglob("*.py")):
        assert not {name.split(".")[0] for name in imports(file)} & {"engine"}, file


def test_the_engine_never_imports_the_trainer() -> None:
    """Only files cross between the two; ``engine.loop`` starts the trainer's command."""
    for file in sorted((ROOT / "engine").rglob("*.py")):
        assert not {name.split(".")[0] for name in imports(file)} & {"trainer"}, file


def test_only_runs_and_processes_start_tasks() -> None:
    """Concurrency has one home; a backend, a limit or the store may hold a task of its own."""
    for package in ("recipes", "prompts", "dedup", "export", "report", "upkeep"):
        for file in (ROOT / "engine" / package).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert "create_task" not in text, file
