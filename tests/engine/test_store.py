"""The run store: what it keeps, what it refuses, what it gives a restart."""

from __future__ import annotations

import gzip
import sqlite3
from pathlib import Path

import pytest

from engine.errors import ConfigError, InputError, StoppedError
from engine.store import Manifest, RunStore
from engine.upkeep.verify import problems
from tests.engine.store_rows import MANIFEST, answer, decision, fill, prompt

pytestmark = pytest.mark.anyio


async def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    """Answers, decisions and vectors come back equal, in plan order, from another opening."""
    await fill(tmp_path / "run", 5)
    with RunStore.read(tmp_path / "run") as reader:
        assert reader.answers(1, 3) == [answer(1), answer(2), answer(3)]
        assert [a for a, _ in reader.all_answers()] == [answer(i) for i in range(5)]
        assert [d.reason for d in reader.decisions()] == [None, "rouge_l"] * 5
        assert list(reader.decisions(accepted=False)) == [
            decision(i, 1, "rouge_l") for i in range(5)
        ]
        for i, (accepted, vector) in enumerate(reader.accepted(vectors=True)):
            assert accepted == decision(i, 0)
            assert vector is not None
            assert vector.tolist() == [i] * 4
        counts = reader.counts()
    assert (counts.sent, counts.answered, counts.decided, counts.accepted) == (5, 5, 10, 5)
    assert counts.reasons == {"rouge_l": 5}
    assert (counts.prompt_tokens, counts.completion_tokens) == (35, 15)
    assert counts.last_decided == (4, 1)
    assert counts.answered_below == 5


@pytest.mark.parametrize("text", ["\ud800 lone", "nul \0", "\u2028\u202e", "x" * 10_000_000])
async def test_any_text_round_trips_fault_062(tmp_path: Path, text: str) -> None:
    """Lone surrogates, NUL, separators, bidi controls and very long lines are kept as they are."""
    store = RunStore.open(tmp_path / "run", MANIFEST)
    await store.answered([answer(0, text)])
    assert store.answers(0, 1) == [answer(0, text)]
    await store.aclose()


async def test_a_restart_knows_what_is_answered_in_flight_and_decided(tmp_path: Path) -> None:
    """resume() has gaps, the keys of what was in flight, and the place to decide from."""
    store = RunStore.open(tmp_path / "run", MANIFEST)
    prompts = [prompt(i) for i in range(6)]
    await store.sent(prompts, "m")
    await store.answered([answer(i) for i in (0, 1, 3, 5)])
    await store.decided([decision(0, 0), decision(0, 1, "short")])
    await store.aclose()
    store = RunStore.open(tmp_path / "run", MANIFEST)
    resume = store.resume()
    assert [i for i in range(7) if resume.is_answered(i)] == [0, 1, 3, 5]
    assert [(f.index, f.key) for f in resume.in_flight] == [
        (i, prompts[i].key("m").hex()) for i in (2, 4)
    ]
    assert resume.last_decided == (0, 1)
    assert store.answers(0, 10) == [answer(0), answer(1)], "stops at the gap"
    await store.sent([prompts[2]], "m")
    assert [f.index for f in store.sent_again()] == [2]
    await store.aclose()


async def test_a_late_second_answer_is_waste_fault_114(tmp_path: Path) -> None:
    """The first durable answer stays; the second is counted and changes nothing."""
    store = RunStore.open(tmp_path / "run", MANIFEST)
    await store.answered([answer(0, "first")])
    await store.answered([answer(0, "second"), answer(1)])
    assert store.answers(0, 9) == [answer(0, "first"), answer(1)]
    assert store.counts().wasted == 1
    await store.aclose()


async def test_a_run_in_use_is_refused_fault_110(tmp_path: Path) -> None:
    """The second writer gets exit 75 and the first one's pid; a reader is let in."""
    store = RunStore.open(tmp_path / "run", MANIFEST)
    with pytest.raises(StoppedError, match=r"in use by pid \d+ since 2"):
        RunStore.open(tmp_path / "run", MANIFEST)
    RunStore.read(tmp_path / "run").close()
    await store.aclose()
    RunStore.open(tmp_path / "run", MANIFEST).close()


