"""Damage to a run store: never wrong data, never a traceback, and what is whole can be saved."""

from __future__ import annotations

import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import pytest
from click.testing import CliRunner

from engine.cli.main import cli
from engine.errors import InputError, OutputError, StoppedError, WoolmillError
from engine.store import RunReader, RunStore
from engine.upkeep.salvage import salvage_run
from engine.upkeep.verify import problems
from tests.crash.damage import everything
from tests.engine.store_rows import MANIFEST, answer, decision, fill

pytestmark = pytest.mark.slow

PAGE = 8192


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, closed: everything is in run.sqlite."""
    folder = tmp_path_factory.mktemp("store") / "run"
    anyio.run(fill, folder, 12)
    assert not (folder / "run.sqlite-wal").exists()
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def refused_to_read(folder: Path, expected: tuple[Any, ...], where: str) -> WoolmillError | None:
    """The error that reading ends in; where it ends in none, it must give what is expected."""
    try:
        assert everything(folder) == expected, where
    except WoolmillError as exc:
        return exc
    return None


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_sound_run_has_no_problems(run: Path) -> None:
    """verify is silent about a run as it was left."""
    assert list(problems(run)) == []


def test_a_flipped_bit_is_never_wrong_data_fault_096(original: Path, run: Path) -> None:
    """Of 800 bits flipped one by one, each leaves the data as it was or is refused with exit 65.

    What is refused, verify names too. ``python -m tests.crash flips`` does the same for every bit.
    """
    path = run / "run.sqlite"
    good = path.read_bytes()
    expected = everything(original)
    rng = random.Random(0)
    refused = 0
    for _ in range(800):
        offset, bit = rng.randrange(len(good)), rng.randrange(8)
        overwrite(path, offset, bytes([good[offset] ^ 1 << bit]))
        where = f"bit {bit} of byte {offset}"
        refusal = refused_to_read(run, expected, where)
        if refusal is not None:
            assert refusal.exit_code in (65, 78), where
            assert "\n" not in str(refusal), where
            refused += 1
            if refused % 20 == 0:
                assert list(problems(run)), f"{where}: verify finds nothing, opening says {refusal}"
        overwrite(path, offset, good[offset : offset + 1])
    assert refused > 80, "the data is a good part of the file"


@pytest.mark.parametrize(
    "kind", ["zeroed", "swapped", "duplicated", "cut_off", "emptied", "deleted"]
)
def test_damaged_pages_are_refused_and_named_fault_097(
    original: Path, run: Path, kind: str
) -> None:
    """Whole pages zeroed, exchanged, written twice, or missing at the end."""
    path = run / "run.sqlite"
    good = path.read_bytes()
    pages = [good[i : i + PAGE] for i in range(0, len(good), PAGE)]
    expected = everything(original)
    if kind == "deleted":
        path.unlink()
        with pytest.raises(InputError):
            everything(run)
        assert list(problems(run))
        return
    for page in range(1, len(pages)):
        changed = list(pages)
        if kind == "zeroed":
            changed[page] = bytes(PAGE)
        elif kind == "swapped":
            changed[page], changed[page - 1] = changed[page - 1], changed[page]
        elif kind == "duplicated":
            changed[page] = changed[page - 1]
        elif kind == "cut_off":
            changed = changed[:page]
        else:
            changed = []
        path.write_bytes(b"".join(changed))
        refusal = refused_to_read(run, expected, f"page {page}")
        assert refusal is None or refusal.exit_code == 65, page
        assert list(problems(run)), f"page {page}: verify finds nothing"


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM decision WHERE request = 3",
        "DELETE FROM answer WHERE request = 3",
        "UPDATE decision SET reason = 'x' WHERE reason IS NULL AND request = 3",
        "DELETE FROM vector WHERE request = 3",
        "DELETE FROM sent WHERE request = 3",
    ],
)
def test_rows_that_are_gone_are_missed_fault_096(run: Path, sql: str) -> None:
    """Fewer whole rows than were committed are not taken for all of them."""
    with closing(sqlite3.connect(run / "run.sqlite", isolation_level=None)) as connection:
        connection.execute(sql)
    with pytest.raises(InputError):
        everything(run)
    assert list(problems(run))


@pytest.mark.parametrize("table", ["session", "sent"])
def test_rows_that_a_page_hides_are_missed_fault_096(run: Path, table: str) -> None:
    """A page that says it holds fewer rows, or points twice at one, is refused and named.

    No row's checksum fails there: those that are left are whole.
    """
    path = run / "run.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        sql = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        page = (connection.execute(sql, (table,)).fetchone()[0] - 1) * PAGE
    good = path.read_bytes()
    expected = everything(run)
    cells = int.from_bytes(good[page + 3 : page + 5], "big")
    overwrite(path, page + 3, (cells - 1).to_bytes(2, "big"))
    assert refused_to_read(run, expected, "fewer") is not None
    assert list(problems(run))
    if cells > 1:
        first = page + 8
        overwrite(path, page + 3, good[page + 3 : first] + good[first + 2 : first + 4])
        assert refused_to_read(run, expected, "twice") is not None
        assert list(problems(run))


def test_a_store_that_lost_its_log_is_refused_fault_097(tmp_path: Path) -> None:
    """Acknowledged commits that are gone with run.sqlite-wal are missed, not overlooked."""

    async def unclosed() -> None:
        store = RunStore.open(tmp_path / "run", MANIFEST)
        await store.answered([answer(0)])
        shutil.copytree(tmp_path / "run", tmp_path / "killed")
        await store.answered([answer(1)])
        await store.aclose()

    anyio.run(unclosed)
    killed = tmp_path / "killed"
    (killed / "run.sqlite-wal").unlink()
    assert any("acknowledged" in problem for problem in problems(killed))
    with pytest.raises(InputError, match=r"0 of 1 commits.*salvage"):
        RunStore.open(killed, MANIFEST)


def test_a_database_of_another_run_is_refused_fault_097(tmp_path: Path) -> None:
    """run.sqlite put into another run's folder, and another run's log beside run.sqlite."""
    for name in "ab":
        anyio.run(fill, tmp_path / name, 2)
    shutil.copy(tmp_path / "a" / "run.sqlite", tmp_path / "b" / "run.sqlite")
    with pytest.raises(InputError, match="another run"):
        RunStore.open(tmp_path / "b", MANIFEST)


def test_the_log_cut_at_any_byte_opens_at_a_commit_fault_092_fault_093(tmp_path: Path) -> None:
    """Cut off or zero-filled from any byte on, the log gives back some prefix of the commits.

    Here at the edges of every frame; ``python -m tests.crash log`` does it at every byte.
    """

    async def unclosed() -> None:
        store = RunStore.open(tmp_path / "run", MANIFEST)
        for i in range(4):
            await store.answered([answer(i)])
            await store.decided([decision(i, 0)])
        shutil.copytree(tmp_path / "run", tmp_path / "killed")
        await store.aclose()

    anyio.run(unclosed)
    killed = tmp_path / "killed"
    log = killed / "run.sqlite-wal"
    whole = log.read_bytes()
    frames = range(32, len(whole) + 1, 24 + PAGE)
    assert len(frames) > 8
    opened = set()
    around = {frame + n for frame in frames for n in (-1, 0, 1, 3000)}
    for size in sorted(n for n in around if n <= len(whole)):
        for tail in (b"", bytes(len(whole) - size)):
            log.write_bytes(whole[:size] + tail)
            try:
                with RunReader(killed) as run:
                    answers, decisions = run.answers(0, 9), list(run.decisions())
                    counts = run.counts()
            except InputError:
                continue
            finally:
                (killed / "run.sqlite-shm").unlink(missing_ok=True)
            assert answers == [answer(i) for i in range(len(answers))], size
            assert decisions == [decision(i, 0) for i in range(len(decisions))], size
            assert counts.commits == len(answers) + len(decisions), size
            opened.add(counts.commits)
    assert opened == set(range(9)), "every commit is a place to open at"


def test_salvage_keeps_every_sound_answer(run: Path, tmp_path: Path) -> None:
    """A damaged answer is lost alone; the decisions, which rest on it, are to be taken again."""
    path = run / "run.sqlite"
    good = path.read_bytes()
    at = good.index(b'"index":7,"demonstrations"')
    overwrite(path, at + 9, b"x")
    found = salvage_run(run, tmp_path / "saved")
    assert (found.answers, found.lost_answers) == (11, 1)
    assert (found.decisions, found.dropped_decisions) == (0, 24)
    assert list(problems(tmp_path / "saved")) == []
    with RunReader(tmp_path / "saved") as saved:
        assert [a for a, _ in saved.all_answers()] == [answer(i) for i in range(12) if i != 7]
        assert [f.index for f in saved.resume().in_flight] == [7]
    with pytest.raises(OutputError, match="exists"):
        salvage_run(run, tmp_path / "saved")


def test_salvage_leaves_a_run_alone_that_goes_on(run: Path, tmp_path: Path) -> None:
    """What is being written cannot be copied."""
    store = RunStore.open(run, MANIFEST)
    with pytest.raises(StoppedError, match="in use"):
        salvage_run(run, tmp_path / "saved")
    store.close()
    assert salvage_run(run, tmp_path / "saved").answers == 12


def test_salvage_of_a_sound_run_is_the_same_run(run: Path, tmp_path: Path) -> None:
    """Nothing is lost where nothing is damaged; the vectors come along."""
    found = salvage_run(run, tmp_path / "saved")
    assert (found.answers, found.decisions, found.dropped_decisions) == (12, 24, 0)
    with RunReader(run) as old, RunReader(tmp_path / "saved") as new:
        assert list(old.decisions()) == list(new.decisions())
        for (one, before), (other, after) in zip(
            old.accepted(vectors=True), new.accepted(vectors=True), strict=True
        ):
            assert one == other
            assert before is not None
            assert after is not None
            assert before.tobytes() == after.tobytes()


@pytest.mark.parametrize("page", range(9))
def test_salvage_reads_around_a_zeroed_page(run: Path, tmp_path: Path, page: int) -> None:
    """Whatever page is gone, salvage gives a sound run of true rows, or says why it cannot."""
    assert (run / "run.sqlite").stat().st_size > page * PAGE
    overwrite(run / "run.sqlite", page * PAGE, bytes(PAGE))
    try:
        found = salvage_run(run, tmp_path / "saved")
    except InputError:
        assert page <= 1 or not (tmp_path / "saved").exists()
        return
    assert list(problems(tmp_path / "saved")) == []
    with RunReader(tmp_path / "saved") as saved:
        answers = [a for a, _ in saved.all_answers()]
    assert len(answers) == found.answers
    assert all(a == answer(a.index) for a in answers)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 300 answers, in some 50 pages of which no row fills one."""
    folder = tmp_path_factory.mktemp("long") / "run"
    anyio.run(fill, folder, 300)
    return folder


