"""The run store on disks that fill up, fail, vanish or hang, and beside other processes."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import DiskError, OutputError, StoppedError, WoolmillError
from engine.store import RunReader, RunStore, space
from engine.store.inserts import Inserts
from engine.store.lock import RunLock, is_held
from engine.store.space import unsafe_filesystem
from engine.store.writer import Work
from engine.upkeep.verify import problems
from tests.engine.store_rows import MANIFEST, answer, decision, fill, prompt

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", folder],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def take_space(folder: Path, leave: int) -> None:
    """Fill the disk of ``folder`` up to ``leave`` bytes."""
    status = os.statvfs(folder)
    with (folder / "other").open("wb") as file, suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - leave)


async def outcome(work: Awaitable[None]) -> str:
    """``full`` where the disk is, else nothing."""
    try:
        await work
    except DiskError as error:
        return "full" if "full" in str(error) else str(error)
    return ""


async def test_a_disk_that_fills_up_stops_sending_and_keeps_what_is_paid_fault_080(
    small_disk: Path,
) -> None:
    """Nearly full: nothing more is sent. Full: answers still land, in the reserve."""
    run = small_disk / "run"
    store = RunStore.open(run, MANIFEST)
    await store.sent([prompt(0)], "m")
    take_space(small_disk, leave=space.RESERVE_BYTES // 2)
    await store.answered([answer(0)])
    with pytest.raises(StoppedError, match=r"nearly full \(\d+ MiB left\).*free \d+ MiB"):
        await store.sent([prompt(1)], "m")
    (small_disk / "other").unlink()
    take_space(small_disk, leave=MIB)
    for i in range(1, 9):
        await store.answered([answer(i, "x" * MIB)])
    assert not (run / "run.reserve").exists(), "the reserve was used"
    await store.aclose()
    with pytest.raises(StoppedError, match="no room for 32 MiB"):
        RunStore.open(run, MANIFEST)
    with RunReader(run) as reader:
        assert len(reader.answers(0, 100)) == 9
    (small_disk / "other").unlink()
    assert list(problems(run)) == []
    RunStore.open(run, MANIFEST).close()


async def test_a_disk_that_is_full_for_good_loses_nothing_acknowledged_fault_080(
    small_disk: Path,
) -> None:
    """With the reserve used up too, the writer stops; what it acknowledged is there."""
    store = RunStore.open(small_disk / "run", MANIFEST)
    take_space(small_disk, leave=MIB)
    outcomes = [await outcome(store.answered([answer(i, "x" * MIB)])) for i in range(60)]
    kept = outcomes.index("full")
    assert kept > 10
    assert outcomes == [""] * kept + ["full"] * (60 - kept)
    with pytest.raises(DiskError):
        await store.decided([decision(0, 0)])
    await store.aclose()
    (small_disk / "other").unlink()
    with RunReader(small_disk / "run") as reader:
        assert len(reader.answers(0, 1000)) == kept
    assert list(problems(small_disk / "run")) == []


def test_a_disk_turned_read_only_is_read_and_not_written_fault_088(small_disk: Path) -> None:
    """A run cannot be opened for writing there (73); reading it goes on."""
    anyio.run(fill, small_disk / "run", 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OutputError, match="Read-only"):
        RunStore.open(small_disk / "run", MANIFEST)
    with RunReader(small_disk / "run") as reader:
        assert reader.counts().answered == 1


def limited_child(body: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ``body`` in a process of its own, with the store's names imported and FOLDER set."""
    code = f"""
import asyncio, os, resource, signal, subprocess, sys
from pathlib import Path
from engine.errors import DiskError
from engine.store import RunStore
from tests.engine.store_rows import MANIFEST, answer
FOLDER = Path({str(folder)!r})
async def main():
{textwrap.indent(textwrap.dedent(body), "    ")}
asyncio.run(main())
"""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_a_file_size_limit_stops_the_run_fault_082_fault_083(tmp_path: Path) -> None:
    """The write that reaches the limit is short, the next fails: 74, and all that was said is
    there.
    """
    done = limited_child(
        """
        store = RunStore.open(FOLDER, MANIFEST)
        size = 2 << 20
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, size + 1000))
        try:
            for i in range(1000):
                await store.answered([answer(i, "x" * 50_000)])
                print(i, flush=True)
        except DiskError as error:
            print(error.exit_code, file=sys.stderr)
        os._exit(0)
        """,
        tmp_path / "run",
    )
    assert done.stderr.strip() == "74", done.stderr
    kept = len(done.stdout.split())
    assert kept > 5
    with RunReader(tmp_path / "run") as reader:
        assert len(reader.answers(0, 1000)) >= kept
    assert list(problems(tmp_path / "run")) == []


