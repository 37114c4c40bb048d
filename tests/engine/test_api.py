"""Woolmill in Python: each row once and in order, whatever becomes of the program."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import datasets
import numpy as np
import pandas
import pytest

import engine
from benchmarks.server import Behaviour
from engine.errors import AuthError, ConfigError, InputError, OutputError, StoppedError
from engine.recipes.named import spec_of
from engine.store import RunStore
from tests.engine.answers import POLITE, Answers, Slots
from tests.engine.api_runs import (
    QUICK,
    Loopback,
    accepted,
    children,
    nothing_is_left,
    numbers,
    questions,
    server,
)

pytestmark = pytest.mark.slow

__all__ = ["nothing_is_left", "server"]  # fixtures

# -- what is yielded -------------------------------------------------------------------------------


def test_rows_come_in_plan_order_and_again_for_nothing(tmp_path: Path, server: Loopback) -> None:
    """The same call yields the same rows again and asks nobody."""
    order: dict[str, Any] = {"rows": questions(40), "out": tmp_path / "run", "base_url": server.url}
    first = list(engine.generate(Answers, **order, **QUICK))
    assert numbers(first) == accepted(40)
    assert first[0] == {"number": 0, "answer": "It is so."}
    asked = server.ledger.asked.total()
    assert asked == 40
    assert list(engine.generate(Answers, **order, **QUICK)) == first
    assert server.ledger.asked.total() == asked


def test_a_decision_comes_for_each_row(tmp_path: Path, server: Loopback) -> None:
    """N rows in, N decisions out, refused ones with their reason."""
    order: dict[str, Any] = {"out": tmp_path / "run", "base_url": server.url, **QUICK}
    made = list(engine.generate(POLITE, rows=iter(questions(25)), decisions=True, **order))
    assert [decision.index for decision in made] == list(range(25))
    assert [d.index for d in made if d.accepted] == accepted(25)
    assert {d.reason for d in made if not d.accepted} == {"unwanted"}


def test_rows_that_gave_nothing_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever iterates sees accepted rows alone."""
    recipe, rows = tmp_path / "own.toml", tmp_path / "rows.jsonl"
    recipe.write_text(
        '[recipe]\nname = "own"\n[rows]\n[stage]\nuser = "{{ question | upper }}"\n'
        'give = { answer = "{{ text }}" }\n'
    )
    rows.write_text('{"question": "Why?"}\n{"q": "no"}\nbroken\n')
    order: dict[str, Any] = {"backend": "scripted", "semantic": False, "on_bad_row": "skip"}
    made = list(engine.generate(str(recipe), rows=rows, out=tmp_path / "run", **order))
    assert len(made) == 1
    warned = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert any("1 request gave no answer" in message for message in warned)
    assert f"left out 1 input row, see {tmp_path / 'run' / 'bad_rows.jsonl'}" in warned


def test_a_target_is_met_exactly_and_can_be_raised(tmp_path: Path) -> None:
    """Alpaca in Python: N rows, then others behind them; a lower target gives the first of them."""
    order: dict[str, Any] = {"out": tmp_path / "run", "backend": "scripted", "semantic": False}
    first = list(engine.generate("alpaca", target=12, **order))
    assert len(first) == 12
    more = list(engine.generate("alpaca", target=20, **order))
    assert len(more) == 20
    assert more[:12] == first
    assert list(engine.generate("alpaca", target=5, **order)) == first[:5]
    some = engine.generate("alpaca", target=5, decisions=True, **order)
    assert [d.record for d in some if d.accepted] == first[:5]


def test_what_ends_a_run_is_raised_behind_its_rows(tmp_path: Path, server: Loopback) -> None:
    """A cap on requests: the rows so far are yielded, then the error with its remedy is raised."""
    rows = engine.generate(
        Answers, rows=questions(50), out=tmp_path / "run", base_url=server.url,
        max_requests=10, **QUICK,
    )  # fmt: skip
    seen: list[dict[str, Any]] = []
    with pytest.raises(StoppedError, match="max-requests"):
        seen.extend(rows)
    assert numbers(seen) == accepted(10)


