"""Headless Chromium (Debian: ``apt-get install chromium``), and a server that counts what it asks.

A test that needs it takes the fixture ``chromium`` of this folder's ``conftest``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

__all__ = ["Chromium", "Seen", "canary", "find"]

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--enable-logging=stderr", "--v=0",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Seen:
    """A page after it has settled."""

    dom: str
    console: list[str]

    @property
    def title(self) -> str:
        found = re.search(r"<title>(.*?)</title>", self.dom, re.S)
        return found[1] if found else ""


class Chromium:
    """One command of the browser for each page; ``profile`` keeps its cookies."""

    def __init__(self, program: str, profile: Path) -> None:
        self._program = program
        self._profile = profile

    def open(self, url: str, *, settle_ms: int = 8000, dark: bool = False) -> Seen:
        done = self._run(url, "--dump-dom", settle_ms=settle_ms, dark=dark)
        console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        return Seen(dom=done.stdout, console=console)

    def screenshot(self, url: str, to: Path, *, dark: bool = False, height: int = 3200) -> None:
        size = f"--window-size=1200,{height}"
        self._run(url, f"--screenshot={to}", size, settle_ms=8000, dark=dark)

    def _run(
        self, url: str, *more: str, settle_ms: int, dark: bool
    ) -> subprocess.CompletedProcess[str]:
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        where = f"--user-data-dir={self._profile}"
        budget = f"--virtual-time-budget={settle_ms}"
        command = [self._program, *FLAGS, scheme, where, budget, *more, url]
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=50, check=True
        )


def find() -> str | None:
    """The browser's path, or None where it is not installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def canary() -> Iterator[tuple[str, list[str]]]:
    """A server that no page should ever ask: its address, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
