"""What a run shows while it goes on."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest
from rich.console import Console

from engine.backends.scripted import ScriptedBackend
from engine.decide.process import Batch
from engine.limits import LimitSettings, Pool
from engine.money import Prices
from engine.run import generate as generate_module
from engine.run import wording
from engine.run.display import Guarded, JsonDisplay, JsonLog, PlainDisplay, SilentDisplay
from engine.run.generate import generate
from engine.run.live import LiveDisplay, block
from engine.run.pipeline.decisions import Decisions
from engine.run.progress import Progress
from engine.run.slow_start import SlowStart
from engine.run.status import Speed, told
from engine.run.wording import clock, summary
from engine.settings import RunConfig
from engine.store.inserts import Inserts
from engine.store.writer import Work

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def progress(answers: int = 100) -> Progress:
    """A run after ``answers`` answers of 10 + 20 tokens and 2 accepted records each."""
    return Progress(
        target=1000,
        accepted=2 * answers,
        sent=answers + 8,
        answered=answers,
        decided_answers=answers - 3,
        to_decide=3,
        failed=2,
        prompt_tokens=10 * answers,
        completion_tokens=20 * answers,
        reasons=Counter({"duplicate_rouge": 30, "evil\x1b[2J": 10}),
    )


def pool(**settings: Any) -> Pool:
    backends = [ScriptedBackend(name=f"http://127.0.0.1:{port}") for port in (8000, 8001)]
    return Pool(backends, LimitSettings.model_validate(settings))


def measured(answers: int) -> Speed:
    """A clock that saw ``answers`` answers in ten seconds."""
    at = Clock()
    speed = Speed(at)
    speed.note(progress(100))
    at.now = 10.0
    speed.note(progress(100 + answers))
    return speed


def test_few_answers_do_not_make_the_time_left_jump() -> None:
    """One in ten seconds: a window of thirty would say 0.07 to 0.13 a second in turn."""
    at = Clock()
    speed, rates = Speed(at), []
    for second in range(400):
        at.now = float(second)
        speed.note(progress(second // 10))
        if second > 200:
            rates.append(speed.steady_per_s()[0])
    assert max(rates) - min(rates) < 0.01


def drawn(width: int = 110) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    state = told(progress(200), pool(prices=Prices(prompt=1e6)), measured(100))
    console.print(block(state))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def shown(state: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    console.print(block(state))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


async def test_rows_not_compared_by_meaning_are_shown() -> None:
    """In the block and in the line, and only where there are some."""
    now = progress()
    assert "meaning" not in shown(told(now, pool(), Speed()))
    assert "meaning" not in summary(told(now, pool(), Speed()))
    now.unread = 1_200
    assert "1,200 accepted rows not compared by it" in shown(told(now, pool(), Speed()))
    assert "not compared by meaning 1,200" in summary(told(now, pool(), Speed()))


async def test_rates_money_and_time_left_are_told() -> None:
    state = told(progress(200), pool(prices=Prices(prompt=1000)), measured(100))
    assert state["answers_per_s"] == 10.0
    assert state["prompt_tokens_per_s"] == 100.0
    assert state["completion_tokens_per_s"] == 200.0
    assert state["left_s"] == 29.7  # 600 records at 20 a second; 3 answers wait to be decided
    assert state["tokens_per_accepted"] == 15.0
    assert state["cost"] == 2.0
    assert state["cost_at_end"] == 4.925
    assert [endpoint["name"] for endpoint in state["endpoints"]] == [
        "http://127.0.0.1:8000",
        "http://127.0.0.1:8001",
    ]


def test_rates_forget_what_is_long_past() -> None:
    """A run that was fast and stands still is shown as standing still."""
    at = Clock()
    speed = Speed(at)
    for second in range(100):
        at.now = float(second)
        speed.note(progress(min(100 + 10 * second, 300)))
    assert speed.per_s() == (0.0, 0.0, 0.0, 0.0)


async def test_the_block_says_what_a_person_decides_by() -> None:
    text = drawn()
    parts = ["accepted 400/1,000  40%", "0:30 left", "for an accepted record", "cost"]
    parts += ["held back by", "http://127.0.0.1:8001", "duplicate_rouge 75%", "2 failed"]
    for part in parts:
        assert part in text


async def test_security_14_a_servers_text_has_no_terminal_codes() -> None:
    """A reason is a server's own word; its escape sequences are shown, not obeyed."""
    assert "\x1b" not in drawn()
    assert "evil⟨U+001B⟩[2J" in drawn()


