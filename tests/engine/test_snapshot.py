"""The snapshot of an index: it changes when a run decides, and never what."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.backends.scripted import ScriptedBackend
from engine.decide import snapshot
from engine.decide.decider import make_cascade, restore_cascade
from engine.decide.snapshot import Snapshots
from engine.dedup.array_file import read_arrays, write_arrays
from engine.dedup.cascade import Cascade
from engine.export import Options, export_dataset
from engine.kept import settings_of
from engine.records import Decision, Prompt
from engine.report.analysis import analyse
from engine.store import SNAPSHOT, RunReader
from engine.upkeep.redecide import redecide_run
from engine.upkeep.verify import problems
from tests.engine.synthetic import answer_of
from tests.engine.test_deciding import Watcher, in_decisions, ran

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


def decided(folder: Path) -> list[Decision]:
    with RunReader(folder) as run:
        return list(run.decisions())


def exported(folder: Path) -> bytes:
    with RunReader(folder) as run:
        export_dataset(run, "jsonl", folder / "rows.jsonl", Options())
    return (folder / "rows.jsonl").read_bytes()


def cascade_of(folder: Path, said: list[str] | None = None) -> Cascade:
    """As the process that decides makes it: by the snapshot, where ``said`` takes what it says."""
    with RunReader(folder) as run:
        config, tasks = settings_of(folder, run.manifest)
        recipe = config.make_recipe(tasks)
        cascade = make_cascade(config, recipe)
        if said is None:
            restore_cascade(cascade, run, recipe)
            return cascade
        read = Snapshots(run, said.append)
        return read.restore(cascade, lambda: make_cascade(config, recipe), recipe, run.counts())[0]


def try_to_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Begin a snapshot of all that the run has accepted, and wait for it; what is said of it."""
    said: list[str] = []
    with monkeypatch.context() as patched, RunReader(folder) as run:
        patched.setattr(snapshot, "EVERY", 1)
        counts = run.counts()
        assert counts.last_decided is not None
        snapshots = Snapshots(run, said.append)
        snapshots.keep(cascade_of(folder), counts.last_decided, counts.accepted)
        snapshots.wait()
    return said[0]


def write_snapshot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of all that the run has accepted."""
    said = try_to_write(folder, monkeypatch)
    with RunReader(folder) as run:
        assert f"{run.counts().accepted:,} rows" in said
    return folder / SNAPSHOT


def same(one: Cascade, other: Cascade) -> bool:
    arrays = other.arrays()
    return all(np.array_equal(array, arrays[name]) for name, array in one.arrays().items())


def copy_of(folder: Path, name: str) -> Path:
    """The run's store alone."""
    copy = folder.with_name(name)
    copy.mkdir()
    for file in folder.iterdir():
        if not file.name.startswith(SNAPSHOT):
            shutil.copy(file, copy)
    return copy


@pytest.fixture
async def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    await ran(tmp_path / "run", monkeypatch, Watcher(), target=300)
    return tmp_path / "run"


async def test_a_run_goes_on_from_it_as_it_would_without(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From its own place, from one behind the store, and never; also in what is exported."""
    caplog.set_level(logging.INFO, "engine.decide")
    without = copy_of(run, "without")
    write_snapshot(run, monkeypatch)
    for target, since in (450, 0), (500, 150):
        caplog.clear()
        await ran(run, monkeypatch, Watcher(), target=target)
        assert f"is used: 300 rows, and {since} since" in caplog.text
    caplog.clear()
    await ran(without, monkeypatch, Watcher(), target=500)
    assert "snapshot" not in caplog.text
    assert SNAPSHOT not in caplog.text
    assert decided(run) == decided(without)
    assert exported(run) == exported(without)
    assert not list(problems(run))


async def test_no_byte_of_it_changes_what_is_decided(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that is another, anywhere, and an end that is missing or too much."""
    path = write_snapshot(run, monkeypatch)
    plain, whole = cascade_of(run), path.read_bytes()
    said: list[str] = []
    assert same(cascade_of(run, said), plain)
    assert "is used: 300 rows" in said.pop()
    draw = random.Random(0)
    wrongs = [whole[: draw.randrange(len(whole))], whole + b"\0", b"", b"{}", bytes(10_000)]
    wrongs += [
        whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :]
        for at in [*range(0, 60, 7), *(draw.randrange(len(whole)) for _ in range(20))]
    ]
    for wrong in wrongs:
        path.write_bytes(wrong)
        assert same(cascade_of(run, said), plain)
        assert "is not used: " in said.pop()
        assert not said