async def test_settings_that_may_not_change_are_refused_by_name_fault_101(tmp_path: Path) -> None:
    """The difference names each field; endpoints may change and are kept."""
    RunStore.open(tmp_path / "run", MANIFEST).close()
    other = Manifest(
        fixed={"recipe": "alpaca", "model": "n", "sampling": {"temperature": 2, "stop": ["a"]}},
        decision={"rouge_threshold": 0.7},
        free={"endpoints": ["http://127.0.0.1:2"]},
    )
    with pytest.raises(ConfigError) as caught:
        RunStore.open(tmp_path / "run", other)
    assert '(model: was "m", now "n"' in str(caught.value)
    assert "sampling.temperature: was 1.0, now 2" in str(caught.value)
    assert "stop" not in str(caught.value)
    free = Manifest(fixed=MANIFEST.fixed, decision=MANIFEST.decision, free={"endpoints": ["x"]})
    RunStore.open(tmp_path / "run", free).close()
    with RunStore.read(tmp_path / "run") as reader:
        assert reader.manifest.free == {"endpoints": ["x"]}


def test_a_foreign_database_is_refused_fault_104(tmp_path: Path) -> None:
    """A SQLite file of another program is not touched."""
    path = tmp_path / "run.sqlite"
    foreign = sqlite3.connect(path)
    foreign.execute("CREATE TABLE bookmarks (url)")
    foreign.close()
    before = path.read_bytes()
    with pytest.raises(InputError, match="is not a run store"):
        RunStore.open(tmp_path, MANIFEST)
    assert path.read_bytes() == before


def test_a_store_of_a_later_format_is_refused_fault_079_fault_098(tmp_path: Path) -> None:
    """Exit 78, and both formats are named."""
    RunStore.open(tmp_path, MANIFEST).close()
    later = sqlite3.connect(tmp_path / "run.sqlite")
    later.execute("PRAGMA user_version = 99")
    later.close()
    with pytest.raises(ConfigError, match="format 99, this Woolmill reads up to format 5"):
        RunStore.open(tmp_path, MANIFEST)


async def test_decisions_out_of_plan_order_are_a_bug(tmp_path: Path) -> None:
    """The store refuses a decision before the last one, and stops for good."""
    store = RunStore.open(tmp_path / "run", MANIFEST)
    await store.decided([decision(3, 0)])
    with pytest.raises(Exception, match="comes after"):
        await store.decided([decision(2, 0)])
    with pytest.raises(Exception, match="comes after"):
        await store.answered([answer(9)])
    await store.aclose()
    with RunStore.read(tmp_path / "run") as reader:
        assert [(d.index, d.position) for d in reader.decisions()] == [(3, 0)]


async def test_a_cancelled_caller_s_answer_is_kept_fault_069(tmp_path: Path) -> None:
    """What was handed over was paid for: it is committed although nobody waits any more."""
    store = RunStore.open(tmp_path / "run", MANIFEST)
    for i in range(50):
        store.answered([answer(i)]).cancel()
    await store.aclose()
    with RunStore.read(tmp_path / "run") as reader:
        assert reader.counts().answered == 50


async def test_a_store_of_this_format_s_first_day_goes_on_fault_079(tmp_path: Path) -> None:
    """A store written when format 1 was new reads as it did, goes on, and is sound afterwards."""
    folder = tmp_path / "run"
    folder.mkdir()
    packed = Path(__file__).with_name("data") / "format-1.sqlite.gz"
    (folder / "run.sqlite").write_bytes(gzip.decompress(packed.read_bytes()))
    store = RunStore.open(folder, MANIFEST)
    assert store.answers(0, 9) == [answer(i) for i in range(3)]
    old = [(0, 0, None), (0, 1, "rouge_l"), (1, 0, None), (1, 1, "rouge_l")]
    assert [(d.index, d.position, d.reason) for d in store.decisions()] == old
    assert store.session == 2
    resume = store.resume()
    assert resume.last_decided == (1, 1)
    await store.decided([decision(2, 0)])
    await store.sent([prompt(3)], "m")
    await store.answered([answer(3)])
    await store.aclose()
    assert list(problems(folder)) == []
    with RunStore.read(folder) as reader:
        assert reader.answers(0, 9) == [answer(i) for i in range(4)]
        assert list(reader.decisions())[-1] == decision(2, 0)
