"""A budget is that of the run, however often it is started: what may have been billed without an
answer stays booked, as one that counts beside the run knows it.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from benchmarks.server import Behaviour, Server
from engine.backends.base import Verdict
from engine.backends.scripted import ScriptedBackend
from engine.errors import StoppedError
from engine.records import Prompt
from engine.report.figures import figures
from engine.run import generate as generate_module
from engine.run.deliver import most_tokens
from engine.run.display import SilentDisplay
from engine.run.generate import Result, generate
from engine.run.progress import Progress
from engine.settings import RunConfig
from engine.store import RunReader, RunStore
from tests.engine.store_rows import MANIFEST, answer, fill, prompt
from tests.engine.test_pipeline import Watcher

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

ROOT = Path(__file__).parents[2]
CUT = Verdict(kind="ambiguous", reason="cut_body")
BUSY = Verdict(kind="throttled", reason="http_429")


class Host(ScriptedBackend):
    """Knows the most that it can bill for the attempts that gave no answer."""

    def __init__(self, fails: Verdict, every: int) -> None:
        super().__init__(fault=self._bill, max_in_flight=None)
        self.billed = 0
        self._fails, self._every = fails, every

    def _bill(self, prompt: Prompt, attempt: int) -> Verdict | None:
        if self.calls.total() % self._every == 0:
            return None
        self.billed += most_tokens(prompt) if self._fails.billed else 0
        return self._fails


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(CUT, every=8)
    monkeypatch.setattr(generate_module, "make_backends", lambda config: [host])
    return host


async def started(folder: Path, watcher: Watcher | None = None, **settings: object) -> Result:
    config = {"backend": "scripted", "out": folder, "semantic": False, "target": 200, **settings}
    display = watcher or SilentDisplay()
    return await generate(RunConfig.model_validate({"max_attempts": 50, **config}), display)


def booked(folder: Path) -> tuple[int, int]:
    """Tokens of answers, and of attempts without one."""
    with RunReader(folder) as run:
        counts = run.counts()
    return counts.tokens, counts.lost_tokens


async def test_a_budget_holds_over_all_starts(tmp_path: Path, host: Host) -> None:
    """Seven of eight answers are cut off: no start forgets those of the starts before."""
    for _ in range(5):
        result = await started(tmp_path, max_tokens_total=60_000)
        assert isinstance(result.stop.error, StoppedError)
        assert "raise --max-tokens-total" in str(result.stop.error)
        assert booked(tmp_path)[1] == host.billed > 0
        assert sum(booked(tmp_path)) <= 60_000
    cut = host.billed
    result = await started(tmp_path, max_tokens_total=120_000)  # a higher one goes on
    assert host.billed > cut
    assert booked(tmp_path)[1] == host.billed
    assert 60_000 < sum(booked(tmp_path)) <= 120_000


async def test_a_cost_is_bounded_likewise(tmp_path: Path, host: Host) -> None:
    """At the dearest token's price; the report tells it beside the cost of the answers."""
    prices: dict[str, Any] = {"price_prompt": 1.0, "price_completion": 5.0, "max_cost": 0.3}
    for _ in range(3):
        result = await started(tmp_path, **prices)
        assert isinstance(result.stop.error, StoppedError)
        with RunReader(tmp_path) as run:
            told = figures(run)
        assert told["tokens_without_answer"] == host.billed
        assert told["cost_without_answer"] == pytest.approx(host.billed * 5e-6)
        assert told["cost"] + told["cost_without_answer"] <= 0.3


@pytest.mark.parametrize(("fault", "most"), [("cut", 900), ("reset", 10**9)])
async def test_a_cut_off_answer_is_booked_by_what_came_of_it(
    tmp_path: Path, fault: str, most: int
) -> None:
    """And not by all that it was allowed; of one that was reset before it began, nobody knows."""
    behaviour = Behaviour(fault_rate=0.3, faults=(fault,), records=1)
    async with Server(behaviour) as server:
        settings: dict[str, Any] = {"backend": "http", "base_url": server.url, "target": 12}
        settings["max_tokens"] = 2000
        result = await started(tmp_path, **settings)
        assert result.stop.reached
        failed = server.ledger.faults[fault]
    _, lost = booked(tmp_path)
    assert failed > 0
    assert 0 < lost / failed < most
    assert fault == "cut" or lost / failed > 2000


