"""The fleet that Ray places, without Ray: what is ordered, what becomes of what happens, and how it
ends. ``tests/ray`` has a real cluster.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from engine.backends.vllm import ray_driver, ray_fleet
from engine.backends.vllm.command import serve
from engine.backends.vllm.ray_fleet import RayFleet
from engine.errors import ConfigError, UnavailableError
from engine.processes.children import environment
from engine.run.servers import make_backends
from engine.settings import load_config

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

DRIVER = """
import json, os, sys
from engine.processes.frames import frame, keep_pipes, read_frame
source, out = keep_pipes()
order = json.loads(read_frame(source).head)
with open({seen!r}, "a") as seen:
    seen.write(json.dumps([order, sys.argv[1:], sorted(os.environ)]) + chr(10))
turn = sum(1 for _ in open({seen!r})) - 1
for event in json.loads({events!r})[turn]:
    out.writelines(frame(json.dumps(event).encode()))
    out.flush()
if {stays!r}:
    source.read()
"""
"""In the driver's place: each time it is started it tells the next list of events."""
JOINED = {"event": "joined", "replicas": 2, "notes": ["2 servers"]}


def up(number: int) -> dict[str, Any]:
    return {"event": "up", "replica": number, "url": f"http://10.0.0.{number}:8000/v1"}


def dead(number: int, message: str) -> dict[str, Any]:
    said = {"error": "ConfigError", "message": message}
    return {"event": "dead", "replica": number, **said}


class Told:
    """A fleet whose driver tells what it is told to."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        *events: list[dict[str, Any]],
        stays: bool = True,
    ) -> None:
        self._seen = folder / "seen"
        code = DRIVER.format(seen=str(self._seen), events=json.dumps(events), stays=stays)
        monkeypatch.setattr(ray_fleet, "_COMMAND", [sys.executable, "-P", "-c", code])
        monkeypatch.setattr(ray_fleet, "AGAIN_S", 0.01)
        self.notes: list[str] = []
        self.urls: list[list[str]] = []
        self.fleet = RayFleet(
            "auto",
            "owner/model",
            replicas=2,
            args={"tensor_parallel_size": "4"},
            log_file=folder / "ray.log",
            note=self.notes.append,
        )
        self.fleet.on_change = lambda: self.urls.append(list(self.fleet.urls))

    @asynccontextmanager
    async def running(self, until: Callable[[], object]) -> AsyncIterator[None]:
        task = asyncio.ensure_future(self.fleet.run())
        async with asyncio.timeout(30):
            while not until():  # noqa: ASYNC110 - of what it looks at nothing tells of itself
                await asyncio.sleep(0.01)
        yield
        task.cancel()
        await self.fleet.aclose()

    @property
    def orders(self) -> list[Any]:
        return [json.loads(line) for line in self._seen.read_text().splitlines()]


async def test_servers_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each event is a change of the list; the order goes in by stdin, with a key that nothing else
    has.
    """
    down = {"event": "down", "replica": 0}
    told = Told(tmp_path, monkeypatch, [JOINED, up(0), up(1), down, {**up(0), "url": "http://b"}])
    async with told.running(lambda: len(told.urls) == 5):
        a, b = (up(number)["url"] for number in (0, 1))
        assert told.urls == [[], [a], [a, b], [b], [b, "http://b"]]
        assert told.fleet.ended is None
    assert told.notes == ["2 servers"]
    ((order, arguments, variables),) = told.orders
    assert order["gpus"] == 4
    assert order["server"]["key"] == told.fleet.key.reveal()
    assert not arguments
    assert "OPENAI_API_KEY" not in variables


async def test_one_server_of_two_dies_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one goes on, and the person hears of it; with the last one the fleet has ended."""
    told = Told(tmp_path, monkeypatch, [JOINED, up(0), dead(1, "no such model")])
    async with told.running(lambda: len(told.notes) == 2):
        assert told.fleet.ended is None
        assert told.notes[1] == "no such model; the other servers go on"
    (tmp_path / "seen").unlink()
    told = Told(tmp_path, monkeypatch, [JOINED, dead(0, "no such model"), dead(1, "neither")])
    async with told.running(lambda: told.fleet.ended):
        assert isinstance(told.fleet.ended, ConfigError)
        assert str(told.fleet.ended) == "neither"


async def test_a_cluster_that_is_lost_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All servers leave; those of the next cluster join. That none is there meanwhile is no end."""
    away = {"event": "failed", "error": "UnavailableError", "message": "no Ray cluster"}
    first, second = [JOINED, up(0)], [JOINED, up(1)]
    told = Told(tmp_path, monkeypatch, first, [away], second, [away], stays=False)
    async with told.running(lambda: [up(1)["url"]] in told.urls):
        assert told.fleet.ended is None
    assert told.urls.index([up(0)["url"]]) < told.urls.index([up(1)["url"]])


