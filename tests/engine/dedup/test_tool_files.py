"""Files of ``woolmill dedup``: forms of all kinds in and out, rows that cannot be read, and what an
output may take the place of.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine import datasets
from engine.errors import InputError, OutputError, UsageError
from tests.engine.dedup.tool import dataset, dedup, lines

__all__ = ["dataset"]  # a fixture

pytestmark = pytest.mark.slow


def test_several_datasets_are_one(dataset: Path, tmp_path: Path) -> None:
    """In the order of their arguments; what is said of a row names its file."""
    other, out, why = tmp_path / "a.json", tmp_path / "out.jsonl", tmp_path / "why.jsonl"
    rows = [
        {"instruction": "Sing a song.", "id": "9"},
        {"instruction": "Name three primary colours!", "id": "1"},
    ]
    other.write_bytes(orjson.dumps(rows))
    said = dedup(dataset, other, "-o", out, "--decisions", why).output
    assert [row["id"] for row in lines(out)] == ["1", str(2**70), "None", "9"]
    assert 'as "1" on rows 1 and 7; tell them apart by their row' in said
    last = lines(why)[-1]
    assert (last["index"], last["file"], last["line"]) == (6, str(other), 2)
    assert (last["nearest_file"], last["nearest_line"]) == (str(dataset), 1)
    said = dedup(dataset, other, "--explain").output
    assert said.startswith(f"the first 7 rows of {dataset}, {other}, each with")
    other.write_bytes(orjson.dumps([*rows, {"prompt": "Sing."}]))
    with pytest.raises(InputError, match=r"a\.json:3: there is no field 'instruction'"):
        dedup(dataset, other, "-o", out, "--overwrite")
    with pytest.raises(OutputError, match="is read by this command"):
        dedup(dataset, other, "-o", other, "--overwrite")
    table = tmp_path / "b.csv"
    table.write_text("instruction\nSing\n")
    with pytest.raises(InputError, match=r"b\.csv: is CSV, and what comes before it JSON; give"):
        dedup(dataset, table, "-o", out, "--overwrite")


@pytest.mark.parametrize("target", ["ndjson", "json", "parquet"])
@pytest.mark.parametrize("source", ["jsonl", "json", "parquet"])
def test_every_format_in_and_out(source: str, target: str, tmp_path: Path) -> None:
    """Rows come out as they went in, whatever the format, over several batches of Parquet."""
    rows = [{"instruction": f"word{i} other{i}", "n": i, "tags": ["a", "b"]} for i in range(2_100)]
    path, out = tmp_path / f"in.{source}", tmp_path / f"out.{target}"
    with datasets.writer(path) as write:
        for row in [*rows, rows[0]]:
            write(datasets.Row(path, 1, row))
    dedup(path, "-o", out)
    assert [row.values for row in datasets.read_rows(out)] == rows
    if source == target == "parquet":
        assert pq.read_schema(out) == pq.read_schema(path)


def test_parquet_keeps_the_types_of_its_columns(tmp_path: Path) -> None:
    """Also where the first rows alone would say otherwise."""
    schema = pa.schema([("instruction", pa.large_string()), ("n", pa.int8())])
    rows = [{"instruction": "a b c", "n": None}, {"instruction": "d e f", "n": 3}]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "in.parquet")
    dedup(tmp_path / "in.parquet", "-o", tmp_path / "out.parquet")
    assert pq.read_schema(tmp_path / "out.parquet").equals(schema)
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == rows


def test_a_dataset_without_rows(tmp_path: Path) -> None:
    """A list of none and a header alone are datasets; a file of nothing is an accident."""
    (tmp_path / "in.json").write_text("[]")
    for name in ("out.jsonl", "out.json", "out.parquet"):
        assert "0 rows" in dedup(tmp_path / "in.json", "-o", tmp_path / name).output
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    assert (tmp_path / "out.json").read_bytes() == b"[]\n"
    assert list(datasets.read_rows(tmp_path / "out.parquet")) == []
    (tmp_path / "in.csv").write_text("instruction,output\n")
    dedup(tmp_path / "in.csv", "-o", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "instruction,output\n"
    (tmp_path / "in.jsonl").touch()
    with pytest.raises(InputError, match="is empty"):
        dedup(tmp_path / "in.jsonl", "-o", tmp_path / "new.jsonl")


@pytest.mark.parametrize("name", ["in.jsonl", "link.jsonl", "hard.jsonl", "sub/../in.jsonl"])
@pytest.mark.parametrize("option", ["-o", "--decisions"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_no_output_takes_the_place_of_an_input(
    name: str, option: str, overwrite: list[str], dataset: Path, tmp_path: Path
) -> None:
    """By whatever name, link or hard link, and whatever is asked; a set to stay clear of too."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(dataset)
    before = dataset.read_bytes()
    other = tmp_path / "other.jsonl"
    other.write_text('{"instruction": "something else altogether"}')
    for arguments in ([dataset], [other, "--against", dataset]):
        with pytest.raises(OutputError, match="is read by this command"):
            dedup(*arguments, option, tmp_path / name, *overwrite)
    assert dataset.read_bytes() == before
    assert (tmp_path / "link.jsonl").is_symlink()


