"""Recipes of several stages: streamed, exact at the last stage, the same whatever comes between."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.report.figures import figures
from engine.run.display import SilentDisplay
from engine.run.generate import Result, generate
from engine.run.pooled import LARGEST_EPOCH, Pooled, epoch_starts
from engine.settings import RunConfig
from engine.store import RunStore
from engine.upkeep.redecide import redecide_run
from engine.upkeep.verify import problems
from tests.engine.killed import run_with_kills

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

ROOT = Path(__file__).parents[3]
RECIPES = """
from engine.recipes.base import Part, Recipe


def drawn_words(ask, place):
    # They hardly ever come again, and now and then they do.
    return " ".join(f"w{ask.draw(place, n) % 3000}" for n in range(ask.draw(place) % 4 + 1))


class Asks(Recipe):
    name, fields, asks, most = "chain/ask", ("question",), "any", 3

    def prompt(self, ask):
        return [Part(f"Give three questions, batch {ask.index}.")]

    def parse(self, ask, answer):
        words = answer.text.split()
        for place in range(3):
            yield {"question": f"{words[place]} {drawn_words(ask, place)}"}

    def refuse(self, row):
        return ("short", "") if len(row["question"]) % 5 == 0 else None

    def compared(self, row):
        return row["question"]


class Answers(Recipe):
    name, fields, asks, needs_rows = "chain/answer", ("question", "answer"), "any", True

    def prompt(self, ask):
        return [Part("Answer: "), Part(ask.row["question"], "shorten")]

    def parse(self, ask, answer):
        yield {"question": ask.row["question"], "answer": answer.text[:80]}


class Judges(Recipe):
    name, fields, asks, needs_rows = "chain/judge", ("question", "answer", "score"), "any", True

    def prompt(self, ask):
        return [Part("Judge: "), Part(ask.row["answer"])]

    def parse(self, ask, answer):
        yield {**ask.row, "score": len(answer.text) % 10}

    def refuse(self, row):
        return ("low", str(row["score"])) if row["score"] < 3 else None


class Chain(Recipe):
    name, fields = "chain", ("question", "answer", "score")
    asks = "any"

    def prompt(self, ask): ...

    def parse(self, ask, answer): ...

    @property
    def stages(self):
        return (Asks(), Answers(), Judges())


class Rewrites(Recipe):
    asks, needs_rows, keeps_parent, fields = "any", True, True, ("id", "text")

    def __init__(self, n):
        self.name = f"rounds/{n}"

    def prompt(self, ask):
        return [Part(f"Rewrite ({self.name}): {ask.row['text']}")]

    def parse(self, ask, answer):
        if len(answer.text) % 3 == 0:
            yield ("unchanged", "")
        else:
            yield {"id": ask.row["id"], "text": answer.text[:60]}


class Rounds(Chain):
    name, fields, needs_rows = "rounds", ("id", "text"), True

    @property
    def stages(self):
        return tuple(Rewrites(n) for n in range(1, 5))


class Votes(Recipe):
    name, fields, asks, needs_rows = "votes", ("id", "vote", "of"), "any", True
    samples, reduces = 5, True

    def prompt(self, ask):
        return [Part(f"{ask.row['text']} (sample {ask.sample})")]

    def parse(self, ask, answer):
        if len(answer.text) % 7 == 0:
            yield ("bad_format", "")
        else:
            yield {"id": ask.row["id"], "vote": answer.text[:1], "of": 1}

    def reduce(self, ask, rows):
        votes = [row["vote"] for row in rows if row is not None]
        best = max(sorted(set(votes)), key=votes.count, default=None)
        if best is None:
            return ("no_majority", "all samples failed")
        return {"id": ask.row["id"], "vote": best, "of": len(votes)}


class Pools(Recipe):
    name, fields, asks, most, pooled = "pools", ("text",), "any", 2, True

    def prompt(self, ask):
        shown = ask.choose(ask.pool, 2, "shown")
        return [Part(f"Request {ask.index}: "), *(Part(row["text"]) for row in shown)]

    def parse(self, ask, answer):
        shown = len(ask.pool)  # a parser has none, and needs none
        yield {"text": f"{answer.text.split()[shown]} {drawn_words(ask, 1)}"}
        yield {"text": f"{answer.text[:9]} {drawn_words(ask, 2)}"}

    def compared(self, row):
        return row["text"]
