"""A small share of ``make crash`` in every run of the tests."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash import damage, inject, kills, power
from tests.crash.rig import LedgerServer, Parent, Trial, send_signal

pytestmark = pytest.mark.slow


def wrong(total: Counter[str]) -> dict[str, int]:
    return {name: n for name, n in total.items() if name in damage.WRONG and n}


def test_killed_at_random_it_keeps_its_promise_fault_067(tmp_path: Path) -> None:
    """Eight kills: nothing acknowledged lost, nothing completed paid again, the same export."""
    total = kills.random_kills(8, tmp_path / "kills", seed=7, target=200)
    assert wrong(total) == {}
    assert total["kills"] == 8


@pytest.mark.parametrize(
    "settings",
    [
        ["store.commit:5:kill", "store.recovered:1:kill"],
        ["store.committed:5:kill"],
        ["request.recorded:9:kill", "request.recorded:1:kill"],
        ["answer.arrived:9:kill"],
        ["decision.made:2:kill", "store.created:1:kill"],
        ["export.written:1:kill", "export.renamed:1:kill"],
        ["index.written:1:kill", "index.renamed:2:kill"],
    ],
)
def test_killed_where_it_hurts_and_again_in_recovery_fault_067_fault_078(
    parent: Parent, uncut: Path, tmp_path: Path, settings: list[str]
) -> None:
    """At a named point of the store, the run or the export, and again in the start that follows."""
    total = kills.killed_at(parent, tmp_path / "cut", uncut, settings)
    assert wrong(total) == {}
    assert total["hit " + settings[0].partition(":")[0]] >= 1


def test_stopped_by_signals_nothing_is_sent_twice_fault_068_fault_070_fault_071(
    tmp_path: Path,
) -> None:
    """SIGINT, SIGTERM and SIGHUP drain: no request at all goes out a second time."""
    total = kills.stops(4, tmp_path / "stops", seed=3, target=150)
    assert wrong(total) == {}


def test_held_up_and_let_go_it_goes_on_fault_073(
    parent: Parent, uncut: Path, tmp_path: Path
) -> None:
    """SIGSTOP in the middle, then SIGCONT: the run ends as if nothing had happened."""
    with LedgerServer(kills.FAULTY, tmp_path / "cut.ledger") as server:
        cut = Trial(tmp_path / "cut", server.url, target=200, in_flight=16, seed=1)
        pid = parent.start(cut.order("run"))
        wait_for_line(cut.acks("run"), b" answered ")
        send_signal(pid, signal.SIGSTOP)
        wait_for_state(pid, "T")
        send_signal(pid, signal.SIGCONT)
        cut.status = parent.wait()
    assert wrong(kills.verdict(parent, cut, uncut)) == {}


def wait_for_line(path: Path, part: bytes) -> None:
    while not path.exists() or part not in path.read_bytes():
        time.sleep(0.001)


def wait_for_state(pid: int, state: str) -> None:
    """Until /proc says that the process is in it."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != state:
        time.sleep(0.001)


def test_power_cuts_lose_nothing_acknowledged_fault_091_fault_095(tmp_path: Path) -> None:
    """Three times the disk is as it was on the device, without what the kernel still held."""
    try:
        total = power.power_cuts(3, tmp_path / "power", seed=5, target=150)
    except power.CannotMount as exc:
        pytest.skip(str(exc))
    assert wrong(total) == {}
    assert total["cuts"] == 3


@pytest.mark.timeout(300)
def test_errors_of_the_kernel_are_survived_fault_084(tmp_path: Path) -> None:
    """A write, sync or rename that fails ends the run by its code, and it goes on from there."""
    try:
        total = inject.injected_errors(
            tmp_path / "errors", every=40, calls={"pwrite64": ["EIO"], "fdatasync": ["EIO"]}
        )
    except inject.CannotTrace as exc:
        pytest.skip(str(exc))
    assert wrong(total) == {}
    assert total["errors"] > 0


@pytest.fixture(scope="module")
def parent() -> Iterator[Parent]:
    with Parent() as parent:
        yield parent


@pytest.fixture(scope="module")
def uncut(parent: Parent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kills.uncut_run(parent, tmp_path_factory.mktemp("uncut") / "run", target=200, seed=1)