def test_a_refused_key_is_raised_and_leaves_no_rows_behind(tmp_path: Path) -> None:
    """What is wrong at the start is one error of ours; another input may then be given."""
    loopback = Loopback(Behaviour(api_key="sk-other"))
    try:
        rows = engine.generate(
            Answers, rows=questions(3), out=tmp_path / "run", base_url=loopback.url, semantic=False
        )
        with pytest.raises(AuthError):
            next(rows)
    finally:
        loopback.close()
    assert not (tmp_path / "run" / "rows.jsonl").exists()


def test_two_runs_at_once(tmp_path: Path, server: Loopback) -> None:
    """In one process, in two folders, row by row in turns; the process is then as it was."""
    thresholds = gc.get_threshold()
    first, second = (
        engine.generate(
            Answers, rows=questions(60), out=tmp_path / name, base_url=server.url, **QUICK
        )
        for name in ("one", "two")
    )
    both = list(zip(first, second, strict=True))
    assert [(a["number"], b["number"]) for a, b in both] == [(n, n) for n in accepted(60)]
    assert gc.get_threshold() == thresholds


def test_a_folder_in_use_is_refused(tmp_path: Path, server: Loopback) -> None:
    order: dict[str, Any] = {"rows": questions(500), "out": tmp_path / "run"}
    order |= {"base_url": server.url, "max_in_flight": 4, **QUICK}
    first = engine.generate(Answers, **order)
    next(first)
    with pytest.raises(StoppedError, match="in use"):
        next(engine.generate(Answers, **order))
    first.close()


# -- leaving ---------------------------------------------------------------------------------------


class Wrong(Exception):
    """Of a program that takes rows."""


def left_at(folder: Path, server: Loopback, how: str) -> None:
    rows = engine.generate(
        Answers, rows=questions(400), out=folder, base_url=server.url, max_in_flight=16, **QUICK
    )
    for row in rows:
        if row["number"] == 10 and how == "break":
            break
        if row["number"] == 10 and how == "close":
            rows.close()
        if row["number"] == 10 and how == "exception":
            raise Wrong


@pytest.mark.parametrize("how", ["break", "close", "exception"])
def test_leaving_the_loop_drains_and_keeps(tmp_path: Path, server: Loopback, how: str) -> None:
    """All that was paid for is in the store, the folder is free, and the same call goes on."""
    folder = tmp_path / "run"
    with contextlib.suppress(Wrong):
        left_at(folder, server, how)
    with RunStore.read(folder) as run:
        counts = run.counts()
        assert run.sessions()[-1].ended_s is not None
    assert 10 < counts.answered < 400
    assert counts.answered == server.ledger.paid.total()
    rows = engine.generate(Answers, rows=questions(400), out=folder, base_url=server.url, **QUICK)
    assert numbers(rows) == accepted(400)
    assert server.paid_twice == 0


def test_nothing_is_started_before_the_first_row_is_asked_for(tmp_path: Path) -> None:
    rows = engine.generate("alpaca", out=tmp_path / "run", backend="scripted", semantic=False)
    rows.close()
    assert not (tmp_path / "run").exists()


def test_leaving_while_the_run_starts(tmp_path: Path) -> None:
    """A server that takes connections and says nothing: who is cancelled is free at once."""

    async def taken() -> None:
        port = silent.getsockname()[1]
        rows = engine.agenerate(
            "alpaca", out=tmp_path / "run", base_url=f"http://127.0.0.1:{port}/v1", semantic=False
        )
        with anyio.move_on_after(0.5) as scope:
            await anext(rows)
        assert scope.cancelled_caught

    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        asyncio.run(taken())
    assert time.monotonic() - began < 10


