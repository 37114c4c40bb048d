"""Exports of runs of several stages: lineage, samples, the best of them, pairs."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from click.testing import CliRunner
from pyarrow import parquet

from engine.cli.main import cli
from engine.errors import (
    ConfigError,
    OutputError,
    UsageError,
)
from engine.store import RunReader
from engine.upkeep.verify import problems
from tests.engine.run.test_chain import dump, ran, stage_folders
from tests.engine.run.test_chain import rows as input_rows
from tests.engine.staged_runs import base, chain, code, invoke, made

__all__ = ["base", "chain", "made"]  # fixtures

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_export_says_what_rows_were_made_of(chain: Path, tmp_path: Path) -> None:
    invoke("export", chain, "--lineage", "-o", tmp_path / "out.jsonl")
    rows_ = lines(tmp_path / "out.jsonl")
    assert len(rows_) == 40
    for row in rows_:
        answer, question = row["parents"]
        n, p = answer.removeprefix("2-answer:").split(".")
        m, q = question.removeprefix("1-ask:").split(".")
        with RunReader(chain / "stages" / "2-answer") as run:
            parent = run.decision(int(n), int(p))
        with RunReader(chain / "stages" / "1-ask") as run:
            grandparent = run.decision(int(m), int(q))
        assert parent is not None
        assert grandparent is not None
        assert (parent.record or {})["answer"] == row["answer"]
        assert (grandparent.record or {})["question"] == row["question"]
    invoke("export", chain, "--lineage", "--format", "parquet", "-o", tmp_path / "out.parquet")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["parents"].to_pylist() == [row["parents"] for row in rows_]
    stage = chain / "stages" / "2-answer"
    invoke("export", stage, "--lineage", *code(tmp_path), "-o", tmp_path / "middle.jsonl")
    assert all(len(row["parents"]) == 1 for row in lines(tmp_path / "middle.jsonl"))


def test_all_samples_stand_beside_the_row_they_became(base: Path, tmp_path: Path) -> None:
    async def make() -> None:
        await ran(tmp_path / "votes", base, "Votes")

    anyio.run(make)
    out = tmp_path / "all.jsonl"
    invoke("export", tmp_path / "votes", "--all-samples", "--group", "-o", out)
    groups = lines(out)
    assert [group["row"] for group in groups] == list(range(40))
    for group in groups:
        *samples, row = group["samples"]
        assert not row["is_sample"]
        assert all(sample["is_sample"] for sample in samples)
        assert row["of"] == len(samples)
        votes = [sample["vote"] for sample in samples]
        assert votes.count(row["vote"]) == max(map(votes.count, votes))


SCORED = """
from engine.recipes.base import Part, Recipe


class Tries(Recipe):
    name, fields, asks, needs_rows, samples = "s/try", ("question", "answer"), "any", True, 4

    def prompt(self, ask):
        return [Part(f"{ask.row['text']} (sample {ask.sample})")]

    def parse(self, ask, answer):
        yield {"question": ask.row["text"], "answer": answer.text[:40]}


class Scores(Recipe):
    name, fields, asks, needs_rows = "s/score", ("question", "answer", "score"), "any", True

    def prompt(self, ask):
        return [Part("Score: "), Part(ask.row["answer"])]

    def parse(self, ask, answer):
        yield {**ask.row, "score": len(answer.text) % 3}


class Votes(Tries):
    # Samples that score themselves and become one row.

    name, fields, reduces = "votes", ("question", "answer", "score"), True

    def parse(self, ask, answer):
        text = answer.text[:40]
        yield {"question": ask.row["text"], "answer": text, "score": len(answer.text) % 3}

    def reduce(self, ask, rows):
        return max(filter(None, rows), key=lambda row: row["score"])


class Both(Tries):
    name, fields = "both", ("question", "answer", "score")

    @property
    def stages(self):
        return (Tries(), Scores())