def test_a_file_that_is_there_is_replaced_only_when_asked(dataset: Path, tmp_path: Path) -> None:
    """And a link to somewhere else is replaced itself, never written through."""
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    with pytest.raises(OutputError, match="exists; replace it with --overwrite"):
        dedup(dataset, "-o", out)
    assert out.read_text() == "precious"
    (tmp_path / "link.jsonl").symlink_to(out)
    (tmp_path / "dangling.jsonl").symlink_to("nowhere")
    for name in ("link.jsonl", "dangling.jsonl"):
        with pytest.raises(OutputError, match="exists"):
            dedup(dataset, "-o", tmp_path / name)
        dedup(dataset, "-o", tmp_path / name, "--overwrite")
        assert not (tmp_path / name).is_symlink()
        assert len(lines(tmp_path / name)) == 3
    assert out.read_text() == "precious"
    with pytest.raises(UsageError, match="the same file"):
        dedup(dataset, "-o", tmp_path / "new", "--decisions", tmp_path / "new")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"instruction": "a"}\n{"instruction": ', "in.jsonl:2: not JSON"),
        (b'\n{"instruction": "a"}\n["a"]', "in.jsonl:3: the row is not an object"),
        (b'{"txt": "a"}', "in.jsonl:1: none of the fields is one that is usually compared"),
        (b'{"instruction": 3}', "in.jsonl:1: field 'instruction' is not text"),
        (b'{"instruction": "\xff"}', "in.jsonl:1: is not UTF-8"),
        (b'{"instruction": "a"}\n{"text": "b"}', "in.jsonl:2: there is no field 'instruction'"),
    ],
)
def test_bad_row_is_named_and_nothing_is_written(
    content: bytes, message: str, tmp_path: Path
) -> None:
    """Path and line, in one line; a half-written output never appears."""
    (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(InputError) as caught:
        dedup(tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "kept", "named"),
    [
        (
            "in.jsonl",
            '{"instruction": \n{"instruction": "Sing."}\n["a"]\n{"text": "b"}\n'
            '{"instruction": "Eat."}',
            [{"instruction": "Sing."}, {"instruction": "Eat."}],
            [
                "in.jsonl:1: not JSON",
                "in.jsonl:3: the row is not an object",
                "in.jsonl:4: there is no field",
            ],
        ),
        (
            "in.json",
            '[{"instruction": "Sing."}, 3, {"id": "d2"}, {"instruction": "Eat."}]',
            [{"instruction": "Sing."}, {"instruction": "Eat."}],
            ["in.json:2: the row is not an object", "in.json:3: there is no field"],
        ),
        (
            "in.csv",
            'instruction,n\nSing.,1\n"Eat, drink",2,3\nRead.,4\n',
            [{"instruction": "Sing.", "n": "1"}, {"instruction": "Read.", "n": "4"}],
            ["in.csv:3: has 3 cells"],
        ),
    ],
)  # fmt: skip
def test_bad_rows_are_left_out_where_asked_and_named_everywhere(
    name: str, content: str, kept: list[Any], named: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    out, why = tmp_path / "out.jsonl", tmp_path / "why.jsonl"
    result = dedup(tmp_path / name, "-o", out, "--decisions", why, "--on-bad-row", "skip")
    assert lines(out) == kept
    assert f"{len(named)}  bad rows besides, left out; --decisions names all\n" in result.stdout
    refused = [decision for decision in lines(why) if decision["reason"] == "bad_row"]
    bad = [decision["error"] for decision in refused]
    assert len(bad) == len(named)
    assert all(f":{decision['line']}: " in decision["error"] for decision in refused)
    assert all(decision["text"] for decision in refused)
    for message, error in zip(named, bad, strict=True):
        assert message in error
        assert f"woolmill: left out: {error}\n" in result.stderr
    assert dedup(tmp_path / name, "--explain", "--on-bad-row", "skip").exit_code == 0


def test_decisions_are_written_in_one_way_whatever_they_hold(tmp_path: Path) -> None:
    """So that they can be searched: no escapes, no blanks, with null in them or without."""
    texts = ["描述一下秋天。", "描述一下秋天。"]
    rows = [{"instruction": text, "id": "q"} for text in texts]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    dedup(tmp_path / "in.jsonl", "--decisions", tmp_path / "why.jsonl")
    first, second = (tmp_path / "why.jsonl").read_text().splitlines()
    for line, accepted in ((first, "true"), (second, "false")):
        assert f'"id":"q","text":"描述一下秋天。","accepted":{accepted},' in line


@pytest.mark.parametrize("name", ["why.csv", "why.TSV.gz", "why.parquet", "why.arrow"])
def test_decisions_do_not_go_into_a_table(dataset: Path, tmp_path: Path, name: str) -> None:
    """It would be said of a row far on, after the work."""
    with pytest.raises(UsageError, match=f"{name}: .*give --decisions a name that ends in .jsonl"):
        dedup(dataset, "--decisions", tmp_path / name)


def test_a_row_that_stops_it_names_the_way_on_and_rows_of_references_are_counted(
    dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "bench.jsonl").write_text('{"instruction": "Name three primary colours!"}')
    against = ("--against", tmp_path / "bench.jsonl")
    said = dedup(dataset, "-o", tmp_path / "out.jsonl", *against).output
    assert f"3  of these for a row of {tmp_path / 'bench.jsonl'}\n" in said
    with pytest.raises(UsageError, match="--explain decides nothing"):
        dedup(dataset, "--explain", *against)
    with dataset.open("a") as file:
        file.write('\n{"instruction": ')
    with pytest.raises(InputError, match=r"in.jsonl:6: not JSON.*; --on-bad-row skip leaves"):
        dedup(dataset, "-o", tmp_path / "other.jsonl")


@pytest.mark.parametrize("target", ["/dev/stdout", "fifo"])
def test_what_is_no_file_is_written_to_and_not_replaced(target: str, tmp_path: Path) -> None:
    """Rows go on through it, and the summary stays out of their way."""
    source, why = tmp_path / "in.jsonl", tmp_path / "why.jsonl"
    source.write_text('{"instruction": "a b c"}\n{"instruction": "d e f"}\n')
    place = Path(target) if target.startswith("/") else tmp_path / target
    if target == "fifo":
        os.mkfifo(place)
    command = [sys.executable, "-m", "engine", "dedup", source, "--no-semantic", "-o", place]
    with subprocess.Popen(
        [*map(str, command), "--decisions", str(why)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        came = place.read_bytes() if target == "fifo" else b""
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert came + out == source.read_bytes()
    assert b"accepted" in err
    assert len(lines(why)) == 2
    assert place.is_fifo() or place.is_symlink()


def test_what_is_no_path_is_refused(dataset: Path, tmp_path: Path) -> None:
    """An empty one would be the current folder, and a dash a file of that name."""
    for words, said in (("", "a path is empty"), (dataset, "- names no file here")):
        done = dedup(words, "-o", tmp_path / "out.jsonl" if not words else "-")
        assert done.exit_code == 2
        assert said in done.output


def test_hidden_and_empty_files_of_a_folder_are_no_data(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "empty.jsonl").touch()
    with pytest.raises(InputError, match=r"empty\.jsonl: is empty"):
        dedup(folder, "-o", tmp_path / "out.jsonl")
    for name in ("rows.jsonl", ".rows.jsonl.swp.jsonl"):
        (folder / name).write_text('{"instruction": "a b c"}\n')
    dedup(folder, "-o", tmp_path / "out.jsonl", "--decisions", tmp_path / "why.jsonl")
    assert len(lines(tmp_path / "why.jsonl")) == 1