# -- asynchronous callers --------------------------------------------------------------------------


def test_asynchronous_rows(tmp_path: Path, server: Loopback) -> None:
    """The same rows, while the caller's loop goes on with other things."""
    turns = 0

    async def tick() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.005)

    async def taken() -> list[int]:
        ticking = asyncio.create_task(tick())
        rows = engine.agenerate(
            Answers, rows=questions(100), out=tmp_path / "run", base_url=server.url, **QUICK
        )
        found = [row["number"] async for row in rows]
        ticking.cancel()
        return found

    assert asyncio.run(taken()) == accepted(100)
    assert turns > 20


def test_cancelling_an_asynchronous_caller_drains(tmp_path: Path, server: Loopback) -> None:
    """A task is cancelled while it waits for a row: what was paid is kept before it ends."""
    taken: list[int] = []
    enough = asyncio.Event()

    async def take() -> None:
        rows = engine.agenerate(
            Answers, rows=questions(400), out=tmp_path / "run", base_url=server.url,
            max_in_flight=8, **QUICK,
        )  # fmt: skip
        async for row in rows:
            taken.append(row["number"])
            if len(taken) == 20:
                enough.set()

    async def cancelled() -> None:
        task = asyncio.create_task(take())
        await enough.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert taken == accepted(400)[: len(taken)]
    with engine.open_run(tmp_path / "run") as run:
        assert run.counts.answered == server.ledger.paid.total() < 400


def test_a_break_of_an_asynchronous_caller(tmp_path: Path, server: Loopback) -> None:
    async def take() -> None:
        rows = engine.agenerate(
            Answers, rows=questions(400), out=tmp_path / "run", base_url=server.url,
            max_in_flight=8, **QUICK,
        )  # fmt: skip
        async with contextlib.aclosing(rows):
            async for row in rows:
                if row["number"] > 10:
                    break
        assert not children()

    asyncio.run(take())
    with engine.open_run(tmp_path / "run") as run:
        assert run.counts.answered == server.ledger.paid.total() < 400


# -- rows ------------------------------------------------------------------------------------------


def decided(folder: Path, rows: Any, server: Loopback, **more: Any) -> list[Any]:
    return list(
        engine.generate(
            "tests.engine.answers:Echo", rows=rows, out=folder, base_url=server.url, **QUICK, **more
        )
    )


def test_a_changed_row_is_refused_by_number(tmp_path: Path, server: Loopback) -> None:
    """Another row, or fewer, are refused; more of them behind the first go on."""
    order: dict[str, Any] = {"out": tmp_path / "run", "base_url": server.url, **QUICK}
    assert numbers(engine.generate(Answers, rows=questions(10), **order)) == accepted(10)
    changed = questions(10)
    changed[6]["question"] = "What else?"
    with pytest.raises(ConfigError, match=r"row 7 is not what"):
        next(engine.generate(Answers, rows=changed, **order))
    with pytest.raises(ConfigError, match=r"row 9 is not what"):
        next(engine.generate(Answers, rows=questions(8), **order))
    assert numbers(engine.generate(Answers, rows=questions(15), **order)) == accepted(15)
    assert server.ledger.asked.total() == 15


def table(kind: str) -> Any:
    rows = [{"number": n, "question": q} for n, q in enumerate(["one?", "two?", "three?"])]
    if kind == "pandas":
        return pandas.DataFrame(rows)
    if kind == "datasets":
        return datasets.Dataset.from_list(rows)
    if kind == "file":
        return rows
    return (row for row in rows)


@pytest.mark.parametrize("kind", ["pandas", "datasets", "generator"])
def test_rows_of_any_kind(tmp_path: Path, server: Loopback, kind: str) -> None:
    rows = engine.generate(
        Answers, rows=table(kind), out=tmp_path / "run", base_url=server.url, **QUICK
    )
    assert numbers(rows) == [0, 1, 2]


