"""How many rows an input has, found out while the run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.server import Behaviour, Server
from engine.errors import InputError
from engine.limits import Pool
from engine.run.display import SilentDisplay
from engine.run.generate import generate
from engine.run.inputs import STEP, InputRows
from engine.run.progress import Progress
from engine.settings import RunConfig
from engine.view.rows import Rows

pytestmark = pytest.mark.anyio


def rows(folder: Path, count: int, *, end: str = "") -> Path:
    path = folder / "rows.jsonl"
    lines = [json.dumps({"number": n, "question": f"What is {n}?"}) for n in range(count)]
    path.write_text("\n".join(lines) + end)
    return path


async def test_rows_are_counted_to_the_end_of_any_input(tmp_path: Path) -> None:
    assert await InputRows(rows(tmp_path, 2 * STEP + 7)).counted() == 2 * STEP + 7


async def test_an_input_with_a_mistake_behind_has_no_count(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"rows.jsonl:{STEP + 1}: not JSON"):
        await InputRows(rows(tmp_path, STEP, end='\n{"number": ')).counted()


@pytest.mark.slow
async def test_a_run_over_all_rows_knows_its_share_long_before_the_end(tmp_path: Path) -> None:
    server = Server(Behaviour(text="It is so.", latency_s=0.01))
    await server.start()
    shares: list[tuple[int, int | None]] = []

    class Seen(SilentDisplay):
        def refresh(self, progress: Progress, pool: Pool) -> None:
            shares.append((progress.answered, progress.requests))

    config = RunConfig(
        recipe="tests.engine.answers:Answers",
        rows=rows(tmp_path, 60),
        samples=2,
        out=tmp_path / "run",
        base_url=(f"{server.url}/v1",),
        model="toy",
        max_in_flight=1,
        semantic=False,
    )
    try:
        result = await generate(config, Seen())
    finally:
        await server.stop()
    assert result.progress.requests == 120
    assert any(answered < 60 and requests == 120 for answered, requests in shares)
    page = Rows(tmp_path / "run", None)
    try:
        assert page.state()["input_rows"] == [60, 60]
    finally:
        page.close()
