"""Rows of any fields through everything that reads a finished run."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from engine.cli.main import cli
from engine.datasets import Dataset
from engine.errors import ConfigError, InputError, OutputError, UsageError
from engine.export import choice
from engine.export.columns import ListOf, StructOf, Type, columns_of
from engine.export.formats import writer
from engine.export.layout import Layout
from engine.export.rows import Row
from engine.records import Decision, Prompt
from engine.report.analysis import analyse
from engine.report.markdown import markdown
from engine.store import RunReader
from engine.upkeep.verify import problems
from tests.engine.any_rows import answer_to, answering, any_run, topics
from tests.engine.browser import Chromium
from tests.engine.test_view import page_rows, served

pytestmark = pytest.mark.slow

Rows = list[dict[str, Any]]


def ran(*argv: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in argv])


def named(run: Path) -> list[str]:
    """The option that names the recipe of a run, which is code."""
    with RunReader(run) as reader:
        return ["--recipe", reader.manifest.free["recipe_spec"]]


def exported(run: Path, path: Path, *options: object) -> Path:
    done = ran("export", run, "-o", path, *named(run), *options)
    assert done.exit_code == 0, (done.output, done.exception)
    return path


def lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def records(run: Path) -> Rows:
    with RunReader(run) as reader:
        return [decision.record or {} for decision in reader.decisions(accepted=True)]


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty accepted rows without input."""
    return any_run(tmp_path_factory.mktemp("free") / "run")


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty input rows, two samples each, all decided."""
    folder = tmp_path_factory.mktemp("mapped")
    return any_run(folder / "run", rows=topics(folder), samples=2)


# -- formats --------------------------------------------------------------------------------------


def test_json_lines_hold_the_fields_and_where_they_come_from(mapped: Path, tmp_path: Path) -> None:
    """The row's own ``id`` stays; ours goes by another name. Input row and sample are numbered."""
    rows = lines(exported(mapped, tmp_path / "rows.jsonl"))
    assert [{k: row[k] for k in records(mapped)[0]} for row in rows] == records(mapped)
    for row in rows:
        assert row["woolmill_id"] == f"{row['id']}.0"
        assert (row["row"], row["sample"]) == divmod(row["id"], 2)
        assert row["demonstrations"] == [f"topic:topic {row['row']}"]
        assert row["model"] == "scripted"
        assert "instruction" not in json.dumps(row)
    assert rows[-1]["most_similar"][0].keys() == {"text", "score"}


def test_parquet_has_types_and_loses_nothing(free: Path, tmp_path: Path) -> None:
    """Numbers, lists and texts are columns of their type, objects of several shapes JSON text,
    nulls null.
    """
    done = ran("export", free, "--format", "parquet", "-o", tmp_path / "rows.parquet")
    assert "columns that hold JSON text: source" in done.output
    table = pq.read_table(tmp_path / "rows.parquet")
    types = {name: str(table.schema.field(name).type) for name in records(free)[0]}
    assert types == {
        "id": "int64", "question": "string", "answer": "string", "score": "int64",
        "tags": "list<element: string>", "source": "string",
    }  # fmt: skip
    back = table.to_pylist()
    for row in back:
        row["source"] = json.loads(row["source"]) if row["source"] is not None else None
    assert [{k: row[k] for k in types} for row in back] == records(free)
    assert [row["woolmill_id"] for row in back] == [f"{row['id']}.0" for row in back]


@pytest.mark.parametrize(
    ("values", "type_"),
    [
        ([None, None], "text"),
        ([1, None, 2.5], "float"),
        ([2**53 + 1, 1], "int"),
        ([2**53 + 1, 0.5], "json"),
        ([2**63], "json"),
        ([True, False], "bool"),
        ([True, 1], "json"),
        (["a", 1], "json"),
        ([[], None], ListOf("text")),
        ([[1], [2.5, None]], ListOf("float")),
        ([["a"], "a"], "json"),
        ([["a"], [{}]], "json"),
        ([[["a"]]], ListOf(ListOf("text"))),
        ([{"a": 1}, None, {"a": 2.5}], StructOf({"a": "float"})),
        (
            [[{"role": "user", "content": "a"}], []],
            ListOf(StructOf({"role": "text", "content": "text"})),
        ),
        ([[{"role": "user"}], [{"role": "user", "name": "b"}]], "json"),
        ([{"a": 1}, {"a": "b"}], "json"),
        ([{"\ud800": 1}], "json"),
        ([{}], "json"),
        ([[[[[[[[[[1]]]]]]]]]], "json"),
    ],
)
def test_a_column_s_type_holds_all_its_values(values: list[Any], type_: Type) -> None:
    assert columns_of(({"x": value} for value in values), ["x"])["x"] == type_