def test_signals_in_the_middle_of_writes_change_nothing_fault_086(tmp_path: Path) -> None:
    """A signal every millisecond interrupts system calls; every one of them is made again."""
    done = limited_child(
        """
        hits = []
        signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        store = RunStore.open(FOLDER, MANIFEST)
        for i in range(300):
            await store.answered([answer(i, "x" * 5000)])
        await store.aclose()
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert len(hits) > 50, len(hits)
        """,
        tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr
    with RunReader(tmp_path / "run") as reader:
        assert len(reader.answers(0, 1000)) == 300


async def test_the_store_needs_no_file_descriptor_later_fault_087(tmp_path: Path) -> None:
    """With every descriptor of the process taken, results are still written and read."""
    store = RunStore.open(tmp_path / "run", MANIFEST)
    await store.answered([answer(0)])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    taken = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for i in range(1, 200):
            await store.answered([answer(i, "x" * 100_000)])
        assert len(store.answers(0, 1000)) == 200
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await store.aclose()


@pytest.mark.parametrize("how", ["removed", "replaced"])
async def test_a_folder_removed_under_a_run_is_noticed_fault_089(tmp_path: Path, how: str) -> None:
    """The next commit fails with 74, instead of writing to a file that nobody can open."""
    await fill(tmp_path / "other", 1)
    store = RunStore.open(tmp_path / "run", MANIFEST)
    await store.answered([answer(0)])
    shutil.rmtree(tmp_path / "run")
    if how == "replaced":
        shutil.copytree(tmp_path / "other", tmp_path / "run")
    with pytest.raises(DiskError, match=r"removed or replaced|is gone"):
        await store.answered([answer(1)])
    await store.aclose()


async def test_a_slow_disk_makes_larger_groups_and_blocks_no_one_fault_090(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one sync hangs, the event loop runs on, and all that waits shares the next commit."""
    store = RunStore.open(tmp_path / "run", MANIFEST)
    hung, release = threading.Event(), threading.Event()
    commit = Inserts.commit
    sizes: list[int] = []

    def slow(self: Inserts, group: Sequence[Work]) -> None:
        sizes.append(len(group))
        hung.set()
        release.wait()
        commit(self, group)

    monkeypatch.setattr(Inserts, "commit", slow)
    kept = [store.answered([answer(0)])]
    await anyio.to_thread.run_sync(hung.wait)  # the loop is not held up
    kept += [store.answered([answer(i)]) for i in range(1, 501)]
    assert store.waiting == 501
    release.set()
    await asyncio.gather(*kept)
    assert sizes == [1, 500]
    await store.aclose()


async def test_a_fault_in_the_writer_reaches_every_caller_fault_074(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in the thread ends the run with 70; nobody waits for ever."""
    store = RunStore.open(tmp_path / "run", MANIFEST)

    def broken(self: Inserts, group: Sequence[Work]) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Inserts, "commit", broken)
    outcomes = await asyncio.gather(
        *(store.answered([answer(i)]) for i in range(20)), return_exceptions=True
    )
    assert all(isinstance(o, WoolmillError) and o.exit_code == 70 for o in outcomes)
    with pytest.raises(WoolmillError, match="a bug"):
        await store.sent([prompt(0)], "m")
    await store.aclose()


async def test_a_wall_clock_that_jumps_changes_times_only_fault_105(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour ahead, an hour back, 1970: the same answers in the same order."""
    store = RunStore.open(tmp_path / "run", MANIFEST)
    now = time.time_ns()
    for i, jump_s in enumerate([0, 3600, -3600, -now // 10**9]):
        monkeypatch.setattr(time, "time_ns", lambda jump_s=jump_s: now + jump_s * 10**9)
        await store.answered([answer(i)])
    assert store.answers(0, 9) == [answer(i) for i in range(4)]
    await store.aclose()
    assert [p for p in problems(tmp_path / "run") if "_at_s" not in p] == []


Sessions = st.lists(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=8), max_size=3)


@settings(max_examples=25, deadline=None)
@given(Sessions)
def test_a_request_recorded_twice_counts_once_fault_113(
    sessions: list[list[tuple[int, bool]]],
) -> None:
    """Any requests, again and again, in any sessions, some answered: each counts once a session,
    and is in flight at the end if it has no answer.
    """
    sent, answered = set(), set()

    async def session(folder: Path, steps: list[tuple[int, bool]]) -> None:
        store = RunStore.open(folder, MANIFEST)
        for index, is_answered in steps:
            await store.sent([prompt(index)], "m")
            if is_answered:
                await store.answered([answer(index)])
        await store.aclose()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        for steps in sessions:
            anyio.run(session, folder, steps)
            sent |= {index for index, _ in steps}
            answered |= {index for index, is_answered in steps if is_answered}
        store = RunStore.open(folder, MANIFEST)
        assert store.counts().sent == sum(len({i for i, _ in steps}) for steps in sessions)
        assert store.counts().answered == len(answered)
        assert {request.index for request in store.resume().in_flight} == sent - answered
        assert len(store.resume().in_flight) == len(sent - answered)
        store.close()


def test_of_fifty_that_start_at_once_one_wins_fault_110(tmp_path: Path) -> None:
    """Fifty openings race for a new run: one gets it, forty-nine are told who has it."""
    barrier = threading.Barrier(50)
    won: list[RunStore] = []
    refused: list[str] = []

    def start() -> None:
        barrier.wait()
        try:
            won.append(RunStore.open(tmp_path / "run", MANIFEST))
        except StoppedError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(refused) == 49
    assert all("in use by" in message for message in refused)
    won[0].close()


def test_asking_whether_a_run_is_written_disturbs_nobody(tmp_path: Path) -> None:
    """A writer that starts while others look gets its lock all the same."""
    path = tmp_path / "run.lock"
    assert not is_held(path)
    RunLock(path).release()
    assert not is_held(path)
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            is_held(path)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(300):
            RunLock(path).release()
    finally:
        over.set()
        looking.join()
    lock = RunLock(path)
    assert is_held(path)
    lock.release()
    assert not is_held(path)


def test_the_lock_ends_with_its_holder_fault_111(tmp_path: Path) -> None:
    """Killed with -9, the holder lets go, although a child of its own lives on."""
    done = limited_child(
        """
        store = RunStore.open(FOLDER, MANIFEST)
        orphan = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL)
        await store.answered([answer(0)])
        print(orphan.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path / "run",
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    try:
        store = RunStore.open(tmp_path / "run", MANIFEST)
        assert store.counts().answered == 1
        assert [session.ended_s is None for session in store.sessions()] == [True, True]
        store.close()
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


def test_file_systems_that_cannot_keep_the_promise_are_named_fault_094_fault_112(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory and network file systems are warned of; what lies on a disk is not."""
    assert "in memory" in (unsafe_filesystem(Path("/dev/shm")) or "")
    device = os.stat(tmp_path).st_dev
    mounts = tmp_path / "mountinfo"
    line = f"1 0 {os.major(device)}:{os.minor(device)} / / rw - {{}} server:/x rw\n"
    monkeypatch.setattr(space, "MOUNTS", mounts)
    for kind, unsafe in {"nfs4": True, "fuse.sshfs": True, "ext4": False, "xfs": False}.items():
        mounts.write_text(line.format(kind))
        assert bool(unsafe_filesystem(tmp_path)) is unsafe, kind


@pytest.mark.parametrize(
    ("file", "inject"),
    [
        ("run.sqlite-wal", "fdatasync:error=EIO:when=6"),
        ("run.sqlite-wal", "pwrite64:error=EROFS:when=60+"),
        ("run.sqlite-wal", "fdatasync:error=EROFS:when=9+"),
        ("run.lock", "pwrite64:error=ENOSPC:when=9"),
    ],
    ids=[
        "a sync fails once",
        "read-only at a write",
        "read-only at a sync",
        "no room for the mark",
    ],
)
def test_a_failing_disk_ends_the_run_fault_084_fault_085_fault_088(
    tmp_path: Path, file: str, inject: str
) -> None:
    """After EIO the kernel may call the next sync good and have lost the pages: no second try."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    run = tmp_path / "run"
    code = f"""
import asyncio, sys
from pathlib import Path
from engine.errors import DiskError
from engine.store import RunStore
from tests.engine.store_rows import MANIFEST, answer
async def main():
    store = RunStore.open(Path({str(run)!r}), MANIFEST)
    for i in range(20):
        try:
            await store.answered([answer(i)])
            print(i)
        except DiskError as error:
            print(error.exit_code)
    await store.aclose()
asyncio.run(main())
"""
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-P", f"{run}/{file}",
         "-e", f"inject={inject}", sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [int(word) for word in done.stdout.split()]
    kept = said.index(74)
    assert said == [*range(kept), *[74] * (20 - kept)]
    store = RunStore.open(run, MANIFEST)
    assert store.answers(0, 100)[:kept] == [answer(i) for i in range(kept)]
    store.close()
    assert list(problems(run)) == []


async def test_memory_does_not_grow_with_the_run_fault_107_fault_108(tmp_path: Path) -> None:
    """Ten thousand requests more take no more memory, descriptors or threads."""
    store = RunStore.open(tmp_path / "run", MANIFEST)

    async def requests(first: int, end: int) -> None:
        for i in range(first, end, 100):
            prompts = [prompt(n) for n in range(i, i + 100)]
            await store.sent(prompts, "m")
            await store.answered([answer(n, "x" * 1000) for n in range(i, i + 100)])
            await store.decided([decision(n, 0) for n in range(i, i + 100)])

    def used() -> tuple[int, int, int]:
        status = Path("/proc/self/statm").read_text().split()
        fds = len(os.listdir("/proc/self/fd"))
        return int(status[1]) * resource.getpagesize(), fds, threading.active_count()

    await requests(0, 6000)
    before = used()
    await requests(6000, 16_000)
    after = used()
    await store.aclose()
    assert after[0] - before[0] < 2 * MIB
    assert after[1:] == before[1:]
