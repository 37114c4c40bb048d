"""Whole runs of built-in recipes over answers of a test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.backends.scripted import ScriptedBackend
from engine.records import Prompt, Record
from engine.run import generate as generate_module
from engine.run.display import SilentDisplay
from engine.run.generate import Result, generate
from engine.settings import RunConfig
from engine.store import RunStore


async def ran(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[Prompt], str],
    **settings: Any,
) -> Result:
    """A run whose model is ``answer``, each call as long as its prompt's seed says."""

    def delay_s(prompt: Prompt) -> float:
        return ((prompt.sampling.seed or 0) % 7) / 1000

    def backends(_config: RunConfig) -> list[ScriptedBackend]:
        return [ScriptedBackend(answer, delay_s=delay_s)]

    monkeypatch.setattr(generate_module, "make_backends", backends)
    values = {"backend": "scripted", "semantic": False, "seed": 4, "out": folder} | settings
    return await generate(RunConfig.model_validate(values), SilentDisplay())


def stage_folders(folder: Path) -> list[Path]:
    """A run's stages in their order; the last one is the run itself."""
    stages = sorted((folder / "stages").glob("*"), key=lambda path: int(path.name.split("-")[0]))
    return [*stages, folder]


def dump(folder: Path) -> list[Any]:
    """All decisions, as the store has them."""
    with RunStore.read(folder) as run:
        return [(d.index, d.position, d.reason, d.record, d.detail) for d in run.decisions()]


def accepted(folder: Path) -> list[Record]:
    return [record for _, _, reason, record, _ in dump(folder) if reason is None]
