"""A golden run: what the engine asked, decided and exported when its store had format 1.

Whatever is built since, Alpaca's recipe gives the same bytes for the same settings: the keys of its
requests, its decisions and its exports; and a run of that time goes on as if nothing had happened.
"""

from __future__ import annotations

import gzip
import json
import sqlite3
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from engine.export import Format, export
from engine.run.display import SilentDisplay
from engine.run.generate import generate
from engine.settings import RunConfig
from engine.store import RunStore

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

REQUESTS = 137
KEYS = {
    "completions": "dae2a5e9723b83064925536b9f9e1ea02b57ca52e549956919a2c87dc88ffa57",
    "chat": "11f892a562db70b0bccef61fa6e1c832f15771b2cd02053317e30ba7d5c9f829",
}
DECISIONS = "8e92c36c140109540b60d80bd11ab3e17a3d787cbc4a75e708058946e565c665"
EXPORTS: dict[Format, str] = {
    "alpaca": "7a29875eb03203dc0ef64647e0e5164c92389ef56a0697709b24640f9c851a25",
    "messages": "849581dab6137c29faad97d6a5b22fa74bd323ad0c46957d8121948fca000ddb",
    "jsonl": "84a22f7f06feee9fab9f03a9d2247e79fdacba94a2e09455538e4744b59b4039",
}


async def run(folder: Path, **settings: Any) -> None:
    given = {"backend": "scripted", "seed": 7, "target": 400, "semantic": False, "out": folder}
    result = await generate(RunConfig.model_validate(given | settings), SilentDisplay())
    assert result.stop.reached


def check(folder: Path, api: str) -> None:
    """Compare all that a run came to with what it came to then."""
    store = sqlite3.connect(f"file:{folder / 'run.sqlite'}?mode=ro", uri=True)
    decisions = store.execute(
        "SELECT request, position, reason, body FROM decision ORDER BY request, position"
    ).fetchall()
    last = decisions[-1][0]
    assert last + 1 == REQUESTS
    keys = store.execute(
        "SELECT DISTINCT request, key FROM sent WHERE request <= ? ORDER BY request", (last,)
    ).fetchall()
    store.close()
    assert digest("\n".join(key.hex() for _, key in keys).encode()) == KEYS[api]
    assert digest(json.dumps(decisions, ensure_ascii=False).encode()) == DECISIONS
    with RunStore.read(folder) as reader:
        for kind, expected in EXPORTS.items():
            path = folder / f"golden.{kind}"
            export(reader, kind, path)
            assert digest(path.read_bytes()) == expected, kind


def digest(data: bytes) -> str:
    return sha256(data).hexdigest()


@pytest.mark.parametrize("api", ["completions", "chat"])
async def test_alpaca_s_keys_decisions_and_exports_are_the_same_bytes(
    api: str, tmp_path: Path
) -> None:
    """A new run of 400 records."""
    await run(tmp_path, api=api)
    check(tmp_path, api)


async def test_a_run_of_that_time_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Its store of 60 records, with settings that knew nothing of today's, opens and goes on."""
    packed = Path(__file__).with_name("data") / "golden-60.sqlite.gz"
    (tmp_path / "run.sqlite").write_bytes(gzip.decompress(packed.read_bytes()))
    await run(tmp_path)
    check(tmp_path, "completions")
    opened = sqlite3.connect(tmp_path / "run.sqlite")
    assert opened.execute("PRAGMA user_version").fetchone() == (5,)
    opened.close()