async def test_a_backlog_of_decisions_is_named() -> None:
    slow = progress(2000)
    slow.decided_answers, slow.to_decide = 100, 1900
    stream = io.StringIO()
    display = JsonDisplay(stream, every_s=0)
    display.refresh(slow, pool())
    assert json.loads(stream.getvalue())["binds"] == "deciding (1,900 answers wait)"


async def test_a_disk_that_holds_the_run_back_is_named() -> None:
    """It is when more than half of the calls wait for their commit, not for a server."""
    slow = progress()
    slow.calls, slow.calls_at_disk = 128, 64
    assert "disk" not in summary(told(slow, pool(), Speed()))
    slow.calls_at_disk = 65
    assert "disk" not in summary(told(slow, pool(), Speed()))  # all are recorded at the start
    slow.session_answered = 1
    assert "held back by disk (65 of 128 calls wait for it)" in summary(told(slow, pool(), Speed()))


async def test_the_disk_is_named_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run whose commits take long and whose answers take no time."""
    commit = Inserts.commit

    def slow(self: Inserts, group: Sequence[Work]) -> None:
        time.sleep(0.1)
        commit(self, group)

    monkeypatch.setattr(Inserts, "commit", slow)
    stream = io.StringIO()
    config = RunConfig.model_validate(
        {"backend": "scripted", "out": tmp_path / "run", "target": 200, "semantic": False}
    )
    await generate(config, JsonDisplay(stream, every_s=0))
    events = map(json.loads, stream.getvalue().splitlines())
    binds = [event["binds"] for event in events if event["event"] == "progress"]
    assert any(bind.startswith("disk (") for bind in binds), binds


async def test_tokens_in_the_making_count_once() -> None:
    """They make the rate while an answer is under way, and its arrival adds none to it."""
    at = Clock()
    speed, now = Speed(at), Progress(target=10)
    speed.note(now)
    for second in range(1, 11):
        at.now, now.tokens_in_the_making = float(second), 5 * second
        speed.note(now)
    assert speed.per_s()[3] == 5.0
    state = told(now, pool(), speed)
    assert "5 tokens/s · 50 in the making" in summary(state)
    at.now, now.tokens_in_the_making, now.completion_tokens = 11.0, 0, 55
    speed.note(now)
    assert speed.per_s()[3] == 5.0
    now.completion_tokens = 0  # as if the answer had been dropped
    at.now = 12.0
    speed.note(now)
    assert speed.per_s()[3] == 0.0


def waiting(**changed: Any) -> dict[str, Any]:
    """The state of a run, with nothing to wait for but what is ``changed``."""
    state = told(Progress(target=10, session_answered=1), pool(), Speed())
    server = changed.pop("server", {})
    state["endpoints"][0].update(server)
    return state | changed


HELD_BACK = {
    "one answer": (
        {"server": {"in_flight": 1, "oldest_s": 95.2}},
        "waiting for 1 answer from http://127.0.0.1:8000, the oldest for 95 s",
    ),
    "the first answers": (
        {"server": {"in_flight": 8, "oldest_s": 3.0}, "first_answers": True},
        "waiting for the first answers: 8 calls to http://127.0.0.1:8000",
    ),
    "the first answers at the limit": (
        {"server": {"in_flight": 8, "oldest_s": 3.0, "binds": "limit"}, "first_answers": True},
        "waiting for the first answers: 8 calls to http://127.0.0.1:8000",
    ),
    "the limit": (
        {"server": {"in_flight": 64, "binds": "limit"}},
        "held back by limit (waiting for 64 answers from http://127.0.0.1:8000)",
    ),
    "a limit that was found": (
        {"server": {"in_flight": 7, "binds": "limit", "limit_why": "refused with 7 in flight"}},
        "held back by limit (waiting for 7 answers from http://127.0.0.1:8000; refused with 7 in "
        "flight)",
    ),
    "a scout": (
        {"server": {"in_flight": 1}, "learning_context": True},
        "held back by learning the context length (one call at a time)",
    ),
    "a pause": ({"server": {"in_flight": 1, "binds": "pause"}}, "held back by pause"),
    "an outage": (
        {"server": {"state": "open", "binds": "outage", "failure": "connect_refused: no"}},
        "held back by outage (http://127.0.0.1:8000: connect_refused: no)",
    ),
    "an outage whose only call rests": (
        {"server": {"state": "probing", "failure": "timeout: no"}, "learning_context": True},
        "held back by outage (http://127.0.0.1:8000: timeout: no)",
    ),
    "servers that have left": (
        {"endpoints": []},
        "held back by outage (all servers have left)",
    ),
    "one long decision": (
        {"undecided": 1, "to_decide": 1, "deciding_s": 12.0, "server": {"in_flight": 1}},
        "held back by deciding (1 answers wait, for 12 s)",
    ),
    "few decisions": ({"undecided": 3, "to_decide": 3}, "held back by deciding (3 answers)"),
    "an answer in between": ({"undecided": 3}, "waiting to ask again; 3 answers behind it"),
    "many behind one": (
        {"undecided": 3000, "server": {"in_flight": 1}},
        "waiting for 1 answer from http://127.0.0.1:8000",
    ),
    "a stop": (
        {"draining": True, "drain_left_s": 73.4, "calls": 4, "server": {"in_flight": 4}},
        "draining (waiting for 4 answers from http://127.0.0.1:8000, 73 s left)",
    ),
    "the end of a stop": (
        {"draining": True, "drain_left_s": 73.4, "undecided": 3},
        "draining (waiting for the decisions)",
    ),
}


@pytest.mark.parametrize(("changed", "said"), HELD_BACK.values(), ids=HELD_BACK)
async def test_what_holds_a_run_back_is_always_named(changed: dict[str, Any], said: str) -> None:
    """Or what it waits for, which is no fault of anything."""
    line = summary(waiting(**changed))
    assert f" · {said}" in line
    assert ("held back by" in line) == said.startswith("held back by")
    assert said in " ".join(shown(waiting(**changed)).split())


async def test_the_live_view_says_why_a_limit_is_where_it_is() -> None:
    """Under the endpoint, whatever holds the run back; nothing under a number that was given."""
    found = {"in_flight": 3, "limit": 7, "limit_why": "refused with 7 in flight"}
    assert "limit 7: refused with 7 in flight" in shown(waiting(server=found))
    assert "limit 64:" not in shown(waiting())


async def test_nothing_is_said_where_nothing_holds_the_run_back() -> None:
    assert "held back" not in summary(waiting())
    assert "held back" not in shown(waiting())


async def test_slow_first_answers_are_explained_once() -> None:
    """After a minute without any, a line says what was seen and what to look at: the server where
    nothing came at all, the length of answers where they are under way.
    """
    notes: list[str] = []

    class Notes(SilentDisplay):
        def note(self, message: str) -> None:
            notes.append(message)

    class Waiting:
        in_flight = 16

        def __init__(self, oldest_s: float) -> None:
            self._oldest_s = oldest_s

        def snapshot(self) -> list[Any]:
            return [SimpleNamespace(oldest_s=self._oldest_s)]

    config = RunConfig.model_validate({"backend": "scripted"})
    display = SlowStart(Notes(), config)
    for oldest_s in (1.0, 59.0, 61.0, 90.0):
        display.refresh(Progress(target=10), cast(Pool, Waiting(oldest_s)))
        assert len(notes) == (oldest_s > 60)
    assert notes[0].startswith("nothing has come for 61 s of 16 requests that went out. The server")
    assert "its own log says so, and --first-token-s ends the wait" in notes[0]
    assert "3,072 tokens: with a lower --max-tokens" in notes.pop()
    display = SlowStart(Notes(), config)
    making = Progress(target=10, tokens_in_the_making=1200)
    display.refresh(making, cast(Pool, Waiting(61.0)))
    assert notes[0].startswith("no answer is at its end yet, after 61 s; 1,200 tokens have come: ")
    assert "server" not in notes[0]
    assert "OMP_NUM_THREADS" not in notes.pop()
    here = RunConfig.model_validate({"backend": "transformers"})
    SlowStart(Notes(), here).refresh(making, cast(Pool, Waiting(61.0)))
    assert "OMP_NUM_THREADS=1" in notes.pop()
    display = SlowStart(Notes(), config)
    display.refresh(Progress(target=10, session_answered=1), cast(Pool, Waiting(1.0)))
    display.refresh(Progress(target=10, session_answered=1), cast(Pool, Waiting(90.0)))
    assert not notes


async def test_waiting_is_named_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run of a slow server, and a deciding process that is stuck on one answer."""
    monkeypatch.setattr(wording, "LATE_S", 0.5)
    monkeypatch.setattr(wording, "STUCK_S", 0.3)
    backend = ScriptedBackend(delay_s=lambda prompt: 1.2 if prompt.index == 0 else 0.4)
    monkeypatch.setattr(generate_module, "make_backends", lambda config: [backend])
    count_decisions, stopped = Decisions._count, anyio.Event()

    def stuck(self: Decisions, batch: Batch) -> None:
        process = self._deciding._process
        assert process is not None
        if not stopped.is_set():
            stopped.set()
            os.kill(process.pid, signal.SIGSTOP)
            asyncio.get_running_loop().call_later(1.0, os.kill, process.pid, signal.SIGCONT)
        count_decisions(self, batch)

    monkeypatch.setattr(Decisions, "_count", stuck)
    stream = io.StringIO()
    config = RunConfig.model_validate(
        {"backend": "scripted", "out": tmp_path / "run", "target": 40, "semantic": False}
    )
    await generate(config, JsonDisplay(stream, every_s=0))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    states = [event for event in events if event["event"] == "progress"]
    binds = [state["binds"] for state in states]
    for part in (
        "waiting for the first answers: ",
        "waiting for 1 answer from scripted, the oldest for 1 s",
        "deciding (",
    ):
        assert any(part in bind for bind in binds), binds
    # Between two waves of calls there is a moment in which none is under way.
    idle = [state for state in states if state["binds"] == "nothing"]
    assert not any(s["calls"] or s["undecided"] or s["calls_at_disk"] for s in idle), idle


