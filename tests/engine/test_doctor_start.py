"""The doctor begins a run as far as that is free: it reads the input and asks the servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.from_thread import start_blocking_portal
from click.testing import CliRunner

from benchmarks.server import Behaviour, Server
from engine.cli.doctor import diagnose
from engine.cli.main import cli
from engine.run.display import SilentDisplay
from engine.run.generate import generate
from engine.settings import load_config

pytestmark = pytest.mark.slow

NOBODY = "http://127.0.0.1:9/v1"


@contextmanager
def served(**behaviour: Any) -> Iterator[Server]:
    """A server that listens beside the test."""
    server = Server(Behaviour(**behaviour))
    with start_blocking_portal() as portal:
        portal.call(server.start)
        try:
            yield server
        finally:
            portal.call(server.stop)


def told(tmp_path: Path, *settings: str) -> tuple[dict[str, Any], str, int]:
    """What is found of the start, what the command says, and its status."""
    path = tmp_path / "run.toml"
    path.write_text("\n".join(settings))
    done = CliRunner().invoke(cli, ["doctor", "--config", str(path)])
    return diagnose(path)["start"], done.stdout, done.exit_code


def test_what_a_start_finds(tmp_path: Path) -> None:
    """The rows that can be read, and what the server serves; nothing is generated."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Why?"}\n' * 3)
    with served() as server:
        settings = (f'base_url = "{server.url}/v1"', 'recipe = "respond"', f'rows = "{rows}"')
        start, said, status = told(tmp_path, *settings)
        assert (start["rows"], start["bad_rows"], status) == (3, 0, 0)
        assert "all 3 input rows can be read" in said
        assert f"{server.url} serves toy, context 4,096 tokens" in said
        rows.write_text('{"question": "Why?"}\n{"question":\n')
        _, said, status = told(tmp_path, *settings, 'on_bad_row = "skip"')
        assert (status, "all 1 input rows can be read, 1 are left out" in said) == (0, True)
        assert not server.ledger.asked


@pytest.mark.parametrize(
    ("lines", "settings", "status", "says"),
    [
        ('{"question": "Why?"}\n{"question":\n', (), 65, "rows.jsonl:2: not JSON"),
        ("", (), 65, "rows.jsonl"),
        (None, (), 65, "rows.jsonl: cannot be read"),
        ('{"question": "Why?"}\n', ('carry = ["id"]',), 78, "--carry id"),
        ('{"question": "Why?"}\n', ('model = "other"',), 78, "does not serve 'other' but toy"),
    ],
)
def test_it_ends_as_the_start_of_the_run(
    tmp_path: Path, lines: str | None, settings: tuple[str, ...], status: int, says: str
) -> None:
    """The same error, and the same status."""
    rows = tmp_path / "rows.jsonl"
    if lines is not None:
        rows.write_text(lines)
    with served() as server:
        start, said, ended = told(
            tmp_path,
            f'base_url = "{server.url}/v1"',
            'recipe = "respond"',
            f'rows = "{rows}"',
            f'out = "{tmp_path / "run"}"',
            *settings,
        )
        assert ended == status
        assert says in start["error"]
        assert f"problem: {start['error']}" in said
        error: BaseException | None
        try:
            config = load_config(tmp_path / "run.toml", {})
            error = anyio.run(generate, config, SilentDisplay()).stop.error
        except Exception as raised:  # noqa: BLE001 - whatever ends the run is compared
            error = raised
    assert (str(error), getattr(error, "exit_code", None)) == (start["error"], status)


def test_a_context_that_is_too_short(tmp_path: Path) -> None:
    with served(max_model_len=90) as server:
        _, said, status = told(tmp_path, f'base_url = "{server.url}/v1"')
    assert status == 78
    assert "of the 90 tokens of the context" in said


def test_seeds_that_are_not_there(tmp_path: Path) -> None:
    _, said, status = told(tmp_path, f'base_url = "{NOBODY}"', 'seeds = "none.jsonl"')
    assert status == 65
    assert "problem: none.jsonl: cannot be read" in said


def test_servers_that_do_not_answer(tmp_path: Path) -> None:
    """None: the run could not begin, or would wait. One of two: it could, and that is a problem."""
    _, said, status = told(tmp_path, f'base_url = "{NOBODY}"', "wait_for_server_s = 900")
    assert status == 69
    assert "problem: http://127.0.0.1:9: no answer (connect_refused" in said
    assert "would wait up to 900 s for it (--wait-for-server)" in said
    with served() as server:
        start, said, status = told(tmp_path, f'base_url = ["{server.url}/v1", "{NOBODY}"]')
    assert (status, len(start["servers"])) == (1, 2)
    assert f"{server.url} serves toy" in said
    assert "problem: http://127.0.0.1:9: no answer" in said


def test_a_key_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status is that of a wrong key, which is not shown."""
    monkeypatch.setenv("A_KEY", "sk-not-the-right-one-0123456789")
    with served(api_key="sk-right-0123456789") as server:
        settings = (f'base_url = "{server.url}/v1"', 'key_env = "A_KEY"')
        _, said, status = told(tmp_path, *settings)
    assert status == 77
    assert "0123456789" not in said
