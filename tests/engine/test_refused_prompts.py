"""A host that refuses some prompts each time: these rows fail, and no run ends for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
from click.testing import CliRunner

from engine.backends.base import Verdict
from engine.backends.scripted import ScriptedBackend
from engine.cli.main import cli
from engine.errors import ConfigError
from engine.records import Prompt
from engine.run import generate as generate_module
from engine.run.display import SilentDisplay
from engine.run.generate import generate
from engine.settings import RunConfig
from tests.engine.run.test_chain import accepted

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

REFUSED = Verdict(kind="settings", reason="http_400", message="cannot process this prompt")


class Picky(ScriptedBackend):
    """Refuses each tenth row, and all where ``is_down``."""

    def __init__(self) -> None:
        super().__init__(fault=self._refuse, max_in_flight=None)
        self.is_down = False

    def _refuse(self, prompt: Prompt, attempt: int) -> Verdict | None:
        if self.is_down or prompt.index % 10 == 0:
            return replace(REFUSED, error=ConfigError("check --model"))
        return None


async def test_rows_that_are_refused_each_time_end_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the start after ``--drop-failed``, which asks about these alone."""
    host = Picky()
    monkeypatch.setattr(generate_module, "make_backends", lambda config: [host])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"Why {n}?"}) + "\n" for n in range(150)))
    config = RunConfig.model_validate(
        {"recipe": "respond", "rows": rows, "out": tmp_path / "run", "semantic": False}
        | {"base_url": "http://127.0.0.1:9", "model": "m", "max_in_flight": 40}
    )
    await generate(config, SilentDisplay())
    kept = accepted(tmp_path / "run")
    assert len(kept) == 135
    for _ in range(2):
        done = await anyio.to_thread.run_sync(
            CliRunner().invoke, cli, ["redecide", str(tmp_path / "run"), "--drop-failed"]
        )
        assert done.exit_code == 0, done.output
        await generate(config, SilentDisplay())
        assert accepted(tmp_path / "run") == kept