def test_the_turns_of_a_chat_are_turns_in_a_table(tmp_path: Path) -> None:
    """As TRL and chat templates take them: a list of objects, and no text that must be parsed."""
    import datasets

    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi \ud800"},
        {"role": "assistant", "content": None},
    ]
    chats: Rows = [{"messages": turns}, {"messages": []}]
    layout = Layout(
        fields=("messages",), alpaca=False, compared=False, types=columns_of(chats, ["messages"])
    )
    with (tmp_path / "chats.parquet").open("wb") as file, writer("parquet", file, layout) as write:
        for number, record in enumerate(chats):
            decision = Decision(index=number, position=0, reason=None, record=record)
            write(
                Row(
                    id=f"{number}.0", number=number, record=record, decision=decision, model="",
                    demonstrations=(), reasoning="",
                )
            )  # fmt: skip
    loaded = datasets.Dataset.from_parquet(
        str(tmp_path / "chats.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert loaded["messages"][0] == [turns[0] | {"content": "Hi \ufffd"}, turns[1]]
    assert loaded["messages"][1] == []


def test_csv_holds_nested_values_as_json_and_runs_nothing(free: Path, tmp_path: Path) -> None:
    with exported(free, tmp_path / "rows.csv", "--format", "csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, record in zip(rows, records(free), strict=True):
        assert row["answer"] == f"'{record['answer']}"
        assert row["score"] == str(record["score"])
        assert json.loads(row["tags"]) == record["tags"]
        assert row["source"] == ("" if record["source"] is None else row["source"])
        assert not row["source"] or json.loads(row["source"]) == record["source"]


def test_chats_have_the_system_turn_and_thoughts_on_request(tmp_path: Path) -> None:
    run = any_run(tmp_path / "run", kind="Uncompared")
    plain = lines(exported(run, tmp_path / "a.jsonl", "--format", "messages"))
    kept = lines(exported(run, tmp_path / "b.jsonl", "--format", "messages", "--reasoning", "keep"))
    for row, one, other in zip(records(run), plain, kept, strict=True):
        assert one["messages"] == [
            {"role": "system", "content": "Quiz."},
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        last = one["messages"][2] | {"reasoning_content": f"about {row['id']}"}
        assert other["messages"] == [*one["messages"][:2], last]
    path = exported(run, tmp_path / "c.jsonl", "--reasoning", "keep")
    assert [row["reasoning"] for row in lines(path)] == [f"about {r['id']}" for r in records(run)]
    turns = json.loads(exported(run, tmp_path / "d", "--format", "sharegpt").read_text())
    assert [turn["from"] for turn in turns[0]["conversations"]] == ["system", "human", "gpt"]
    assert "most_similar" not in lines(path)[0]


@pytest.mark.parametrize("format", ["messages", "sharegpt", "alpaca"])
def test_what_cannot_be_had_of_rows_is_one_line(tmp_path: Path, format: str) -> None:
    run = any_run(tmp_path / "run", lambda prompt: f"verse {prompt.index}", kind="Poem")
    done = ran("export", run, "--format", format, "-o", tmp_path / "x", *named(run))
    assert isinstance(done.exception, ConfigError)
    assert "choose --format jsonl" in str(done.exception)
    assert "verse" in str(done.exception)
    assert not (tmp_path / "x").exists()


def test_without_the_recipe_rows_are_exported_by_their_fields(free: Path, tmp_path: Path) -> None:
    """The same bytes, though neither the recipe's file nor the run's copy of it is there. A chat
    that only its code could make is not guessed.
    """
    run = tmp_path / "run"
    shutil.copytree(free, run)
    (run / "recipe.py").unlink()
    moved = free.parent / "quiz.py"
    before = exported(free, tmp_path / "before.jsonl").read_bytes()
    text = moved.read_text()
    moved.unlink()
    try:
        assert ran("export", run, "-o", tmp_path / "after.jsonl").exit_code == 0
        assert (tmp_path / "after.jsonl").read_bytes() == before
        done = ran("export", run, "--format", "messages", "-o", tmp_path / "x")
        assert isinstance(done.exception, ConfigError)
        assert "its recipe is code" in str(done.exception)
        done = ran("export", run, "--validation", 0.2, "-o", tmp_path / "x")
        assert re.search(r"30 records, [1-6] of them validation", done.output), done.output
        assert ran("report", run).exit_code == 0
    finally:
        moved.write_text(text)


def test_a_datasets_folder_loads(mapped: Path, tmp_path: Path) -> None:
    import datasets

    folder = exported(mapped, tmp_path / "d", "--format", "datasets", "--validation", 0.2)
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    rows = [row for part in loaded.values() for row in part]
    assert sorted(row["id"] for row in rows) == sorted(row["id"] for row in records(mapped))
    # Both samples of an input row are on the same side.
    sides = [{row["row"] for row in part} for part in loaded.values()]
    assert sides[0].isdisjoint(sides[1])
    card = (folder / "README.md").read_text()
    assert "source (JSON text)" in card
    assert "nstruction" not in card
    assert "eed task" not in card


# -- which rows -----------------------------------------------------------------------------------


def test_the_best_of_each_input_row_are_split(mapped: Path, tmp_path: Path) -> None:
    whole = lines(exported(mapped, tmp_path / "best.jsonl", "--best", "score"))
    table = exported(mapped, tmp_path / "table", "--best", "score", "--format", "datasets")
    card = (table / "README.md").read_text()
    assert f"| Written | {len(whole)} of these, chosen by --best=score |" in card
    folder = exported(mapped, tmp_path / "d", "--best", "score", "--validation", 0.25)
    parts = [lines(part) for part in sorted(folder.glob("*.jsonl"))]
    assert [bool(part) for part in parts] == [True, True]
    assert sorted((row for part in parts for row in part), key=row_key) == whole
    all_rows = lines(exported(mapped, tmp_path / "all.jsonl"))
    assert len(whole) == len({row["row"] for row in all_rows}) < len(all_rows)
    for row in whole:
        assert row["score"] == max(r["score"] for r in all_rows if r["row"] == row["row"])


def row_key(row: dict[str, Any]) -> int:
    return int(row["row"])


def sort_key(row: dict[str, Any]) -> float:
    return float(row["score"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--take", 7], lambda rows: rows[:7]),
        (["--sort", "score"], lambda rows: sorted(rows, key=sort_key)),
        (["--sort", "-score"], lambda rows: sorted(rows, key=sort_key, reverse=True)),
        (["--sort=-score", "--top", 5], lambda rows: sorted(rows, key=sort_key, reverse=True)[:5]),
        (
            ["--take", 9, "--sort", "-length(answer)", "--top", 4],
            lambda rows: sorted(rows[:9], key=lambda row: -len(row["answer"]))[:4],
        ),
        (["--sort", "length(tags)"], lambda rows: sorted(rows, key=lambda row: len(row["tags"]))),
        (["--take", 0], lambda rows: []),
        (["--take", 10**9], lambda rows: rows),
    ],
)
def test_rows_are_taken_sorted_and_chosen(
    free: Path, tmp_path: Path, options: list[object], expected: Any
) -> None:
    """Whole-set steps over the run's rows; rows that are alike stay in plan order. Each keeps its
    provenance.
    """
    rows = lines(exported(free, tmp_path / "rows.jsonl", *options))
    assert [row["id"] for row in rows] == [row["id"] for row in expected(records(free))]
    assert all(row["woolmill_id"] == f"{row['id']}.0" for row in rows)
    again = exported(free, tmp_path / "again.jsonl", *options)
    assert again.read_bytes() == (tmp_path / "rows.jsonl").read_bytes()


def test_rows_without_a_value_come_last_and_are_counted(free: Path, tmp_path: Path) -> None:
    for sort in ("length(source)", "-length(source)"):
        done = ran("export", free, "--sort", sort, "-o", tmp_path / "rows.jsonl")
        rows = lines(tmp_path / "rows.jsonl")
        missing = sum(row["source"] is None for row in rows)
        assert 0 < missing < len(rows)
        assert all(row["source"] is None for row in rows[-missing:])
        assert f"{missing} rows without a value to sort by at the end" in done.output


def test_a_choice_goes_with_shards_and_a_validation_part(free: Path, tmp_path: Path) -> None:
    """Part and shard of a row are those of the rows chosen, and no file is missing or too many."""
    options = ("--sort", "-score", "--top", 20, "--validation", 0.2, "--shard-rows", 8)
    files = sorted(exported(free, tmp_path / "parts", *options).iterdir())
    rows = [row for path in files for row in lines(path)]
    whole = lines(exported(free, tmp_path / "rows.jsonl", *options[:4]))
    assert sorted(row["id"] for row in rows) == sorted(row["id"] for row in whole)
    for path in files:
        part, number, of = path.stem.split("-")[0], path.stem.split("-")[1], path.stem[-5:]
        assert int(number) < int(of) == sum(part in other.name for other in files)


def test_samples_of_an_input_row_are_put_on_one_line(mapped: Path, tmp_path: Path) -> None:
    groups = lines(exported(mapped, tmp_path / "groups.jsonl", "--group"))
    flat = lines(exported(mapped, tmp_path / "flat.jsonl"))
    assert [group["row"] for group in groups] == sorted({row["row"] for row in flat})
    together = [{**sample, "row": group["row"]} for group in groups for sample in group["samples"]]
    assert together == flat
    assert any(len(group["samples"]) == 2 for group in groups)
    taken = lines(exported(mapped, tmp_path / "taken.jsonl", "--group", "--take", 3))
    assert taken == groups[:3]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (["--top", 3], UsageError, "--top needs --sort"),
        (["--sort", "nothing"], ConfigError, "no field 'nothing'"),
        (["--sort", "question"], UsageError, "length(question)"),
        (["--sort", "length(score)"], UsageError, "--sort score"),
        (["--group"], UsageError, "input rows"),
        (["--reasoning", "keep", "--format", "csv"], UsageError, "no place for thoughts"),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    free: Path, tmp_path: Path, options: list[object], error: type[Exception], said: str
) -> None:
    done = ran("export", free, "-o", tmp_path / "x", *options)
    assert isinstance(done.exception, error)
    assert said in str(done.exception)
    assert not (tmp_path / "x").exists()


def test_sorting_holds_numbers_and_no_texts(free: Path) -> None:
    with RunReader(free) as run:
        chosen = choice.choose(run, sort="-score")
    assert chosen.sorted is not None
    arrays = (chosen.sorted.request, chosen.sorted.position, chosen.sorted.order)
    assert sum(array.nbytes for array in arrays) == 20 * len(records(free))


# -- the end of a run, and its upkeep -------------------------------------------------------------


def test_generate_leaves_json_lines_and_says_what_was_decided(tmp_path: Path) -> None:
    any_run(tmp_path / "first")
    config, more = tmp_path / "run.toml", tmp_path / "rows.toml"
    recipe = f"{tmp_path / 'quiz.py'}:Quiz"
    config.write_text(f'recipe = "{recipe}"\nbackend = "scripted"\n')
    more.write_text(f'rows = "{topics(tmp_path)}"\nsamples = 2\n{config.read_text()}')
    with answering():
        free = ran(
            "generate", "--config", config, "--no-semantic", "--target", 12,
            "--out", tmp_path / "free",
        )  # fmt: skip
        mapped = ran("generate", "--config", more, "--no-semantic", "--out", tmp_path / "mapped")
    assert "accepted 12 of 12 in" in free.output
    assert len(lines(tmp_path / "free" / "dataset.jsonl")) == 12
    accepted = len(records(tmp_path / "mapped"))
    assert f"decided all 20 input rows, accepted {accepted} in" in mapped.output
    assert len(lines(tmp_path / "mapped" / "dataset.jsonl")) == accepted
    assert not list(tmp_path.glob("*/alpaca_data.json"))


def test_verify_knows_the_dataset_of_any_recipe(mapped: Path, tmp_path: Path) -> None:
    """Sound; older after its rows grew; a problem where somebody changed it."""
    run = tmp_path / "run"
    shutil.copytree(mapped, run)
    whole = exported(run, run / "dataset.jsonl").read_bytes()
    assert list(problems(run)) == []
    for start in (b"", b"".join(whole.splitlines(keepends=True)[:5])):
        (run / "dataset.jsonl").write_bytes(start)
        (run / "exports.json").unlink(missing_ok=True)
        done = ran("verify", run)
        assert done.exit_code == 0
        assert "is older than the store" in done.output
        assert exported(run, run / "dataset.jsonl").read_bytes() == whole
    for other in (whole[:-1], whole[: len(whole) // 2], whole.replace(b"means", b"meant", 1)):
        (run / "dataset.jsonl").write_bytes(other)
        assert "dataset.jsonl: is not what the" in " ".join(problems(run))
        (run / "exports.json").unlink(missing_ok=True)
        assert isinstance(ran("export", run, "-o", run / "dataset.jsonl").exception, OutputError)


@pytest.mark.parametrize("name", ["recipe.py", "run.sqlite"])
def test_no_export_takes_the_place_of_the_recipe(free: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(free, run)
    done = ran("export", run, "-o", run / name, "--overwrite")
    assert isinstance(done.exception, OutputError)
    assert "is read by this command" in str(done.exception)


def test_a_salvaged_run_has_its_rows_and_its_recipe(mapped: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    assert ran("salvage", mapped, "-o", saved).exit_code == 0
    one = exported(mapped, tmp_path / "one.jsonl").read_bytes()
    assert exported(saved, tmp_path / "two.jsonl").read_bytes() == one
    assert (saved / "recipe.py").read_bytes() == (mapped / "recipe.py").read_bytes()
    assert list(problems(saved)) == []


def test_a_merged_run_keeps_each_row_s_place(mapped: Path, tmp_path: Path) -> None:
    """Input row and sample of each row are those that it had, after the rows of the run before;
    also where a run ended in the middle of an input row.
    """
    part = any_run(
        tmp_path / "part", lambda prompt: answer_to(prompt).replace("means", "signifies"),
        rows=topics(tmp_path), samples=2, target=5,
    )  # fmt: skip
    with RunReader(part) as run:
        answered = run.counts().answered
    assert ran("merge", part, mapped, "-o", tmp_path / "both", *named(part)).exit_code == 0
    rows = lines(exported(tmp_path / "both", tmp_path / "both.jsonl"))
    with RunReader(tmp_path / "both") as run:
        before = -(-(answered) // 2)
        for row in rows:
            number, sample = divmod(row["id"], 2)
            assert row["sample"] == sample
            assert row["row"] in (number, number + before)
            answer = run.answers(int(row["woolmill_id"].split(".")[0]), 1)[0]
            assert answer.row == {"topic": f"topic {number}", "extra": {"n": number}}
    assert len(rows) > 20
    assert list(problems(tmp_path / "both")) == []


def test_runs_are_read_and_compared_as_datasets(free: Path, mapped: Path, tmp_path: Path) -> None:
    assert [row.values for row in Dataset(free)] == records(free)
    done = ran("dedup", free, "--field", "answer", "--no-semantic", "-o", tmp_path / "kept.jsonl")
    assert done.exit_code == 0, done.exception
    assert lines(tmp_path / "kept.jsonl")[0] == records(free)[0]
    compared = ran("compare", free, mapped)
    assert compared.exit_code == 0, compared.exception
    assert "near-duplicates of the other run" in compared.output
    told = json.loads(ran("compare", free, mapped, "--format", "json").output)
    # The answers follow from the request's number alone: the first 40 are in both runs.
    assert told["overlap"][1] == 1.0
    assert told["figures"]["parsed"][0] > told["figures"]["accepted"][0]


# -- report and view ------------------------------------------------------------------------------


def test_a_report_tells_of_any_fields(free: Path) -> None:
    """Lengths and empty values by field, refusals with examples, and no word of Alpaca's."""
    with RunReader(free) as run:
        analysis = analyse(run)
        refused = list(run.decisions(accepted=False))
    assert list(analysis["words"]) == ["question", "answer"]
    assert analysis["words"]["question"]["median"] == len("Whatmeans?") + 48
    empty = sum(row["source"] is None for row in records(free))
    assert analysis["checks"]["source is empty"] == empty
    assert analysis["checks"]["score is empty"] == 0
    told = analysis["rejected"]
    assert told["no_json"]["examples"][0]["detail"] == "begins with 'Sorry, n'"
    assert told["too_easy"]["examples"][0]["text"].startswith("What means")
    parsed = [decision for decision in refused if decision.record is not None]
    assert analysis["figures"]["parsed"] == 30 + len(parsed)
    text = markdown(analysis)
    for word in ("instruction", "Instruction", "seed", "output is that"):
        assert word not in text.replace("completion", "")


def test_the_page_of_a_report_draws_any_fields(
    mapped: Path, tmp_path: Path, chromium: Chromium
) -> None:
    page = tmp_path / "report.html"
    assert ran("report", mapped, "-o", page).exit_code == 0
    seen = chromium.open(page.as_uri())
    assert not seen.console
    for name in ("words-question", "words-answer", "reasons", "rouge", "map"):
        place = seen.dom.index(f'id="{name}"')
        assert re.search("<svg|<canvas", seen.dom[place : place + 4000])
    body = seen.dom[seen.dom.index("<body") : seen.dom.index('id="charts"')]
    assert "nstruction" not in body
    assert "A map of the texts" in body


@pytest.mark.parametrize("words", ["Bändchen", "Bändchen 3", "topic"])
def test_the_view_finds_words_in_any_field(free: Path, words: str) -> None:
    """In texts within objects too, and not in the prompt."""
    rows = page_rows(free)
    try:
        found = rows.find(words)
    finally:
        rows.close()
    with RunReader(free) as run:
        said = [json.dumps(d.record, ensure_ascii=False) for d in run.decisions()]
    wanted = sum(all(word in text for word in words.split()[:1]) for text in said)
    assert (found["matches"] > 0) == (wanted > 0)
    assert found["matches"] <= wanted


def test_what_gave_no_row_is_found_by_its_input_row(mapped: Path) -> None:
    rows = page_rows(mapped)
    try:
        found = rows.find("topic 13", status="refused")["rows"]
    finally:
        rows.close()
    assert [(row["id"], row["reason"]) for row in found] == [("27.0", "no_json")]


def test_a_row_shows_its_input_and_its_thoughts(mapped: Path) -> None:
    rows = page_rows(mapped)
    try:
        with pytest.raises(InputError, match="no row"):
            rows.row(3, 1)
        told = rows.row(3, 0)
        brief = rows.find("", status="accepted")["rows"][0]
    finally:
        rows.close()
    assert dict(told["fields"])["tags"] == "[]"
    assert dict(told["fields"])["source"].startswith('{"page": 3')
    assert dict(told["input"]) == {"topic": "topic 1", "extra": '{"n": 1}'}
    assert told["place"] == "input row 1, sample 1 of 0 to 1"
    assert told["reasoning"] == "about 3"
    assert told["prompt"] == "system: You write quizzes.\n\nuser: Ask about topic 1, take 3."
    assert brief["text"].startswith("What means")
    assert [name for name, _ in brief["others"]] == ["id", "score", "tags", "source"]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A run whose field values are markup and hidden characters."""

    def answer(prompt: Prompt) -> str:
        row = json.loads(answer_to(prompt).split("</think>")[-1].replace("Sorry, no.", "{}"))
        if not row:
            return "Sorry, no."
        row |= {"source": {"<img src=x onerror=alert(1)>": "\u202eevil"}}
        return json.dumps(row)

    return any_run(tmp_path / "hostile", answer, rows=topics(tmp_path), samples=2)


def test_the_browser_shows_a_row_of_any_fields(hostile: Path, chromium: Chromium) -> None:
    """All its fields, JSON readable, the input row folded; nothing in it acts or hides."""
    with served(hostile) as page:
        seen = chromium.open(f"{page.link}#3.0")
    assert not seen.console
    dom = seen.dom
    for title in (
        "question",
        "answer",
        "score",
        "tags",
        "source",
        "input row 1, sample 1 of 0 to 1",
    ):
        assert f"<h2>{title}</h2>" in dom
    for fold in ("topic", "extra", "raw answer", "prompt"):
        assert f"<summary>{fold}</summary>" in dom
    assert "Ask about topic 1, take 3." in dom
    assert "score: " in dom
    assert "<img" not in dom
    assert "⟨U+202E⟩evil" in dom
