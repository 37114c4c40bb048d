"""Rows of a file that the prompts of a TOML recipe show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from engine.datasets import Dataset
from engine.errors import WoolmillError
from engine.recipes.seeds import bundled_seeds
from engine.recipes.template_file import Examples, TemplateFile
from engine.records import Record

__all__ = ["Example", "examples_of"]

MAX_EXAMPLES = 100_000
"""Rows of one file. They are held in memory and a prompt shows a few, so more would add nothing."""
SEEDS = "seeds"
"""As the place of examples: the seed tasks that ship with the package."""


@dataclass(frozen=True, slots=True)
class Example:
    """A row that prompts show, and its source."""

    row: Record
    source: str


def examples_of(file: TemplateFile, folder: Path) -> tuple[dict[str, list[Example]], str]:
    """The rows that prompts show, by name; and why they cannot be had, or nothing.

    That is told when a prompt is made: answers can be decided again without them.
    """
    examples: dict[str, list[Example]] = {}
    fault = ""
    for name, wanted in file.vary.items():
        if not isinstance(wanted, Examples):
            continue
        path = bundled_seeds() if wanted.source == SEEDS else folder / wanted.source
        examples[name] = []
        try:
            rows = [_row(row.values) for row in islice(Dataset(path), MAX_EXAMPLES)]
        except WoolmillError as error:
            fault = f"vary.{name}: {error}"
            continue
        prefix = f"{name}." if sum(isinstance(v, Examples) for v in file.vary.values()) > 1 else ""
        ids = [str(row.get("id", number)) for number, row in enumerate(rows, 1)]
        if len(set(ids)) < len(ids):
            ids = [str(number) for number in range(1, len(rows) + 1)]
        examples[name] = [
            Example(row, f"seed:{prefix}{id}") for id, row in zip(ids, rows, strict=True)
        ]
    return examples, fault


def _row(values: dict[str, Any]) -> Record:
    row: Record = json.loads(json.dumps(values, default=str))
    return row