async def test_what_a_stop_does_not_wait_for_stays_booked(tmp_path: Path, host: Host) -> None:
    """Calls on the wire may have been billed; what is still to be sent again is not."""
    host._fault = None
    host._delay_s = lambda asked: 0.0 if asked.index < 10 else 3600.0

    def leave(progress: Progress) -> None:
        if progress.answered >= 10 and progress.calls == 12:
            os.kill(os.getpid(), signal.SIGINT)

    with anyio.fail_after(20):
        stopped = await started(tmp_path, Watcher(leave), max_in_flight=12)
    assert stopped.progress.dropped == 12
    host._delay_s = 0.0
    lost = booked(tmp_path)[1]
    assert 12 * 1024 < lost < 12 * 4096
    with RunReader(tmp_path) as run:
        counts = run.counts()
    watcher = Watcher()
    await started(tmp_path, watcher, target=40)
    refused = counts.decided - counts.accepted
    assert watcher.notes[0] == (
        f"going on with 10 answers: {counts.accepted} rows accepted, {refused} refused"
    )
    assert re.fullmatch(
        r"sending again 12 requests without an answer, of which 12 may have been billed: numbers "
        r"10, 11, (\d+, ){5}\d+ …",
        watcher.notes[1],
    )
    assert booked(tmp_path)[1] == lost  # answered now, and billed twice for all that is known


async def test_what_was_refused_costs_nothing(tmp_path: Path, host: Host) -> None:
    """A 429 is not billed, neither while the run waits nor after it."""
    host._fails = BUSY
    host._every = 10**9
    result = await started(tmp_path, max_outage_s=1.0)
    assert isinstance(result.stop.error, StoppedError)
    assert booked(tmp_path) == (0, 0)
    assert result.progress.dropped == 0
    with RunReader(tmp_path) as run:
        told = figures(run)
    assert told["dropped_at_a_stop"] == 0
    assert told["waiting_at_a_stop"] == told["requests"] > 0
    watcher = Watcher()
    await started(tmp_path, watcher, max_outage_s=1.0)
    assert any("sending again" in note for note in watcher.notes)
    assert not any("billed" in note for note in watcher.notes)


async def test_a_kill_forgets_no_request_under_way(tmp_path: Path) -> None:
    """Eight calls were under way when the process was killed, and the budget has room for eight."""
    folder = tmp_path / "run"
    command = [
        *[sys.executable, "-m", "engine", "generate", "--no-semantic", "--out", str(folder)],
        *["--price-prompt", "1000", "--price-completion", "1000", "--max-in-flight", "8"],
        *["--max-tokens", "100"],
    ]
    async with Server(Behaviour(latency_s=600.0)) as server:
        command += ["--base-url", server.url]
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while server.ledger.asked.total() < 8:  # noqa: ASYNC110 - another process brings them
            await anyio.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        await process.wait()
        _, lost = booked(folder)
        assert 8 * 100 < lost < 8 * 4096
        most = lost / 1000
        again = await asyncio.create_subprocess_exec(
            *command, "--max-cost", f"{most + 0.05:.3f}",
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        out, err = await again.communicate()
        assert again.returncode == 75
        assert "raise --max-cost" in err.decode()
        assert server.ledger.asked.total() == 8
    figure = re.search(
        r"cost 0\.00, and up to (\S+) for attempts of which no answer is kept", out.decode()
    )
    assert figure is not None
    assert float(figure[1]) == pytest.approx(most, abs=0.01)
    assert booked(folder) == (0, lost)


async def test_answers_that_are_not_kept_were_paid(tmp_path: Path) -> None:
    """A second answer to a request, and those that are dropped to be asked anew."""
    await fill(tmp_path, 4)
    store = RunStore.open(tmp_path, MANIFEST)
    store.drop_answers([2, 3])
    await store.answered([answer(0, "again")])
    await store.aclose()
    with RunReader(tmp_path) as run:
        counts = run.counts()
    assert (counts.tokens, counts.wasted, counts.lost_tokens) == (2 * 10, 3, 3 * 10)


async def test_what_is_reserved_is_booked_with_the_request(tmp_path: Path) -> None:
    store = RunStore.open(tmp_path, MANIFEST)
    await store.sent([prompt(0), prompt(1)], "m", reserved=300)
    assert store.counts().lost_tokens == 300
    store.lost(100)  # an attempt is cut off, and the next one goes out
    await store.answered([answer(0), answer(1)], reserved=300)
    assert store.counts().lost_tokens == 100
    await store.aclose()
