"""Fields of the input row that its rows keep: ``--carry``."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import anyio
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from engine.cli.main import cli
from engine.errors import ConfigError, UsageError
from engine.stages import is_same_row
from engine.store import RunReader
from engine.upkeep.redecide import redecide_run

pytestmark = pytest.mark.slow

QUESTIONS: list[dict[str, Any]] = [
    {"id": "q-7", "question": "What is rain?", "level": 3, "output": "the row's own"},
    {"id": "q-9", "question": "What is snow?", "level": None, "output": "the row's own"},
]
TWO_STAGES = """
[recipe]
name = "two"
compare = "{{ asked }}"
[rows]
[[stage]]
name = "ask"
user = "Ask something about {{ question }}"
give = { asked = "{{ text }}" }
[[stage]]
name = "reply"
user = "Answer: {{ asked }}"
give = { reply = "{{ text }}" }
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in QUESTIONS))
    Path("two.toml").write_text(TWO_STAGES)


def say(*words: str) -> str:
    """What a command prints."""
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def run(recipe: str, *more: str) -> str:
    own = ("--recipe", recipe, "--backend", "scripted", "--no-semantic", "--out", "run")
    return say("generate", *own, *more)


def advised(error: Exception) -> list[str]:
    """The command between the brackets of a refusal."""
    found = re.search(r"\(woolmill ([^()]*), which asks nothing\)", str(error))
    assert found is not None, error
    return shlex.split(found[1])


def going_on(told: str) -> list[str]:
    """The command that a run which was decided again goes on with."""
    found = re.search(r"^go on with: woolmill (.*)$", told, re.M)
    assert found is not None, told
    return shlex.split(found[1])


def asked_about(folder: str) -> list[dict[str, Any]]:
    """The rows that a stage's answers are about, as its store has them."""
    with RunReader(Path(folder)) as stored:
        return [answer.row or {} for answer, _ in stored.all_answers()]


def rows() -> list[dict[str, Any]]:
    say("export", "run", "-o", "out.jsonl", "--overwrite")
    return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("carry", [("--carry", "id,level"), ("--carry", "id", "--carry", "level")])
def test_rows_keep_the_fields_that_are_named(carry: tuple[str, ...]) -> None:
    run("respond", "--rows", "rows.jsonl", *carry)
    assert [(row["id"], row["level"]) for row in rows()] == [("q-7", 3), ("q-9", None)]
    assert "input" in rows()[0]


def test_a_field_that_the_recipe_gives_is_the_recipe_s() -> None:
    run("respond", "--rows", "rows.jsonl", "--carry", "output")
    assert all(row["output"] != "the row's own" for row in rows())


def test_every_stage_passes_them_on() -> None:
    run("two.toml", "--rows", "rows.jsonl", "--carry", "id")
    made = rows()
    assert [row["id"] for row in made] == ["q-7", "q-9"]
    assert all(row["asked"] and row["reply"] for row in made)


def test_samples_that_become_one_row_keep_them() -> None:
    give = 'give = { reply = "{{ text }}", length = "{{ text | length }}" }'
    stage = f'[stage]\nuser = "Answer: {{{{ question }}}}"\n{give}\nreduce = "best:length"\n'
    Path("best.toml").write_text(f'[recipe]\nname = "best"\n[rows]\nsamples = 3\n{stage}')
    run("best.toml", "--rows", "rows.jsonl", "--carry", "id")
    assert [row["id"] for row in rows()] == ["q-7", "q-9"]


def test_rows_get_them_later_without_asking_anybody() -> None:
    run("respond", "--rows", "rows.jsonl")
    assert "level" not in rows()[0]
    told = say("redecide", "run", "--carry", "id,level")
    assert [row["id"] for row in rows()] == ["q-7", "q-9"]
    assert "decided all 2 input rows" in say(*going_on(told))


def test_all_stages_get_them_later_without_asking_anybody() -> None:
    """No answer is dropped, or becomes stale; the page finds each row's parent as before."""
    run("two.toml", "--rows", "rows.jsonl")
    before = rows()
    assert "2 come, 2 go" in say("redecide", "run", "--carry", "level", "--dry-run")
    assert rows() == before
    told = say("redecide", "run", "--carry", "level")
    assert rows() == [{**row, "level": level} for row, level in zip(before, [3, None], strict=True)]
    assert "about rows that stage" not in say("verify", "run")
    assert [row["level"] for row in asked_about("run")] == [3, None]
    assert "decided all 2 rows of the stage before" in say(*going_on(told))
    with RunReader(Path("run")) as stored:
        assert stored.counts().sent == stored.counts().answered == 2  # nobody was asked since
    say("redecide", "run", "--carry", "id")  # others in their place
    assert [(row["id"], "level" in row) for row in rows()] == [("q-7", False), ("q-9", False)]
    say("redecide", "run", "--carry", "")
    assert rows() == before


def test_one_stage_alone_does_not_get_them() -> None:
    run("two.toml", "--rows", "rows.jsonl")
    before = rows()
    with pytest.raises(UsageError, match="with: woolmill redecide run --carry id") as refused:
        say("redecide", "run", "--stage", "1-ask", "--carry", "id")
    assert rows() == before
    say(*shlex.split(str(refused.value).partition("with: woolmill ")[2]))
    assert [row["id"] for row in rows()] == ["q-7", "q-9"]