"""


@pytest.mark.parametrize("kind", ["Both", "Votes"])
def test_pairs_are_the_best_and_the_worst_of_an_input_row(
    kind: str, base: Path, tmp_path: Path
) -> None:
    """Of samples that another stage judged, and of samples that became one row; computed anew here
    by the field that holds the input row."""
    from trl import data_utils

    (tmp_path / "scored.py").write_text(SCORED)
    recipe = f"{tmp_path / 'scored.py'}:{kind}"

    draw = random.Random(3)
    questions = [" ".join(f"w{draw.randrange(900)}" for _ in range(9)) for _ in range(40)]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"text": text}) + "\n" for text in questions))

    async def make() -> None:
        await ran(tmp_path / "run", base, "Rounds", recipe=recipe, rows=asked)

    anyio.run(make)
    run, out = tmp_path / "run", tmp_path / "pairs.jsonl"
    words = ("export", run, "--format", "preference", "--recipe", recipe, "-o", out)
    told = invoke(*words, "--by", "score")
    reason = "sample" if kind == "Votes" else None
    by_row: dict[str, list[Any]] = {}
    for _, _, why, row, _ in dump(run):
        if why == reason:
            by_row.setdefault(row["question"], []).append(row)
    assert {len(group) for group in by_row.values()} == {4}
    wanted, ties = [], 0
    for number, (question, group) in enumerate(by_row.items()):
        best = max(group, key=lambda row: row["score"])
        worst = min(group, key=lambda row: row["score"])
        if best["score"] == worst["score"] or best["answer"] == worst["answer"]:
            ties += 1
            continue
        pair: dict[str, Any] = {"prompt": [{"role": "user", "content": question}], "row": number}
        for name, row in (("chosen", best), ("rejected", worst)):
            pair[name] = [{"role": "assistant", "content": row["answer"]}]
        pair |= {"score_chosen": best["score"], "score_rejected": worst["score"]}
        wanted.append(pair)
    assert wanted
    with RunReader(run) as store:
        for pair in (pairs := lines(out)):
            for which in ("chosen", "rejected"):
                index, position = map(int, pair.pop(f"id_{which}").split("."))
                decision = store.decision(index, position)
                assert decision is not None
                assert (decision.record or {})["answer"] == pair[which][0]["content"]
    assert pairs == wanted
    assert not ties or f"a tie of best and worst: {ties}" in told
    assert len(wanted) + ties == 40
    assert all(data_utils.is_conversational(pair) for pair in wanted)
    parts = tmp_path / "parts"
    words_ = (*words[:-1], parts, "--by", "score", "--validation", "0.2")
    if kind == "Votes":
        refused = CliRunner().invoke(cli, [str(word) for word in words_])
        assert isinstance(refused.exception, UsageError)
        assert "became one row" in str(refused.exception)
    else:
        told = invoke(*words_)
        train, validation = (
            lines(parts / f"{part}-00000-of-00001.jsonl") for part in ("train", "validation")
        )
        assert sorted([*train, *validation], key=lambda pair: pair["row"]) == lines(out)
        assert 0 < len(validation) < len(train)
        assert f"{len(wanted)} pairs, {len(validation)} of them validation" in told
        turns = {json.dumps(pair["prompt"]) for pair in train}
        assert not any(json.dumps(pair["prompt"]) in turns for pair in validation)
        # What another export of the run trains on, no pair validates, and the other way round.
        for flags in ((), ("--best", "score")):
            other = tmp_path / f"rows{len(flags)}"
            said = invoke(
                "export", run, "-o", other, "--format", "jsonl", "--validation", "0.2", *flags
            )
            assert "were wanted" not in said
            for part, pairs in (("train", train), ("validation", validation)):
                theirs = {row["id"] for row in lines(other / f"{part}-00000-of-00001.jsonl")}
                assert {pair["id_chosen"] for pair in pairs} <= theirs
    for more, error in (
        ((), UsageError),
        (("--by", "score", "--sort", "score"), UsageError),
        (("--by", "nothing"), ConfigError),
        (("--by", "answer"), ConfigError),
    ):
        result = CliRunner().invoke(cli, [str(word) for word in (*words, *more, "--overwrite")])
        assert isinstance(result.exception, error), more
    assert len(lines(out)) == len(wanted)


def test_the_best_of_an_input_row(base: Path, tmp_path: Path) -> None:
    """The first of the highest score, where a later stage judged the samples."""
    (tmp_path / "scored.py").write_text(SCORED)
    recipe = f"{tmp_path / 'scored.py'}:Both"

    async def make() -> None:
        await ran(tmp_path / "run", base, "Rounds", recipe=recipe, rows=input_rows(tmp_path))

    anyio.run(make)
    out = tmp_path / "best.jsonl"
    words = ("export", tmp_path / "run", "--recipe", recipe, "-o", out, "--best")
    assert invoke(*words, "score").startswith("40 records")
    best: dict[str, Any] = {}
    for _, _, why, row, _ in dump(tmp_path / "run"):
        known = best.get(row["question"])
        if why is None and (known is None or row["score"] > known["score"]):
            best[row["question"]] = row
    fields = ("question", "answer", "score")
    assert [{name: row[name] for name in fields} for row in lines(out)] == list(best.values())
    few = ("--take", "10", "--sort=-score", "--top", "3")
    assert invoke(*words, "score", *few, "--overwrite").startswith("3 records")
    first = sorted(list(best.values())[:10], key=lambda row: -row["score"])[:3]
    assert [{name: row[name] for name in fields} for row in lines(out)] == first
    for more, error in (
        (("score", "--group"), UsageError),
        (("score", "--by", "score", "--format", "preference"), UsageError),
        (("nothing",), ConfigError),
        (("answer",), ConfigError),
    ):
        result = CliRunner().invoke(cli, [str(word) for word in (*words, *more, "--overwrite")])
        assert isinstance(result.exception, error), more


def test_pairs_need_samples(chain: Path, base: Path, tmp_path: Path) -> None:
    words = ["export", str(chain), "--format", "preference", "--by", "score", *code(base)]
    result = CliRunner().invoke(cli, [*words, "-o", str(tmp_path / "pairs.jsonl")])
    assert isinstance(result.exception, ConfigError)
    assert "--samples" in str(result.exception)


@pytest.mark.parametrize(
    "place", ["stages", "stages/1-ask", "stages/1-ask/run.sqlite", "run.sqlite"]
)
@pytest.mark.parametrize("read", ["", "stages/2-answer"])
def test_no_export_takes_the_place_of_a_stage(read: str, place: str, chain: Path) -> None:
    words = ["export", str(chain / read), "--format", "datasets", "--overwrite"]
    result = CliRunner().invoke(cli, [*words, "-o", str(chain / place)])
    assert isinstance(result.exception, OutputError)
    for folder in stage_folders(chain):
        assert list(problems(folder)) == []


def test_samples_of_one_question_are_on_one_side(tmp_path: Path) -> None:
    """Also where a later stage judged each as a row of its own, and compares nothing."""
    rng, words = random.Random(2), [f"w{n}" for n in range(300)]
    rows = tmp_path / "problems.jsonl"
    problems = [" ".join(rng.sample(words, 8)) for _ in range(30)]
    rows.write_text("".join(json.dumps({"problem": each}) + "\n" for each in problems))
    (tmp_path / "best.toml").write_text(
        """
        [recipe]
        name = "best"
        [rows]
        path = "problems.jsonl"
        samples = 4
        [[stage]]
        name = "answer"
        user = "{{ problem }}"
        give = { question = "{{ problem }}", answer = "{{ text }}" }
        [[stage]]
        name = "say"
        user = "Say it again: {{ answer }}"
        give = { again = "{{ text }}" }
        """
    )
    invoke("generate", "--recipe", tmp_path / "best.toml", "--backend", "scripted",
           "--out", tmp_path / "run")  # fmt: skip
    said = invoke("export", tmp_path / "run", "--validation", "0.1", "-o", tmp_path / "split")
    sides = [
        {row["question"] for row in lines(part)} for part in sorted((tmp_path / "split").iterdir())
    ]
    assert [len(side) for side in sides] == [27, 3]
    assert sides[0].isdisjoint(sides[1])
    assert "120 records, 12 of them validation" in said
    invoke("export", tmp_path / "run", "--format", "datasets", "-o", tmp_path / "dataset")
    card = (tmp_path / "dataset" / "README.md").read_text()
    for stage, count in ("1-answer", 120), ("2-say", 120):
        asked = rf"\| Stage {stage} \| scripted, temperature .*; {count} answered, 0 failed"
        assert re.search(asked, card), card