async def test_plain_lines_and_notes() -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream, every_s=0)
    display.refresh(progress(), pool())
    display.note("look\x1b[31m")
    first, second = stream.getvalue().splitlines()
    assert first.startswith("woolmill: accepted 200/1,000 · answers 100 · in flight 0/128")
    assert second == "woolmill: look⟨U+001B⟩[31m"


async def test_json_lines_are_whole_objects() -> None:
    stream = io.StringIO()
    display = JsonDisplay(stream, every_s=0)
    display.refresh(progress(), pool())
    display.note("two\nlines")
    record = logging.LogRecord("engine.x", logging.WARNING, "", 0, "half of %s", ("it",), None)
    events = [
        json.loads(line) for line in [*stream.getvalue().splitlines(), JsonLog().format(record)]
    ]
    assert [event["event"] for event in events] == ["progress", "note", "log"]
    assert events[0]["accepted"] == 200
    assert events[1]["message"] == "two\nlines"
    assert events[2]["message"] == "half of it"
    assert all(event["time"].endswith("+00:00") for event in events)


async def test_a_listener_that_went_away_does_not_end_the_run() -> None:
    stream, other = io.StringIO(), io.StringIO()
    display = Guarded(PlainDisplay(stream, every_s=0), PlainDisplay(other, every_s=0))
    stream.close()
    display.refresh(progress(), pool())
    other.close()
    display.note("still here")
    display.refresh(progress(), pool())


async def test_the_live_block_leaves_nothing_behind() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with LiveDisplay(console) as display:
        display.refresh(progress(), pool())
        display.note("one line that stays")
    assert isinstance(console.file, io.StringIO)
    assert "one line that stays" in console.file.getvalue()


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03")])
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