@pytest.mark.parametrize(
    ("gone", "kept"), [(1, 300), (4096, 300), (2 * PAGE, 300), (30 * PAGE, 120), (40 * PAGE, 0)]
)
def test_salvage_saves_what_a_cut_has_left(
    long: Path, tmp_path: Path, gone: int, kept: int
) -> None:
    """The end of the file is gone: all that stands before it is kept, and the rest is counted."""
    run = Path(shutil.copytree(long, tmp_path / "run"))
    with (run / "run.sqlite").open("r+b") as file:
        file.truncate(file.seek(0, 2) - gone)
    found = salvage_run(run, tmp_path / "saved")
    assert found.answers == kept
    assert (found.lost_answers, found.lost_more) == (300 - kept, False)
    assert list(problems(tmp_path / "saved")) == []
    with RunReader(tmp_path / "saved") as saved:
        answers = [a for a, _ in saved.all_answers()]
    assert answers == [answer(index) for index in range(kept)]


def test_every_answer_of_a_zeroed_page_is_lost_or_kept(long: Path, tmp_path: Path) -> None:
    """Whatever page is gone, at the end of a table or of the requests that were sent."""
    pages = (long / "run.sqlite").stat().st_size // PAGE
    for page in range(2, pages):
        run = Path(shutil.copytree(long, tmp_path / f"run-{page}"))
        overwrite(run / "run.sqlite", page * PAGE, bytes(PAGE))
        found = salvage_run(run, tmp_path / f"saved-{page}")
        assert found.answers + found.lost_answers == 300, page
        assert not found.lost_more, page


def test_salvage_says_where_it_cannot_know_how_many_are_lost(long: Path, tmp_path: Path) -> None:
    """The counts are damaged, and the last answers with them."""
    run = Path(shutil.copytree(long, tmp_path / "run"))
    path = run / "run.sqlite"
    good = path.read_bytes()
    overwrite(path, good.index(b'"stated_nano"') + 1, b"x")
    for index in (200, 299):
        overwrite(path, good.index(b'"index":%d,"demonstrations"' % index) + 9, b"x")
    done = CliRunner().invoke(cli, ["salvage", str(run), "-o", str(tmp_path / "saved")])
    assert "298 answers and 0 decisions kept" in done.output
    assert "lost: at least 1 answer, to be asked for again on resume" in done.output
