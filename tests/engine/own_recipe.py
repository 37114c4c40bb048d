"""A recipe that this package does not know, rows for it, and runs of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.run.display import SilentDisplay
from engine.run.generate import Result, generate
from engine.settings import RunConfig
from engine.store import RunStore

__all__ = ["COUNT", "RECIPE", "dump", "input_rows", "ran", "recipe_file"]

RECIPE = '''
"""Questions about rows, answered between tags; the scripted backend's words stand for a model's."""
from engine.recipes.base import Part, Recipe


class Tagged(Recipe):
    name = "tagged"
    fields = ("id", "topic", "answer", "words")
    asks = "any"
    needs_rows = True

    def prompt(self, ask):
        return [
            Part("Be brief.\\n", role="user"),
            Part(ask.row["topic"], "shorten"),
            Part(f"\\nVariant {ask.draw('variant') % 7}, sample {ask.sample}."),
        ]

    def parse(self, ask, answer):
        words = answer.text.split()
        if not words:
            yield ("bad_format", "no words")
            return
        yield {
            "id": ask.row["id"],
            "topic": ask.row["topic"],
            "answer": " ".join(words[:MOST]),
            "words": len(words),
        }

    def refuse(self, row):
        return ("odd", "an odd number of words") if row["words"] % 2 else None

    def compared(self, row):
        return f"{row['topic']} {row['answer']}" if row["id"] % 3 else None


MOST = 40
'''


COUNT = 120


def recipe_file(folder: Path, text: str = RECIPE) -> str:
    path = folder / "own.py"
    path.write_text(text)
    return f"{path}:Tagged"


def input_rows(folder: Path, count: int = COUNT) -> Path:
    path = folder / "rows.jsonl"
    topics = ("rain", "glass", "bees", "salt", "clocks", "harbours", "moss")
    path.write_text(
        "".join(
            json.dumps({"id": n, "topic": f"{topics[n % 7]} {n} of {topics[n % 5]}"}) + "\n"
            for n in range(count)
        )
    )
    return path


async def ran(folder: Path, **more: Any) -> Result:
    settings = {"backend": "scripted", "semantic": False, "out": folder, "seed": 3} | more
    return await generate(RunConfig.model_validate(settings), SilentDisplay())


def dump(folder: Path) -> list[Any]:
    """All decisions, as the store has them."""
    with RunStore.read(folder) as run:
        return [
            (d.index, d.position, d.reason, d.record, d.detail, d.nearest) for d in run.decisions()
        ]
