"""A browser that can be a phone: Chromium by its DevTools protocol, over two pipes.

A window of headless Chromium is never narrower than 500 pixels; the protocol's emulation is, and it
tells of every message on the console. Messages are JSON with a zero byte behind each
(``--remote-debugging-pipe``: commands in on descriptor 3, answers out on 4).
"""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.engine.browser import FLAGS

__all__ = ["OUT_OF_PLACE", "Tab", "tab"]

TIMEOUT_S = 30.0
OUT_OF_PLACE = """(() => {
  const found = [], wide = document.documentElement.clientWidth;
  const name = (e) => `${e.tagName}#${e.id}.${e.className} ${e.textContent.slice(0, 40)}`;
  if (document.scrollingElement.scrollWidth > wide)
    found.push(`the page scrolls sideways: ${document.scrollingElement.scrollWidth} of ${wide}`);
  for (const element of document.querySelectorAll("body *")) {
    if (!element.checkVisibility()) continue;
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    if (!box.width || element.closest(".tip, [data-scrolls]")) continue;
    if (box.right > wide + 1 || box.left < -1) found.push(`beyond the edge: ${name(element)}`);
    const clips = style.overflowX !== "visible" && element.scrollWidth > element.clientWidth + 1;
    if (clips && style.textOverflow !== "ellipsis" && element.tagName !== "INPUT")
      found.push(`cut off: ${name(element)}`);
  }
  return found;
})()"""
"""What of a page's text and boxes a person cannot see without scrolling sideways."""


class Tab:
    """One page in a browser of its own. ``console`` has every warning, error and exception."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands = commands
        self._answers = answers
        self._unread = b""
        self._number = 0
        self._session: str | None = None
        self.console: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (heard := self._next()).get("id") != self._number:
            self._note(heard)
        assert "error" not in heard, f"{method}: {heard['error']}"
        result: dict[str, Any] = heard["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], TIMEOUT_S)
            assert ready, "the browser does not answer"
            self._unread += os.read(self._answers, 1 << 20)
        whole, _, self._unread = self._unread.partition(b"\0")
        heard: dict[str, Any] = json.loads(whole)
        return heard

    def _note(self, heard: dict[str, Any]) -> None:
        method, params = heard.get("method"), heard.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.console.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("warning", "error"):
            self.console.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("warning", "error"):
            self.console.append(str([arg.get("value") for arg in params["args"]]))

    def look_as(self, width: int, *, dark: bool = False, height: int = 844) -> None:
        """A screen of this width, touched and not clicked where it is a phone's."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=phone)  # fmt: skip
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str, *, until: str) -> None:
        """Open a page, and wait until an expression in it is true."""
        self.call("Page.navigate", url=url)
        self.wait(until)

    def wait(self, until: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not self.ask(f"Boolean({until})"):
            assert time.monotonic() < deadline, f"{until} never became true"
            time.sleep(0.05)

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def tap(self, selector: str) -> None:
        """Touch the middle of an element, as a finger does."""
        place = self.ask(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        point = {"x": place[0], "y": place[1]}
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def screenshot(self, to: Path, *, whole: bool = False) -> None:
        """A picture of what is seen, or of the whole page."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        to.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def tab(program: str, profile: Path) -> Iterator[Tab]:
    """A browser with one empty page."""
    commands_in, commands = os.pipe()
    answers, answers_out = os.pipe()
    flags = [*FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
    # The descriptors must have these two numbers in the browser.
    script = f'exec "$0" "$@" 3<&{commands_in} 4>&{answers_out}'
    process = subprocess.Popen(
        ["bash", "-c", script, program, *flags],
        pass_fds=(commands_in, answers_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_in)
    os.close(answers_out)
    try:
        yield Tab(commands, answers)
    finally:
        os.close(commands)
        process.terminate()
        process.wait(10)
        os.close(answers)
