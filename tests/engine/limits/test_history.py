"""Why a limit is where it is: what is remembered of its changes, and who is told."""

from __future__ import annotations

import io
import json
import logging
from functools import partial
from pathlib import Path

import pytest

from benchmarks.bench_limits import Scenario, Simulated, simulate
from benchmarks.virtual_time import run
from engine.backends.scripted import ScriptedBackend
from engine.limits import News
from engine.limits.finder.finder import Adaptive
from engine.limits.history import KEPT, History, Witness
from engine.run import generate as generate_module
from engine.run.display import JsonDisplay
from engine.run.generate import generate
from engine.settings import RunConfig
from engine.store import RunReader
from engine.view.rows import Rows

pytestmark = pytest.mark.slow


def test_a_change_is_one_of_the_whole_number() -> None:
    """4.2 to 4.9 changes nothing that anybody sees; the reason is the latest all the same."""
    history = History(Witness.START, "began")
    history.note(4.2, 4.9, Witness.GOODPUT, "a little more")
    assert (history.count, history.why, history.who) == (0, "a little more", Witness.GOODPUT)
    history.note(4.9, 7.0, Witness.REFUSALS, "refused with 7 in flight")
    (change,) = history.changes
    assert change.plain("here") == {
        "endpoint": "here", "at_s": round(change.at_s, 3), "old": 4, "new": 7,
        "who": "refusals", "why": "refused with 7 in flight",
    }  # fmt: skip


def test_only_the_latest_changes_are_kept() -> None:
    history = History(Witness.START, "")
    for new in range(1, KEPT + 51):
        history.note(new - 1, new, Witness.START, "")
    assert history.count == KEPT + 50
    assert [change.new for change in history.changes] == list(range(51, KEPT + 51))
    assert [change.new for change in history.since(KEPT + 48)] == [KEPT + 49, KEPT + 50]
    assert len(history.since(0)) == KEPT


def test_news_are_told_once() -> None:
    news, one, other = News(), History(Witness.START, ""), History(Witness.START, "")
    one.name, other.name = "one", "other"
    one.note(4, 8, Witness.START, "")
    other.note(4, 2, Witness.REFUSALS, "")
    told = news.of([other, one])
    assert [(name, change.new) for name, change in told] == [("one", 8), ("other", 2)]
    assert news.of([other, one]) == []
    one.note(8, 16, Witness.START, "")
    assert [change.new for _, change in news.of([other, one])] == [16]


def test_a_debug_log_names_endpoint_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    history = History(Witness.START, "")
    history.name = "http://127.0.0.1:8000"
    with caplog.at_level(logging.DEBUG, logger="engine.limits.history"):
        history.note(16, 7, Witness.REFUSALS, "refused with 7 in flight")
    assert caplog.messages == [
        "http://127.0.0.1:8000: limit 16 -> 7 in flight (refusals: refused with 7 in flight)"
    ]


def found(**server: object) -> History:
    """The history of a limit that was found before a simulated server for a minute and a half."""
    made = []

    def make() -> Adaptive:
        made.append(Adaptive())
        return made[-1]

    simulated = partial(Simulated, **server)  # type: ignore[arg-type]
    scenario = Scenario(name="", server=simulated, best=lambda server: 1.0, seconds=90)
    run(simulate(scenario, make))
    return made[0].history


def test_a_run_that_sits_at_seven_says_why() -> None:
    """A server of seven slots: the reason names the number at which it refused."""
    history = found(slots=7)
    assert history.changes[-1].new in (6, 7, 8)
    assert history.who is Witness.REFUSALS
    assert "refused with 7 in flight" in history.why


def test_a_limit_by_the_clock_names_the_setting() -> None:
    """Rate limits that no header tells are the user's to set."""
    whys = [change.why for change in found(bucket_per_min=600).changes]
    assert any("set --requests-per-min" in why for why in whys)


@pytest.mark.anyio
async def test_changes_are_events_and_stay_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose limit is found: the JSON display has each change, and so have store and page,
    those of an earlier session first.
    """
    folder, stream = tmp_path / "run", io.StringIO()

    async def go(target: int) -> None:
        backend = ScriptedBackend(max_in_flight=None, delay_s=lambda prompt: 0.05)
        monkeypatch.setattr(generate_module, "make_backends", lambda config: [backend])
        settings = {"backend": "scripted", "out": folder, "target": target, "semantic": False}
        await generate(RunConfig.model_validate(settings), JsonDisplay(stream, every_s=0))

    await go(400)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    told = [event for event in events if event["event"] == "limit"]
    assert [(event["old"], event["new"], event["who"]) for event in told][:1] == [(4, 8, "goodput")]
    with RunReader(folder) as reader:
        kept = reader.limits()
    assert kept[: len(told)] == [
        {name: value for name, value in event.items() if name not in ("event", "time")}
        for event in told
    ]
    await go(800)
    with RunReader(folder) as reader:
        both = reader.limits()
    assert both[: len(kept)] == kept
    assert len(both) > len(kept)
    rows = Rows(folder, None)
    assert rows.state()["limits"] == both[-50:]
    rows.close()
