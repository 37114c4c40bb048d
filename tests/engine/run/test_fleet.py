"""Servers that come and go during a run: the list, who joins and who may not, and the dataset."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.server import Behaviour, Server
from engine.backends import fleet as fleet_module
from engine.backends.fleet import FileFleet
from engine.errors import ConfigError, UnavailableError, WoolmillError
from engine.limits import LimitSettings, Pool
from engine.run import fleet as keeper_module
from engine.run.display import SilentDisplay
from engine.run.fleet import Keeper
from engine.run.generate import Result, generate
from engine.run.servers import server_at
from engine.settings import RunConfig, load_config
from engine.store import RunReader

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks and questions come often, so that tests need not wait for them."""
    monkeypatch.setattr(fleet_module, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(keeper_module, "ASKED_EVERY_S", 0.05)


def settings(**given: Any) -> RunConfig:
    return load_config(None, {"semantic": False, "max_tokens": 512, **given})


# The list


def test_what_a_list_may_hold(tmp_path: Path) -> None:
    """A URL a line, with comments and empty lines; one that is there twice counts once."""
    path = tmp_path / "fleet.txt"
    path.write_text("# node a\nhttp://a:8000/v1  # two GPUs\n\n http://b:8000\r\nhttp://a:8000\n")
    assert FileFleet(path).urls == ["http://a:8000/v1", "http://b:8000"]
    path.write_text("http://a:8000\nnode-b\n")
    with pytest.raises(ConfigError, match=r"fleet\.txt:2: node-b needs http://"):
        FileFleet(path)
    path.write_text(f"http://user:{'x' * 9}@a:8000\n")
    with pytest.raises(ConfigError, match="credentials"):
        FileFleet(path)
    assert FileFleet(tmp_path / "none").urls == []
    path.write_bytes(
        b"\xef\xbb\xbfhttp://a:8000/v1\r\nhttp://b:8000  # two\r\n"
    )  # as Windows writes
    assert FileFleet(path).urls == ["http://a:8000/v1", "http://b:8000"]


@asynccontextmanager
async def followed(fleet: FileFleet) -> AsyncIterator[list[list[str]]]:
    """What a fleet said at each change."""
    said: list[list[str]] = []
    fleet.on_change = lambda: said.append(list(fleet.urls))
    task = asyncio.ensure_future(fleet.run())
    yield said
    task.cancel()


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - of what it looks at nothing tells of itself
            await asyncio.sleep(0.01)


async def test_changes_of_a_list(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Taken when they stand; not while the file is being written, is gone, or holds nonsense."""
    path = tmp_path / "fleet.txt"
    fleet = FileFleet(path)
    async with followed(fleet) as said:
        path.write_text("http://a:8000\n")
        await until(lambda: said == [["http://a:8000"]])
        for wrong in ("http://a:8000\nhttp://", None):
            caplog.clear()
            path.unlink() if wrong is None else path.write_text(wrong)
            await until(lambda: "listed before" in caplog.text)
            await asyncio.sleep(0.1)
            assert caplog.text.count("listed before") == 1, "once is enough"
        assert said == [["http://a:8000"]]
        path.write_text("http://b:8000\n")
        await until(lambda: len(said) == 2)
        path.write_text("")
        await until(lambda: len(said) == 3)
    assert said[1:] == [["http://b:8000"], []]


async def test_half_a_line_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look between two writes finds http://a:80, which the next one no longer does."""
    found = iter([b"", b"", b"http://a:80", b"http://a:8000\n", b"http://a:8000\n"])
    last = b"http://a:8000\n"
    monkeypatch.setattr(fleet_module, "_read", lambda _: next(found, last))
    async with followed(FileFleet(tmp_path / "fleet.txt")) as said:
        await until(lambda: said)
    assert said == [["http://a:8000"]]


# Who joins


@asynccontextmanager
async def kept(path: Path, **given: Any) -> AsyncIterator[tuple[Keeper, Pool, list[str]]]:
    """A pool that is kept as the list is; what the person is told of it."""
    told: list[str] = []
    pool = Pool([], LimitSettings(max_outage_s=5))
    config = settings(endpoints_file=path, **given)
    keeper = Keeper(FileFleet(path), pool, partial(server_at, config), told.append)
    yield keeper, pool, told
    await keeper.aclose()
    await pool.aclose()


async def test_servers_join_when_they_answer_and_leave_when_they_are_gone(tmp_path: Path) -> None:
    """The first one to answer begins; the model's name is the one that it serves."""
    path = tmp_path / "fleet.txt"
    async with Server() as first, Server() as second, kept(path) as (keeper, pool, told):
        path.write_text(f"http://127.0.0.1:9/v1\n{first.url}\n")
        keeper_of_nobody = "http://127.0.0.1:9"
        prepared: list[str] = []
        keeper.prepare = lambda backend: prepared.append(backend.name)
        await keeper.begin(5.0)
        assert [backend.model for backend in pool.backends] == ["toy"]
        path.write_text(f"{first.url}\n{second.url}\n")
        await until(lambda: len(pool.backends) == 2)
        path.write_text(f"{second.url}\n")
        await until(lambda: len(pool.backends) == 1)
        assert pool.backends[0].name == second.url
        assert prepared == [first.url, second.url]
        path.write_text("")
        await until(lambda: not pool.backends)
    assert not any(keeper_of_nobody in line for line in told)
    assert [line.partition(";")[0] for line in told if "has" in line] == [
        f"{second.url} has joined",
        f"{first.url} has left",
        f"{second.url} has left",
    ]


async def test_another_model_gets_no_work(tmp_path: Path) -> None:
    """It is said once, and the run goes on; restarted with the right one it joins."""
    path = tmp_path / "fleet.txt"
    async with Server() as first, Server(Behaviour(root="other")) as second:
        path.write_text(first.url)
        async with kept(path) as (keeper, pool, told):
            await keeper.begin(0.0)
            path.write_text(f"{first.url}\n{second.url}\n")
            await until(lambda: any("one run needs one model" in line for line in told))
            await asyncio.sleep(0.2)
            assert sum("gets no work" in line for line in told) == 1
            assert len(pool.backends) == 1
            second.behaviour = Behaviour()
            await until(lambda: len(pool.backends) == 2)


@pytest.mark.parametrize(
    ("listed", "error", "says"),
    [
        ("", UnavailableError, "lists no server, or is not there; start some"),
        ("http://127.0.0.1:9/v1", UnavailableError, "no answer"),
        ("http://10.0.0.1:8000", ConfigError, "the key would travel unencrypted"),
    ],
)
async def test_a_start_with_nobody(
    tmp_path: Path, listed: str, error: type[WoolmillError], says: str
) -> None:
    """One line says why, at once where nobody is to be waited for."""
    path = tmp_path / "fleet.txt"
    path.write_text(listed)
    async with kept(path) as (keeper, _, _):
        with pytest.raises(error, match=says):
            await keeper.begin(0.0)


async def test_a_fleet_that_has_ended_ends_the_run(tmp_path: Path) -> None:
    """No server will come any more: whoever waits for a slot hears it at once."""
    path = tmp_path / "fleet.txt"
    async with Server() as server:
        path.write_text(server.url)
        async with kept(path) as (keeper, pool, _):
            await keeper.begin(0.0)
            path.write_text("")
            await until(lambda: not pool.backends)
            waiting = asyncio.ensure_future(pool.acquire(tokens=1))
            await asyncio.sleep(0)
            keeper._fleet.ended = UnavailableError("all servers died four times")
            keeper._fleet.on_change()
            with pytest.raises(UnavailableError, match="died four times"):
                await waiting


# The run


async def ran(folder: Path, **given: Any) -> Result:
    return await generate(settings(out=folder, target=300, **given), SilentDisplay())


def rows_of(folder: Path) -> list[Any]:
    with RunReader(folder) as run:
        return [decision.record for decision in run.decisions(accepted=True)]


def answers_in(folder: Path) -> int:
    with RunReader(folder) as run:
        return sum(1 for _ in run.all_answers())


@pytest.mark.slow
@pytest.mark.parametrize("model", [None, "toy"])
async def test_a_run_whose_servers_change_gives_the_same_dataset(
    tmp_path: Path, model: str | None
) -> None:
    """One server is killed in the middle, another one comes, the list follows: as many rows as were
    asked for, the same as from one server that nobody disturbs, and nothing that was acknowledged
    is paid for twice.
    """
    path = tmp_path / "fleet.txt"
    slow = Behaviour(latency_s=0.05)
    async with Server() as alone:
        await ran(tmp_path / "uncut", base_url=(alone.url,))
    async with Server(slow) as first, Server(slow) as second, Server(slow) as third:
        path.write_text(f"{first.url}\n{second.url}\n")
        run = asyncio.ensure_future(
            ran(tmp_path / "changed", endpoints_file=path, model=model, max_in_flight=4)
        )
        await until(lambda: first.ledger.paid.total() >= 12)
        in_flight = first.ledger.live
        await first.stop()
        path.write_text(f"{second.url}\n{third.url}\n")
        result = await run
        assert result.stop.reached
        assert third.ledger.paid, "it never joined"
        paid = sum((each.ledger.paid for each in (first, second, third)), Counter[str]())
    assert rows_of(tmp_path / "changed") == rows_of(tmp_path / "uncut")
    assert len(rows_of(tmp_path / "changed")) == 300
    twice = {asked for asked, times in paid.items() if times > 1}
    assert len(twice) <= max(in_flight, 4)
    assert max(paid.values()) <= 2


async def test_a_run_whose_servers_are_all_gone_waits_and_can_be_resumed(tmp_path: Path) -> None:
    """Status 69 after --max-outage; the same command goes on with a new server."""
    path = tmp_path / "fleet.txt"
    out = tmp_path / "run"
    async with Server(Behaviour(latency_s=0.02)) as first:
        path.write_text(first.url)
        run = asyncio.ensure_future(ran(out, endpoints_file=path, max_outage_s=0.5))
        await until(lambda: first.ledger.paid.total() >= 8)
        path.write_text("# drained\n")
        result = await run
        assert isinstance(result.stop.error, UnavailableError)
        assert "has left" in str(result.stop.error)
        before = answers_in(out)
    async with Server() as second:
        path.write_text(second.url)
        result = await ran(out, endpoints_file=path)
        assert result.stop.reached
        assert second.ledger.paid.total() == answers_in(out) - before, "paid for again"
    assert len(rows_of(out)) == 300


def test_what_a_list_goes_with() -> None:
    """It stands for --base-url, and only there."""
    with pytest.raises(ConfigError, match="one of base_url"):
        settings(endpoints_file=Path("f"), base_url=("http://a",))
    with pytest.raises(ConfigError, match="goes with backend http"):
        settings(endpoints_file=Path("f"), backend="vllm")
    assert settings(endpoints_file=Path("f")).chosen_backend == "http"
