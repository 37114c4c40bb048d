"""Page and report as a person sees them: on a phone, a tablet and a large screen, light and dark.

Nothing scrolls sideways, nothing is cut off, the console stays silent, and on a phone a row is one
tap from the list and one back.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from engine.report.html import html
from engine.store import RunReader
from engine.upkeep.redecide import redecide_run
from tests.engine import browser
from tests.engine.devtools import OUT_OF_PLACE, Tab, tab
from tests.engine.run.test_chain import accepted
from tests.engine.staged_runs import base, chain, made
from tests.engine.test_report import hostile_run
from tests.engine.test_view import page_rows, served, stage_rows

__all__ = ["base", "chain", "made"]  # fixtures

pytestmark = pytest.mark.slow

WIDTHS = (390, 800, 1400)
SCREENS = [(width, dark) for width in WIDTHS for dark in (False, True)]
LISTED = "document.body?.dataset.rows > 0"
OPENED = "document.querySelector('#one h2')"
READING = "getComputedStyle(document.querySelector('#list')).display === 'none'"


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Tab]:
    program = browser.find()
    if program is None:
        pytest.fail("Chromium is missing: apt-get install chromium", pytrace=False)
    with tab(program, tmp_path / "profile") as opened:
        yield opened


@pytest.fixture(scope="module", params=["ordinary", "hostile"])
def folder(
    request: pytest.FixtureRequest, run_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of ordinary rows, and one of rows that are long, wide and made to break pages."""
    if request.param == "ordinary":
        return run_folder
    return hostile_run(tmp_path_factory.mktemp("runs") / "hostile", "http://127.0.0.1:9")


@pytest.mark.timeout(120)
def test_the_page_fits_every_screen(folder: Path, screen: Tab) -> None:
    with served(folder) as page:
        for width, dark in SCREENS:
            screen.look_as(width, dark=dark)
            screen.open(page.link, until=LISTED)
            assert screen.ask(OUT_OF_PLACE) == [], width
            screen.ask("document.querySelector('#rows button').click()")
            screen.wait(OPENED)
            screen.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert screen.ask(OUT_OF_PLACE) == [], f"a row at {width}"
    assert screen.console == []


@pytest.mark.timeout(120)
def test_the_report_fits_every_screen(folder: Path, screen: Tab, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    with RunReader(folder) as run:
        path.write_text(html(run))
    for width, dark in SCREENS:
        screen.look_as(width, dark=dark)
        screen.open(path.as_uri(), until="document.body?.dataset.drawn")
        assert screen.ask(OUT_OF_PLACE) == [], width
        screen.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert screen.ask(OUT_OF_PLACE) == [], f"unfolded, at {width}"
    assert screen.console == []


def test_on_a_phone_a_tap_leads_to_a_row_and_another_back(run_folder: Path, screen: Tab) -> None:
    """By the button, and by the phone's own way back; to where the list was."""
    screen.look_as(390)
    with served(run_folder) as page:
        screen.open(page.link, until=LISTED)
        for way_back in ("button", "history"):
            screen.tap("#rows li:nth-child(12) button")
            screen.wait(OPENED)
            screen.wait(READING)
            listed = screen.ask("document.querySelector('#rows li:nth-child(12)').dataset.id")
            assert screen.ask("document.querySelector('#one h2').textContent") == f"row {listed}"
            assert screen.ask("location.hash") == f"#{listed}"
            assert screen.ask("scrollY") == 0
            if way_back == "button":
                screen.tap("#back")
            else:
                screen.ask("history.back()")
            screen.wait(f"!({READING})")
            assert screen.ask("location.hash") == ""
            place = screen.ask(
                "document.querySelector('#rows li:nth-child(12)').getBoundingClientRect().top"
            )
            assert 0 <= place < 844
    assert screen.console == []


def test_a_link_to_a_row_has_a_way_back_too(run_folder: Path, screen: Tab) -> None:
    screen.look_as(390)
    with served(run_folder) as page:
        screen.open(page.link, until=LISTED)
        row = screen.ask("document.querySelector('#rows li').dataset.id")
        screen.open(f"{page.url}/?again#{row}", until=OPENED)
        screen.wait(READING)
        screen.tap("#back")
        screen.wait(f"!({READING})")
        screen.wait("document.querySelectorAll('#rows li').length === 50")


def test_the_filter_follows_a_run_that_is_decided_again(
    run_folder: Path, screen: Tab, tmp_path: Path
) -> None:
    """A reason that is gone no longer hides all rows, and the rows are those of now."""
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    rows = page_rows(run)
    refused = rows.find("", status="refused", reason="duplicate_rouge")["matches"]
    assert refused
    choose = "const r = document.querySelector('#reason'); r.value = 'duplicate_rouge';"
    with served(run) as page:
        screen.look_as(1400)
        screen.open(page.link, until=LISTED)
        screen.ask(choose + "r.dispatchEvent(new Event('change'))")
        screen.wait(f"document.querySelectorAll('#rows li').length === {refused}")
        anyio.run(redecide_run, run, None, {"rouge_threshold": 1.0, "semantic": False})
        screen.wait("document.querySelector('#status').value === 'all'")
        screen.wait("document.querySelectorAll('#rows li').length === 50")
        assert screen.ask("document.querySelector('#reason').value") == ""
    assert rows.find("", status="refused", reason="duplicate_rouge")["matches"] == 0
    with RunReader(run) as now:
        assert rows.find("")["matches"] == now.counts().decided
    rows.close()


def test_words_are_found_in_every_stage_and_stand_in_the_address(chain: Path, screen: Tab) -> None:
    """Each other stage says how many it has, a tap leads there, and the address shows the same."""
    listed = "document.querySelectorAll('#rows li').length"
    ask, answer, judge = stage_rows(chain)
    words = accepted(chain)[0]["question"].split()[-1]  # a drawn word, which few rows have
    found = [stage.find(words, status="accepted")["matches"] for stage in (ask, answer, judge)]
    assert all(0 < count <= 50 for count in found)
    with served(chain) as page:
        for width in WIDTHS:
            screen.look_as(width)
            screen.open(f"{page.link}&status=accepted&q={words}", until=LISTED)
            screen.wait(f"{listed} === {found[2]}")
            told = screen.ask(
                "[...document.querySelectorAll('#elsewhere button')].map(b => b.textContent)"
            )
            assert told == [f"stage 1-ask: {found[0]}", f"stage 2-answer: {found[1]}"]
            assert screen.ask(OUT_OF_PLACE) == [], width
            screen.tap("#elsewhere button")
            screen.wait(f"{listed} === {found[0]}")
            wanted = f"?q={words}&status=accepted&stage=1-ask"
            assert screen.ask("location.search") == wanted
            screen.open(f"{page.url}/{wanted}", until=LISTED)
            screen.wait(f"{listed} === {found[0]}")
            assert screen.ask("document.querySelector('#words').value") == words
            screen.open(f"{page.url}/?status=refused&reason=low", until=LISTED)
            assert screen.ask("document.querySelector('#reason').value") == "low"
            refused = judge.find("", status="refused", reason="low")["matches"]
            screen.wait(f"{listed} === {refused}")
    assert screen.console == []
    for stage in (ask, answer, judge):
        stage.close()