def test_a_run_cut_short_between_its_stages_loses_no_answer() -> None:
    run("two.toml", "--rows", "rows.jsonl")
    given = {"carry": ("id",)}
    anyio.run(redecide_run, Path("run/stages/1-ask"), None, given)
    assert "about rows that stage" not in say("verify", "run")
    with pytest.raises(ConfigError, match=r"\(woolmill redecide run --carry id, which") as refused:
        run("two.toml", "--rows", "rows.jsonl", "--carry", "id")
    say(*advised(refused.value))
    assert [row["id"] for row in rows()] == ["q-7", "q-9"]
    assert "decided all 2" in run("two.toml", "--rows", "rows.jsonl", "--carry", "id")


def test_a_stage_s_own_field_of_the_name_is_compared() -> None:
    """A row is another one where a field of the recipe's differs, whatever is carried."""
    asked = {"q": "Why?", "id": 1}
    assert is_same_row(asked, {"q": "Why?"}, {"id"})
    assert is_same_row({"q": "Why?"}, asked, {"id"})
    assert not is_same_row(asked, {"q": "Why?", "id": 2}, {"id"})
    assert not is_same_row(asked, {"q": "Why?"}, set())
    assert not is_same_row(asked, None, {"id", "q"})
    assert is_same_row(None, None, set())


@pytest.mark.parametrize("earlier", [False, True])
def test_a_field_that_is_not_there_is_named_before_anything_is_asked(earlier: bool) -> None:
    message = "--carry nr: the input rows have no such field; the first one has id, question"
    if earlier:
        run("respond", "--rows", "rows.jsonl")
        with pytest.raises(ConfigError, match=message):
            say("redecide", "run", "--carry", "nr")
    else:
        with pytest.raises(ConfigError, match=message):
            run("respond", "--rows", "rows.jsonl", "--carry", "id,nr")
        assert not Path("run").exists()


def test_a_run_without_rows_has_none_to_keep() -> None:
    with pytest.raises(ConfigError, match="--carry id: the run has no input rows; see --rows"):
        run("alpaca", "--carry", "id")


LARGE = [2**63, 2**64 - 1, 2**64, 100000000000000000001, -(2**63) - 1, 1e20]


@pytest.mark.parametrize("recipe", ["respond", "two.toml"])
def test_integers_of_any_size_stay_the_same_numbers(recipe: str) -> None:
    """Through the store, all stages, exports, and when the run is decided again or goes on."""
    lines = [json.dumps({"id": number, "question": f"What is {number}?"}) for number in LARGE]
    Path("rows.jsonl").write_text("\n".join(lines))
    run(recipe, "--rows", "rows.jsonl", "--carry", "id")
    kept = [row["id"] for row in rows()]
    assert kept == LARGE
    assert [type(number) for number in kept] == [int] * 5 + [float]
    say("redecide", "run", "--carry", "id")
    Path("rows.jsonl").touch()  # so that each row is compared with what was asked about
    run(recipe, "--rows", "rows.jsonl", "--carry", "id")
    assert [row["id"] for row in rows()] == LARGE
    say("export", "run", "-o", "out.parquet")
    table = pq.read_table("out.parquet").column("id").to_pylist()
    assert table[3] == "100000000000000000001"


def test_bytes_of_a_table_are_left_out_and_named_once() -> None:
    table = {
        "id": ["a", "b", "c"],
        "image": [None, b"\xff\xfe", b"\x00"],
        "media": [{"bytes": b"\xff", "path": "x.png"}] * 3,
        "question": ["One?", "Two?", "Three?"],
    }
    pq.write_table(pa.table(table), "rows.parquet")
    told = run("respond", "--rows", "rows.parquet", "--carry", "id")
    assert told.count("column image holds bytes, and is left out") == 1
    assert told.count("column media holds bytes, and is left out") == 1
    assert [row["id"] for row in rows()] == ["a", "b", "c"]
    assert [row.get("image", "left out") for row in asked_about("run")] == [None, *["left out"] * 2]
    with pytest.raises(ConfigError, match="--carry media: the input rows have no such field"):
        say("preview", "respond", "--rows", "rows.parquet", "--carry", "media")


def test_a_field_that_the_recipe_gives_itself_is_named_at_the_start() -> None:
    rows = [row | {"reply": "the row's own"} for row in QUESTIONS]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    told = run("two.toml", "--rows", "rows.jsonl", "--carry", "reply,id")
    assert "--carry reply: two/reply gives a field of that name itself" in told
    assert "--carry id:" not in told


def test_a_field_that_the_first_row_lacks_is_looked_for_in_others() -> None:
    with Path("rows.jsonl").open("a") as file:
        file.write('{"question": "What is ice?", "late": 3}\n')
    told = run("respond", "--rows", "rows.jsonl", "--carry", "late")
    assert told.count("--carry late: rows without it, as the first one, get null") == 1
    assert [row["late"] for row in rows()] == [None, None, 3]


@pytest.mark.parametrize("carry", ['"id,level"', '["id", "level"]', '["id,level"]'])
def test_a_settings_file_names_them_in_one_word_or_several(carry: str) -> None:
    own = f'recipe = "respond"\nrows = "rows.jsonl"\nbackend = "scripted"\ncarry = {carry}\n'
    Path("run.toml").write_text(own)
    say("generate", "--config", "run.toml", "--out", "run")
    assert [(row["id"], row["level"]) for row in rows()] == [("q-7", 3), ("q-9", None)]