"""
KINDS = {"Chain": {"target": 60}, "Rounds": {}, "Votes": {}, "Pools": {"target": 400}}


def spec(folder: Path, kind: str) -> str:
    (folder / "own.py").write_text(RECIPES)
    return f"{folder / 'own.py'}:{kind}"


def rows(folder: Path, count: int = 40) -> Path:
    path = folder / "rows.jsonl"
    lines = [json.dumps({"id": n, "text": f"Text number {n} of many"}) for n in range(count)]
    path.write_text("\n".join(lines))
    return path


async def ran(folder: Path, base: Path, kind: str, **more: Any) -> Result:
    settings = {"backend": "scripted", "semantic": False, "out": folder, "seed": 5} | KINDS[kind]
    if kind in ("Rounds", "Votes"):
        settings["rows"] = rows(base)
    settings |= {"recipe": spec(base, kind)} | more
    return await generate(RunConfig.model_validate(settings), SilentDisplay())


def stage_folders(folder: Path) -> list[Path]:
    return [*sorted((folder / "stages").glob("*")), folder]


def dump(folder: Path, count: int | None = None) -> list[Any]:
    with RunStore.read(folder) as run:
        decided = [(d.index, d.position, d.reason, d.record, d.detail) for d in run.decisions()]
    return decided[:count]


def accepted(folder: Path) -> list[Any]:
    return [record for _, _, reason, record, _ in dump(folder) if reason is None]


@pytest.mark.parametrize("kind", KINDS)
async def test_the_dataset_is_the_same_for_any_concurrency(kind: str, tmp_path: Path) -> None:
    one = await ran(tmp_path / "1", tmp_path, kind, max_in_flight=1)
    many = await ran(tmp_path / "64", tmp_path, kind, max_in_flight=64)
    assert one.stop.reached
    assert many.stop.reached
    assert dump(tmp_path / "1") == dump(tmp_path / "64")
    assert accepted(tmp_path / "1")
    for folder in stage_folders(tmp_path / "64"):
        assert list(problems(folder)) == []


async def test_the_target_is_met_exactly_and_little_is_paid_in_vain(tmp_path: Path) -> None:
    result = await ran(tmp_path / "run", tmp_path, "Chain", target=200, max_in_flight=16)
    assert result.progress.accepted == len(accepted(tmp_path / "run")) == 200
    first, second, last = stage_folders(tmp_path / "run")
    # Every row of a stage is about the row of its rank in the stage before.
    questions = [row["question"] for row in accepted(first)]
    assert [row["question"] for row in accepted(second)] == questions[: len(accepted(second))]
    with RunStore.read(last) as run:
        used = run.counts().answered
    assert len(accepted(second)) <= used * 1.1 + 20
    with RunStore.read(second) as run:
        assert run.counts().answered <= used * 1.1 + 20


async def test_rows_that_cannot_be_read_are_named_in_the_run_s_folder(tmp_path: Path) -> None:
    """And not in that of the stage which reads them: that is where the end of a run and its report
    look."""
    path = rows(tmp_path, 5).rename(tmp_path / "with_a_bad_row.jsonl")
    path.write_text(path.read_text() + '\n{"id": 5, "text": "no e')
    await ran(tmp_path / "run", tmp_path, "Rounds", rows=path, on_bad_row="skip")
    (named,) = map(json.loads, (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines())
    assert named["line"] == 6
    assert len(accepted(tmp_path / "run")) == 5
    for folder in stage_folders(tmp_path / "run"):
        with RunStore.read(folder) as run:
            assert figures(run)["input_rows_left_out"] == 1


async def test_more_can_be_had_later_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    await ran(tmp_path / "run", tmp_path, "Chain", target=30)
    kept = [dump(folder) for folder in stage_folders(tmp_path / "run")]
    await ran(tmp_path / "run", tmp_path, "Chain", target=90)
    await ran(tmp_path / "whole", tmp_path, "Chain", target=90)
    assert accepted(tmp_path / "run") == accepted(tmp_path / "whole")
    for folder, before in zip(stage_folders(tmp_path / "run"), kept, strict=True):
        assert dump(folder, len(before)) == before


async def test_a_row_that_no_round_improves_stays_as_it_is(tmp_path: Path) -> None:
    """Every row comes out of every round, changed or not, and it is said which."""
    await ran(tmp_path / "run", tmp_path, "Rounds")
    for folder in stage_folders(tmp_path / "run"):
        rows_ = accepted(folder)
        assert [row["id"] for row in rows_] == list(range(40))
        kept = [detail for _, _, reason, _, detail in dump(folder) if reason is None and detail]
        assert kept
        assert all(detail == "unchanged: unchanged" for detail in kept)


async def test_samples_become_one_row(tmp_path: Path) -> None:
    await ran(tmp_path / "run", tmp_path, "Votes")
    decided = dump(tmp_path / "run")
    assert [row["id"] for row in accepted(tmp_path / "run")] == list(range(40))
    samples = [entry for entry in decided if entry[2] in ("sample", "bad_format")]
    assert len(samples) == 200
    for row in accepted(tmp_path / "run"):
        votes = [
            record["vote"]
            for index, _, reason, record, _ in decided
            if reason == "sample" and index // 5 == row["id"]
        ]
        assert row["of"] == len(votes)
        assert votes.count(row["vote"]) == max(map(votes.count, votes))


async def test_samples_that_become_one_row_are_not_barren(tmp_path: Path) -> None:
    """Four of five samples can never be accepted, which is no reason to stop."""
    result = await ran(tmp_path / "run", tmp_path, "Votes", max_barren_requests=2)
    assert result.stop.reached
    assert len(accepted(tmp_path / "run")) == 40


async def test_what_a_request_shows_follows_from_the_answers_alone(tmp_path: Path) -> None:
    """Rows of all epochs but the last two; checked against the store of the whole run."""
    await ran(tmp_path / "run", tmp_path, "Pools", max_in_flight=32)
    with RunStore.read(tmp_path / "run") as run:
        pool = Pooled(run)
        pool.take_in()
        everything = [(d.index, d.record) for d in run.decisions(accepted=True)]
    starts = epoch_starts(1000)
    for request in range(0, 300, 7):
        epoch = max(e for e, start in enumerate(starts) if start <= request)
        visible = starts[epoch - 1] if epoch else 0
        assert list(pool.seen_by(request)) == [r for index, r in everything if index < visible]
        # It may be sent as soon as these are decided, and no earlier.
        assert pool.possible(visible) > request
        assert not visible or pool.possible(visible - 1) <= request


def test_epochs_grow_to_their_largest() -> None:
    starts = epoch_starts(100_000)
    sizes = [after - before for before, after in pairwise(starts)]
    assert sizes[:5] == [64, 64, 128, 256, 512]
    assert set(sizes[8:]) == {LARGEST_EPOCH}


async def test_a_stage_decided_again_makes_later_answers_stale(tmp_path: Path) -> None:
    """Going on is refused with their number; decided as before, it goes on."""
    await ran(tmp_path / "run", tmp_path, "Chain", target=30)
    first = stage_folders(tmp_path / "run")[0]
    await redecide_run(first, None, {"rouge_threshold": 0.3, "recipe": spec(tmp_path, "Chain")})
    with pytest.raises(ConfigError, match="rouge_threshold"):
        await ran(tmp_path / "run", tmp_path, "Chain", target=40)
    with pytest.raises(ConfigError, match=r"\d+ of its answers are about rows"):
        await ran(tmp_path / "run", tmp_path, "Chain", target=40, rouge_threshold=0.3)


@pytest.mark.parametrize("kind", ["Chain", "Pools"])
@pytest.mark.timeout(180)
def test_kills_change_nothing(kind: str, tmp_path: Path) -> None:
    settings = {"recipe": spec(tmp_path, kind), "seed": 5, "target": 1200}
    whole, killed = run_with_kills(tmp_path, settings, kills=6)
    assert accepted(killed) == accepted(whole)