def test_a_single_row_is_one_whatever_it_holds(tmp_path: Path, server: Loopback) -> None:
    """As a document by itself its list would be taken for the rows."""
    row = {"number": 1, "question": "Which?", "options": [{"number": 2}, {"number": 3}]}
    order: dict[str, Any] = {"out": tmp_path / "run", "base_url": server.url, **QUICK}
    assert numbers(engine.generate(Answers, rows=[row], **order)) == [1]
    assert numbers(engine.generate(Answers, rows=[row, {**row, "number": 5}], **order)) == [1, 5]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a text"], "row 1 is a str"),
        ([{"number": 1}, {"number": {1, 2}}], "row 2 has what JSON has not"),
        ([{1: "x"}], "row 1 has a field whose name is no text"),
        ({"question": "x"}, "a mapping is one row"),
        ([{"number": 1}, None], "row 2 is a NoneType"),
    ],
)
def test_what_is_no_row_is_refused_by_number(tmp_path: Path, rows: Any, message: str) -> None:
    started = engine.generate(
        Answers, rows=rows, out=tmp_path / "run", base_url="http://127.0.0.1:9/v1", **QUICK
    )
    with pytest.raises(ConfigError, match=message):
        next(started)
    assert not list((tmp_path / "run").iterdir())


def test_no_rows_are_told(tmp_path: Path) -> None:
    started = engine.generate(
        Answers, rows=iter(()), out=tmp_path / "run", base_url="http://127.0.0.1:9/v1", **QUICK
    )
    with pytest.raises(InputError, match="there are none"):
        next(started)


def test_values_of_numpy_dates_and_decimals_become_json(tmp_path: Path) -> None:
    from engine.run.spool import spool

    row = {
        "count": np.int64(3),
        "vector": np.array([1.5, 2.5]),
        "when": pandas.Timestamp("2026-11-29"),
        "price": Decimal("1.10"),
        "large": 2**80,
        "half": "\ud800",
    }
    path = spool([row, {"half": "\udfff"}], tmp_path / "run")
    from engine.datasets import read_rows

    first, second = (row.values for row in read_rows(path))
    assert first == {
        "count": 3,
        "vector": [1.5, 2.5],
        "when": "2026-11-29T00:00:00",
        "price": "1.10",
        "large": 2**80,
        "half": "\ud800",
    }
    assert second == {"half": "\udfff"}


def test_a_file_of_the_persons_is_never_replaced(tmp_path: Path) -> None:
    """The folder may be one of data, and the rows may have come from that very file."""
    mine = tmp_path / "rows.jsonl"
    mine.write_text('{"number": 0, "question": "Mine?"}\n')
    started = engine.generate(
        Answers, rows=questions(2), out=tmp_path, base_url="http://127.0.0.1:9/v1", **QUICK
    )
    with pytest.raises(OutputError, match="was not written for this run"):
        next(started)
    assert "Mine?" in mine.read_text()


TWICE = """
[recipe]
name = "twice"
[[stage]]
name = "first"
user = "{{ question }}"
give = { said = "{{ text }}" }
[[stage]]
name = "second"
user = "{{ said }}"
give = { again = "{{ text }}" }
"""


def test_rows_of_several_stages_again_for_nothing(tmp_path: Path) -> None:
    """The rows are those of the first stage, whose run has a folder of its own."""
    (tmp_path / "twice.toml").write_text(TWICE)

    def rows(count: int) -> list[dict[str, Any]]:
        return list(
            engine.generate(
                str(tmp_path / "twice.toml"),
                rows=questions(count),
                out=tmp_path / "run",
                backend="scripted",
                semantic=False,
            )
        )

    first = rows(2)
    assert len(first) == 2
    assert rows(2) == first
    assert rows(3)[:2] == first
    assert len(rows(3)) == 3


# -- recipes by name -------------------------------------------------------------------------------