async def test_one_that_does_not_fit_the_run_is_left_aside(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another run, another history of it, a later place, other settings, other code."""
    before = copy_of(run, "before")
    path = write_snapshot(run, monkeypatch)
    said: list[str] = []

    def refused(folder: Path, file: Path, why: str) -> None:
        shutil.copy(file, folder / SNAPSHOT)
        assert same(cascade_of(folder, said), cascade_of(folder))
        assert why in said.pop(), why
        (folder / SNAPSHOT).unlink()

    await ran(tmp_path / "other", monkeypatch, Watcher(), target=20)
    refused(tmp_path / "other", path, "of another run")
    with monkeypatch.context() as patched:
        patched.setattr(snapshot, "_code", lambda: "newer")
        refused(before, path, "of another code")

    await ran(run, monkeypatch, Watcher(), target=400)
    later = write_snapshot(run, monkeypatch)
    refused(before, later, "ahead of the store")

    def otherwise(prompt: Prompt) -> str:
        return answer_of(prompt).replace("about", "on")

    await ran(before, monkeypatch, Watcher(), ScriptedBackend(otherwise), target=420)
    about, arrays = read_arrays(later)
    plain = {name: part.used for name, part in arrays.items()}
    with RunReader(before) as other_history:
        sum_ = other_history.decision_sum(*about["last"])
        first = other_history.sessions()[0]
    write_arrays(tmp_path / "crafted", about | {"sum": sum_}, plain)
    refused(before, tmp_path / "crafted", "a session that the store knows nothing of")
    # As where the store was copied while the first session went on.
    session = [first.number, first.pid, first.started_s]
    write_arrays(tmp_path / "crafted", about | {"sum": sum_, "session": session}, plain)
    refused(before, tmp_path / "crafted", "asked for anew")

    write_arrays(tmp_path / "crafted", about | {"accepted": 399}, plain)
    refused(run, tmp_path / "crafted", "another number of rows")
    unread = {"last": [1, 2, 3], "accepted": None, "sum": 1e999, "session": []}
    for name, value in unread.items():
        write_arrays(tmp_path / "crafted", about | {name: value}, plain)
        refused(run, tmp_path / "crafted", "its place cannot be read")
    write_arrays(tmp_path / "crafted", about | {"sum": 1}, plain)
    refused(run, tmp_path / "crafted", "another decision there")
    write_arrays(tmp_path / "crafted", about | {"last": [0, 1 << 70]}, plain)
    refused(run, tmp_path / "crafted", "another decision there")
    cut = plain | {"text_ends": plain["text_ends"][:-1]}
    write_arrays(tmp_path / "crafted", about, cut)
    refused(run, tmp_path / "crafted", "parts do not lie")


async def test_deciding_anew_removes_it_and_an_old_one_is_of_other_settings(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_snapshot(run, monkeypatch)
    old = path.read_bytes()
    await redecide_run(run, None, {"rouge_threshold": 0.6})
    assert not path.exists()
    path.write_bytes(old)
    said: list[str] = []
    assert same(cascade_of(run, said), cascade_of(run))
    assert "of another settings" in said.pop()


async def test_a_disk_that_refuses_it_costs_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room, or an error in the middle: the old one stays, and is good."""
    path = write_snapshot(run, monkeypatch)
    old = path.read_bytes()
    await ran(run, monkeypatch, Watcher(), target=350)

    def tried() -> str:
        said = try_to_write(run, monkeypatch)
        assert path.read_bytes() == old
        assert not path.with_name(f"{SNAPSHOT}.new").exists()
        return said

    def failing(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("engine.dedup.array_file.os.fsync", failing)
        assert "not written: [Errno 28]" in tried()

    class Full:
        f_bavail, f_frsize = 10, 4096

    with monkeypatch.context() as patched:
        patched.setattr("engine.decide.snapshot.os.statvfs", lambda _: Full)
        assert "little room" in tried()


@pytest.mark.parametrize("point", ["index.written", "index.renamed"])
async def test_killed_while_it_is_written_the_run_goes_on_and_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """The process that decides is killed at each snapshot that it writes."""
    code = "import engine.decide.snapshot\nengine.decide.snapshot.EVERY = 100\n"
    watcher = Watcher()
    slow = ScriptedBackend(answer_of, delay_s=0.02, max_in_flight=8)
    with monkeypatch.context() as patched:
        in_decisions(patched, tmp_path / "site", code)
        patched.setenv("WOOLMILL_FAILPOINT", f"{point}:1:kill")
        result = await ran(tmp_path / "killed", monkeypatch, watcher, slow)
    assert any("ended by SIGKILL" in note for note in watcher.notes)
    if not result.stop.reached:
        result = await ran(tmp_path / "killed", monkeypatch, Watcher())
    assert result.stop.reached
    await ran(tmp_path / "whole", monkeypatch, Watcher())
    assert decided(tmp_path / "killed") == decided(tmp_path / "whole")
    assert not list(problems(tmp_path / "killed"))


async def test_rows_without_their_nearest_say_so_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a number of rows: one line of the run, empty in exports, a line of the report."""
    code = "import engine.dedup.cascade\nengine.dedup.cascade.COMPARED_WITH_ALL = 250\n"
    in_decisions(monkeypatch, tmp_path / "site", code)
    watcher = Watcher()
    await ran(tmp_path / "run", monkeypatch, watcher, target=200)
    said = [note for note in watcher.notes if "nearest" in note]
    assert len(said) == 1
    assert "do not name their nearest by ROUGE-L" in said[0]
    with RunReader(tmp_path / "run") as run:
        rows = list(run.decisions(accepted=True))
        checks = analyse(run)["checks"]
    seeds = len(cascade_of(tmp_path / "run")) - len(rows)
    for number, row in enumerate(rows, seeds):
        assert (row.mean_similarity is None) is (not row.most_similar) is (number >= 250)
    for line, row in zip(exported(tmp_path / "run").splitlines(), rows, strict=True):
        told = json.loads(line)
        assert told["avg_similarity_score"] == row.mean_similarity
        assert len(told["most_similar_instructions"]) == len(row.most_similar)
    assert checks["not compared with every row: without its nearest rows by ROUGE-L"] == seeds - 50
