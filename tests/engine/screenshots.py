"""Make the pictures in docs/ anew: ``python -m tests.engine.screenshots``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from engine.report.html import html
from engine.store import RunReader
from tests.engine import browser
from tests.engine.devtools import tab
from tests.engine.synthetic import synthetic_run
from tests.engine.test_view import served

DOCS = Path(__file__).parents[2] / "docs"


def main() -> None:
    """Page and report of a synthetic run, light and dark, and the page on a phone."""
    program = browser.find()
    assert program is not None, "Chromium is missing: apt-get install chromium"
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # so that the pictures show no path of this machine
        folder = synthetic_run(Path("runs/synthetic"), 400)
        report = Path(scratch, "report.html")
        with RunReader(folder) as run:
            report.write_text(html(run))
        with served(folder) as page, tab(program, Path(scratch, "profile")) as screen:
            for name, dark in (("light", False), ("dark", True)):
                screen.look_as(1400, dark=dark)
                screen.open(page.link, until="document.body?.dataset.rows > 0")
                screen.ask("document.querySelector('#rows li:nth-child(3) button').click()")
                screen.wait("document.querySelector('#one h2')")
                screen.screenshot(DOCS / f"view-{name}.png")
                screen.look_as(1120, dark=dark, height=900)
                screen.open(report.as_uri(), until="document.body?.dataset.drawn")
                screen.screenshot(DOCS / f"report-{name}.png", whole=True)
            screen.look_as(390)
            screen.open(page.link, until="document.body?.dataset.rows > 0")
            screen.screenshot(DOCS / "view-phone.png")


if __name__ == "__main__":
    main()