def test_a_recipe_goes_by_its_name() -> None:
    assert spec_of("alpaca") == "alpaca"
    assert spec_of(Answers) == spec_of(Answers()) == "tests.engine.answers:Answers"
    assert spec_of(POLITE) == "tests.engine.answers:POLITE"
    assert spec_of(Slots.Within) == "tests.engine.answers:Slots.Within"


def test_what_cannot_be_imported_is_one_line_at_the_start(tmp_path: Path) -> None:
    """A class of a notebook or a function, an object that cannot be made again, no recipe."""

    class Within(Answers):
        pass

    notebook: dict[str, Any] = {"__name__": "__main__", "Answers": Answers}
    exec("class Cell(Answers):\n    pass", notebook)
    for recipe, why in [
        (Within, "within a function"),
        (notebook["Cell"], "__main__ does not have it"),
        (Answers("Tell: "), "cannot be made again"),
        (Slots("x"), "cannot be made again"),
    ]:
        with pytest.raises(ConfigError, match=why) as caught:
            engine.generate(recipe, rows=[], out=tmp_path / "run", base_url="http://x.invalid/v1")
        assert "put it in a file" in str(caught.value)
        assert "\n" not in str(caught.value)
    wrong: Any
    for wrong in (dict, 3):
        with pytest.raises(ConfigError, match="is no recipe"):
            engine.generate(wrong, out=tmp_path / "run")


def test_a_wrong_setting_is_told_at_the_call(tmp_path: Path) -> None:
    """By its name as it was given, before anything is started."""
    with pytest.raises(ConfigError, match=r"unknown setting 'taget'; did you mean 'target'\?"):
        engine.generate("alpaca", out=tmp_path, taget=3)
    with pytest.raises(ConfigError, match="key_env or the file key_file") as caught:
        engine.generate("alpaca", out=tmp_path, api_key="sk-never-said-back")
    assert "never-said-back" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^temperature: "):
        engine.generate("alpaca", out=tmp_path, temperature=7)
    with pytest.raises(ConfigError, match="base_url"):
        engine.generate("alpaca", out=tmp_path, backend="http")


# -- preview ---------------------------------------------------------------------------------------


def test_a_preview_shows_prompts_and_what_becomes_of_answers(server: Loopback) -> None:
    """Alone, with an answer made up, and with a server that is asked once for each."""
    shown = engine.preview(Answers, rows=iter(questions(9)), n=5)
    assert [each.prompt.text for each in shown if each.prompt] == [
        f"Say: What is {n}?" for n in range(5)
    ]
    assert not any(each.decisions for each in shown)
    made_up = engine.preview(
        Answers, rows=questions(9), n=5, answer=lambda prompt: prompt.text.upper()
    )
    records = [decision.record for each in made_up for decision in each.decisions]
    assert records[0] == {"number": 0, "answer": "SAY: WHAT IS 0?"}
    assert made_up[4].decisions[0].reason == "unwanted"
    asked = engine.preview(Answers, rows=questions(9), n=2, base_url=server.url)
    assert [each.answer.text for each in asked if each.answer] == ["It is so."] * 2
    assert server.ledger.asked.total() == 2


def test_a_preview_within_a_loop() -> None:
    """As in a notebook, where a loop is running already."""

    async def cell() -> list[Any]:
        return list(engine.preview(Answers, rows=questions(3), n=1))

    assert len(asyncio.run(cell())) == 1


# -- public names ----------------------------------------------------------------------------------


def test_all_public_names_are_there_and_no_others_are_promised() -> None:
    for name in engine.__all__:
        assert getattr(engine, name) is not None
        assert name in dir(engine)
    assert engine.__all__ == sorted(set(engine.__all__))
    assert set(engine._MODULES) | {"__version__", "loop"} == set(engine.__all__)
    with pytest.raises(AttributeError, match="no attribute 'regenerate'"):
        _ = engine.regenerate
