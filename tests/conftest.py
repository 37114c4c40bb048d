"""Fixtures for all tests, and the canary: a key that no test may leave anywhere.

The variable that keys are read from holds it from the start. At the end, everything that the tests
left in their temporary folders is searched for it, and the command lines of all processes were
while they ran.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

CANARY = "sk-CANARYsuite5d1e9a7c3b8f2046"
NEEDLE = CANARY[3:20].encode()
KEY_VARIABLE = "OPENAI_API_KEY"
LOOK_EVERY_S = 0.5
CHUNK = 1 << 20


@pytest.fixture
def anyio_backend() -> str:
    """The engine runs on asyncio."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set the key, look at command lines meanwhile, and search what is left at the end."""
    before = os.environ.get(KEY_VARIABLE)
    os.environ[KEY_VARIABLE] = CANARY
    end, shown = threading.Event(), set[str]()

    def look() -> None:
        while not end.wait(LOOK_EVERY_S):
            with suppress(OSError):  # a test took all descriptors: look again later
                shown.update(found_in_command_lines(NEEDLE))

    looking = threading.Thread(target=look, name="canary", daemon=True)
    looking.start()
    yield
    end.set()
    looking.join()
    if before is None:
        del os.environ[KEY_VARIABLE]
    else:
        os.environ[KEY_VARIABLE] = before
    shown.update(found_in_files(tmp_path_factory.getbasetemp(), NEEDLE))
    assert not shown, f"the canary key shows in {', '.join(sorted(shown))}"


def found_in_command_lines(needle: bytes) -> Iterator[str]:
    """Processes whose arguments hold ``needle``."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes()
        except OSError:
            continue  # it has ended
        if needle in arguments:
            yield f"{path} ({arguments.partition(bytes(1))[0].decode(errors='replace')})"


def found_in_files(folder: Path, needle: bytes) -> Iterator[str]:
    """Plain files below ``folder`` that hold ``needle``."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file() or not os.access(path, os.R_OK):
            continue
        with path.open("rb") as file:
            tail = b""
            while chunk := file.read(CHUNK):
                if needle in tail + chunk:
                    yield str(path)
                    break
                tail = chunk[-len(needle) :]
