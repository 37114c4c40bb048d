"""Rounds as curves: a page that draws, a table, a line; on the command line and in the view."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import anyio
import httpx
import pytest
from click.testing import CliRunner

from engine.cli.main import cli
from engine.errors import OutputError
from engine.loop.ledger import Ledger
from engine.loop.page import html, line_of, markdown
from engine.report.html import policy
from engine.view.app import Access, make_rounds_app
from tests.engine.browser import Chromium
from tests.engine.loop.test_ledger import DONE, START


@pytest.fixture
def loop(tmp_path: Path) -> Path:
    ledger = Ledger(tmp_path)
    ledger.begin(START)
    ledger.add(DONE)
    ledger.add(replace(DONE, number=2, loss_before=1.5, loss=1.75, kept=False, refused={"<b>": 1}))
    return tmp_path


def test_a_line_for_the_terminal(loop: Path) -> None:
    ledger = Ledger(loop)
    assert line_of(ledger.rounds[1], ledger) == (
        "round 2: held-out loss 1.5000 -> 1.7500 █▁▅, not kept; 5 rows, 5 per 1,000 tokens"
    )


@pytest.mark.slow
def test_the_curves_hold_the_figures_of_every_round(loop: Path) -> None:
    page = html(Ledger(loop))
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page)
    assert found is not None
    drawn = json.loads(found[1])
    # No round has a cosine.
    assert list(drawn) == ["loss", "per_1000_tokens", "distinct_verbs", "nearest_rouge_l"]
    assert [(p["round"], p["y"], p["became"]) for p in drawn["loss"]["data"]["values"]] == [
        (0, 2.0, "kept"),
        (1, 1.5, "kept"),
        (2, 1.75, "not kept"),
    ]
    assert [p["y"] for p in drawn["per_1000_tokens"]["data"]["values"]] == [5.0, 5.0]
    assert "<b> 1" not in page
    assert "&lt;b&gt; 1" in page
    assert policy().split("'")[1] in page


@pytest.mark.slow
def test_the_page_draws_in_a_browser(loop: Path, tmp_path: Path, chromium: Chromium) -> None:
    path = tmp_path / "rounds.html"
    path.write_text(html(Ledger(loop)))
    page = chromium.open(path.as_uri())
    assert page.console == []
    assert 'data-drawn="4"' in page.dom
    assert page.dom.count("<canvas") == 4


def test_the_report_of_a_loop_s_folder(loop: Path, tmp_path: Path) -> None:
    def report(*words: str) -> str:
        done = CliRunner().invoke(cli, ["report", str(loop), *words])
        assert done.exit_code == 0, done.output
        return done.output

    told = json.loads(report())
    assert [each["loss"] for each in told["rounds"]] == [1.5, 1.75]
    assert told["start"]["loss"] == 2.0
    table = report("--format", "md")
    assert table == markdown(Ledger(loop))
    assert re.search(r"\| 2 \| 1\.75 \| no \| 5 \| 4 \|", table)
    report("-o", str(tmp_path / "rounds.html"))
    assert (tmp_path / "rounds.html").read_text() == html(Ledger(loop))
    done = CliRunner().invoke(cli, ["report", str(loop), "-o", str(loop / "ledger.jsonl")])
    assert isinstance(done.exception, OutputError)


def test_the_view_follows_the_loop(loop: Path) -> None:
    """A page that asks for itself again, behind the guard of all pages."""
    token = "canary-token-0123456789-0123456789"
    access = Access(token=token, hosts=frozenset(["here:1"]), cookie="c")

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(make_rounds_app(loop, access))
        async with httpx.AsyncClient(transport=transport, base_url="http://here:1") as client:
            refused = await client.get("/")
            await client.get("/enter", params={"token": token})
            return [refused, await client.get("/"), await client.get("/api/rows")]

    refused, page, other = anyio.run(ask)
    assert refused.status_code == 401
    assert page.text == html(Ledger(loop), refresh_s=10)
    assert '<meta http-equiv="refresh" content="10">' in page.text
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert other.status_code == 404
