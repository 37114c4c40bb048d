"""A canary key goes through a whole run, one that is refused, and one that breaks: it shows
nowhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.server import Behaviour
from tests.crash.rig import ROOT, LedgerServer, Trial

pytestmark = pytest.mark.slow

KEY = "sk-CANARY7f3a9c5e1b2d4f608192a3b4c5d6e7f8"


@pytest.mark.parametrize("case", ["accepted", "refused", "fails", "injected"])
def test_the_canary_key_shows_nowhere(tmp_path: Path, case: str) -> None:
    """Not in the run's files, the log with --debug, tracebacks, the export, or the command line."""
    behaviour = Behaviour(api_key=KEY if case != "refused" else "sk-another-key-0000000000")
    env = os.environ | {"CANARY_KEY": KEY, "PYTHONFAULTHANDLER": "1"}
    if case == "fails":
        env["WOOLMILL_FAILPOINT"] = "store.commit:4:eio"
    if case == "injected":
        env["WOOLMILL_FAILPOINT"] = "export.written:1:eio"
    with LedgerServer(behaviour, tmp_path / "ledger") as server:
        trial = Trial(tmp_path / "trial", server.url, target=20, in_flight=4, seed=1)
        argv = [*trial.order("run")["argv"], "--key-env=CANARY_KEY"]
        process = subprocess.Popen(
            [sys.executable, "-m", "engine", "--debug", *argv],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        shown = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        shown += process.communicate()[0]
    assert process.returncode == {"accepted": 0, "refused": 77, "fails": 74, "injected": 74}[case]
    needle = KEY[3:15].encode()
    assert needle not in shown
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "run.sqlite" for path in written) or case == "refused"
    for path in written:
        assert needle not in path.read_bytes(), path