async def test_no_cluster_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said at once, by whoever failed; also where nothing is said at all."""
    failed = {"event": "failed", "error": "ConfigError", "message": "ray is not installed here"}
    told = Told(tmp_path, monkeypatch, [failed])
    async with told.running(lambda: told.fleet.ended):
        assert isinstance(told.fleet.ended, ConfigError)
    (tmp_path / "seen").unlink()
    told = Told(tmp_path, monkeypatch, [], stays=False)
    async with told.running(lambda: told.fleet.ended):
        assert isinstance(told.fleet.ended, UnavailableError)
        assert "its driver ended with status 0; its log is" in str(told.fleet.ended)


# The driver


class Actor:
    """A replica's calls, each of which comes to the next of what is given."""

    def __init__(self, *outcomes: Any) -> None:
        self._outcomes = iter(outcomes)
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        method = SimpleNamespace(remote=lambda: self._call(name))
        method.options = lambda max_task_retries: (
            method if max_task_retries == 0 else pytest.fail("Ray would ask another worker")
        )
        return method

    def _call(self, name: str) -> Awaitable[Any]:
        self.asked.append(name)
        found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        outcome = next(self._outcomes)
        if isinstance(outcome, Exception):
            found.set_exception(outcome)
        elif outcome is not None:
            found.set_result(outcome)
        return found


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As much of Ray as the driver asks about one actor."""
    made: Any = ModuleType("ray")
    made.exceptions = ModuleType("ray.exceptions")
    made.exceptions.RayError = type("RayError", (Exception,), {})
    made.exceptions.ActorDiedError = type("ActorDiedError", (made.exceptions.RayError,), {})
    made.killed = []
    made.kill = made.killed.append
    monkeypatch.setitem(sys.modules, "ray", made)
    monkeypatch.setitem(sys.modules, "ray.exceptions", made.exceptions)
    return made


async def test_a_worker_that_dies_is_waited_for(ray: Any) -> None:
    """The call that waits for its end fails: its server has left, and the next one joins."""
    lost, words = ray.exceptions.RayError("lost"), {"error": "UnavailableError", "message": "died"}
    actor = Actor({"url": "http://a"}, lost, {"url": "http://b"}, words)
    told: list[Any] = []
    await ray_driver.follow(actor, 7, lambda event, **more: told.append((event, more)))
    assert told == [
        ("up", {"replica": 7, "url": "http://a"}),
        ("down", {"replica": 7}),
        ("up", {"replica": 7, "url": "http://b"}),
        ("dead", {"replica": 7, **words}),
    ]
    assert actor.asked == ["up", "gone", "up", "gone"]
    assert ray.killed == [actor]


async def test_a_server_that_cannot_start(ray: Any) -> None:
    """Because of the model, or because Ray cannot make its actor: it is given up."""
    told: list[Any] = []

    def tell(event: str, **more: Any) -> None:
        told.append((event, more["error"], more["message"]))

    await ray_driver.follow(Actor({"error": "ConfigError", "message": "no model"}), 0, tell)
    broken = ray.exceptions.ActorDiedError("No module named\n 'engine'")
    await ray_driver.follow(Actor(broken), 1, tell)
    assert told == [
        ("dead", "ConfigError", "no model"),
        ("dead", "UnavailableError", "Ray cannot start a server: No module named 'engine'"),
    ]


@pytest.mark.parametrize(
    ("replicas", "each", "gpus", "wanted", "says"),
    [
        (None, 2, 8, (4, 2), "4 servers on 3 nodes with 8 GPUs"),
        (6, 2, 8, (6, 2), "need 12, and the cluster has 8"),
        (3, 1, 0, (3, 0), "with 0 GPUs"),
        (None, 1, 0, (1, 0), "1 server on"),
    ],
)
def test_how_many_servers(
    replicas: int | None, each: int, gpus: int, wanted: tuple[int, int], says: str
) -> None:
    """As many as the GPUs allow, or as were asked for; on CPUs where there is no GPU at all."""
    order, cluster = {"replicas": replicas, "gpus": each}, {"nodes": 3, "CPU": 9, "GPU": gpus}
    count, gpus_of_each, notes = ray_driver.wanted(order, cluster)
    assert (count, gpus_of_each) == wanted
    assert says in " ".join(notes)
    assert "unencrypted" in notes[0]


def test_without_ray() -> None:
    """One line says what to install, and nothing has imported it."""
    assert "ray" not in sys.modules
    with pytest.raises(ConfigError, match=r"pip install 'woolmill\[ray\]'"):
        ray_fleet.look_at("auto")


# Settings


@pytest.mark.parametrize("address", ["local", "ray://a:10001", "a", "", "a:1 b", "http://a:1"])
def test_addresses_that_are_none(address: str) -> None:
    """For some Ray would start a cluster of its own, or speak another protocol."""
    with pytest.raises(ConfigError, match="give auto, or HOST:PORT"):
        load_config(None, {"backend": "vllm", "serve": True, "ray": address})
    result = CliRunner().invoke(serve, ["m", "--ray", address, "--urls", "f"])
    assert result.exit_code == 2


def test_what_ray_goes_with() -> None:
    """With servers of the run's own; a preview has none."""
    with pytest.raises(ConfigError, match="ray goes with serve"):
        load_config(None, {"backend": "vllm", "ray": "auto"})
    config = load_config(None, {"backend": "vllm", "serve": True, "ray": "head-1:6379"})
    with pytest.raises(ConfigError, match="placed for a run alone"):
        make_backends(config)
    result = CliRunner().invoke(serve, ["m", "--ray", "auto"])
    assert "--ray needs --urls FILE" in result.output


def test_only_the_driver_sees_ray_s_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """As any secret it is for who needs it."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t0k3n")
    assert "RAY_AUTH_TOKEN" not in environment("engine", "hub")
    assert environment("ray")["RAY_AUTH_TOKEN"] == "t0k3n"
