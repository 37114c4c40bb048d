"""Arrays that grow with an index."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from engine.dedup.memory import reserve, room


def test_a_larger_array_holds_what_the_smaller_one_held() -> None:
    for rows in (0, 3):
        array = reserve(np.uint32, rows, nbytes=4_096)
        array[..., :] = np.arange(1_024)
        assert room(array, 1_024) is array
        larger = room(array, 5_000)
        assert larger.ndim == array.ndim
        assert larger.shape[-1] >= 5_000
        assert (larger[..., :1_024] == array).all()
        assert not larger[..., 1_024:].any()


def test_too_little_address_space_is_one_line() -> None:
    code = (
        "import resource\n"
        "from engine.dedup.memory import reserve\n"
        "from engine.errors import UnavailableError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "try:\n"
        "    kept = [reserve('u1') for _ in range(8)]\n"
        "except UnavailableError as exc:\n"
        "    print(exc)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "256 MiB" in said.stdout
    assert said.stdout.count("\n") == 1
