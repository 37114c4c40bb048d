"""``woolmill dedup`` in this process, with a dataset to try it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner, Result

from engine.dedup import command as tool
from engine.errors import WoolmillError

__all__ = ["ROWS", "dataset", "dedup", "lines"]

ROWS: list[dict[str, Any]] = [
    {"instruction": "Name three primary colours.", "input": "", "id": 1},
    {"instruction": "name three primary colours", "input": "x", "id": 2},
    {"instruction": "Name three primary  COLOURS.", "input": "", "id": 3},
    {"instruction": "写一首诗", "input": "", "id": 2**70},
    {"instruction": "写一首歌", "input": "", "id": None},
]


def dedup(*arguments: object) -> Result:
    """Run the command; an error of ours is raised here as it is to the command line."""
    result = CliRunner().invoke(tool.dedup, [str(a) for a in (*arguments, "--no-semantic")])
    if isinstance(result.exception, WoolmillError):
        raise result.exception
    return result


def lines(path: Path) -> list[Any]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    rows = [row | {"id": str(row["id"])} for row in ROWS]
    path.write_bytes(b"\n".join(orjson.dumps(row) for row in rows))
    return path
