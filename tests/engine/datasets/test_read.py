"""Datasets are read by their content, whatever their files are called."""

from __future__ import annotations

import csv
import gzip
import json
import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.datasets import Dataset, forms, read_rows
from engine.errors import InputError
from engine.export.formats import writer
from engine.export.rows import rows
from engine.store import RunStore
from tests.linear import in_linear_time

pytestmark = pytest.mark.slow

ROWS: list[dict[str, Any]] = [
    {"instruction": "Name a colour.", "input": "", "n": 1.5, "tags": ["a", None]},
    {"instruction": "写一首诗\u2028 and\ta tab", "input": None, "n": -0.0, "tags": []},
    {"instruction": 'quote " and, comma\nnew line', "input": "\x85", "n": 2**60, "tags": [{}]},
]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def values(path: Path) -> list[dict[str, Any]]:
    return [row.values for row in read_rows(path)]


FORMS: dict[str, str] = {
    "lines": LINES,
    "lines_with_an_end": LINES + "\n",
    "crlf": LINES.replace("\n", "\r\n"),
    "old_mac": LINES.replace("\n", "\r"),
    "blank_lines": "\n \n" + LINES.replace("\n", "\n\n\t\n") + "\n\n",
    "list": json.dumps(ROWS),
    "indented_list": json.dumps(ROWS, indent=2),
    "list_of_lines": "[" + LINES.replace("}\n", "},\n") + "]",
    "indented_objects": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "objects_on_one_line": "".join(json.dumps(row) for row in ROWS),
    "wrapped": json.dumps({"version": 1, "data": ROWS}),
    "wrapped_under_any_name": json.dumps({"meta": {"a": [1]}, "entries": ROWS}),
    "wrapped_and_indented": json.dumps({"rows": ROWS, "note": "x"}, indent=2),
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["rows.json", "rows"])
def test_every_layout_encoding_and_name_gives_the_same_rows(
    text: str, encoding: str, packed: bool, name: str, tmp_path: Path
) -> None:
    data = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
    assert values(tmp_path / name) == ROWS


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_and_its_kin(delimiter: str, line_end: str, encoding: str, tmp_path: Path) -> None:
    """Cells are text; quotes, line breaks within cells and blank lines are understood."""
    written = [{"instruction": f'say "{i}",;\t\nthen stop', "output": ""} for i in range(3)]
    path = tmp_path / "rows"
    with path.open("w", encoding=encoding, newline="") as file:
        table = csv.DictWriter(
            file, list(written[0]), delimiter=delimiter, lineterminator=line_end, quoting=1
        )
        table.writeheader()
        table.writerows(written)
        file.write(line_end)
    assert values(path) == written
    assert [row.line for row in read_rows(path)] == [2, 4, 6]


def test_what_json_does_not_know_and_people_write(tmp_path: Path) -> None:
    """NaN, infinities, integers of any size, half surrogate pairs, a key twice: the last counts."""
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"a": NaN, "b": -Infinity, "c": 340282366920938463463374607431768211456}\n'
        '{"a": "half \\ud83d", "b": 1, "b": 2, "c": 1e300}'
    )
    first, second = values(path)
    assert math.isnan(first["a"])
    assert (first["b"], first["c"]) == (-math.inf, 2**128)
    assert second == {"a": "half \ud83d", "b": 2, "c": 1e300}
    document = tmp_path / "rows.json"
    document.write_text(f"[{path.read_text().replace(chr(10), ',')}]")
    assert values(document)[1] == second
    assert values(document)[0]["c"] == 2**128


ONE_ROW = [
    {"instruction": "a", "examples": [{"b": 1}]},
    {"messages": [{"role": "user", "content": "a"}]},
    {"dialog": [{"from": "human", "value": "a"}]},
    {"prompt": [{"role": "user", "content": "a"}], "chosen": [], "rejected": []},
    {"a": "x", "b": [{"c": 1}, 2]},
]


@pytest.mark.parametrize("row", ONE_ROW)
@pytest.mark.parametrize("indent", [None, 2])
def test_one_row_is_a_row_though_it_holds_lists(
    row: dict[str, Any], indent: int | None, tmp_path: Path
) -> None:
    """An object by itself might be rows with something around them: not where it looks like one."""
    path = tmp_path / "rows"
    path.write_text(json.dumps(row, indent=indent))
    assert values(path) == [row]
    path.write_text(json.dumps(row) + "\n" + json.dumps(row))
    assert values(path) == [row, row]


@pytest.mark.parametrize("row", [{"n": 1, "tags": []}, {"n": 1, "tags": [{"k": 1}, {"k": 2}]}])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.NDJSON", "rows.jsonl.gz"])
def test_the_only_line_of_json_lines_is_a_row(
    row: dict[str, Any], name: str, tmp_path: Path
) -> None:
    """Its name says so, whatever lists it holds; more lines do not change what the first is."""
    for count in (1, 2):
        data = (json.dumps(row) + "\n").encode() * count
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        assert values(tmp_path / name) == [row] * count


def test_parquet_with_two_columns_of_one_name(tmp_path: Path) -> None:
    """One of them would be lost."""
    columns = [pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["n", "n"]), tmp_path / "rows")
    with pytest.raises(InputError, match="name a column twice: n"):
        values(tmp_path / "rows")


def test_tables(tmp_path: Path) -> None:
    """Parquet, an Arrow stream, an Arrow file: by content, in batches."""
    written = [{"instruction": f"row {i}", "tags": [{"k": i}]} for i in range(2_500)]
    table = pa.Table.from_pylist(written)
    pq.write_table(table, tmp_path / "a.bin")
    with pa.ipc.new_stream(tmp_path / "b.bin", table.schema) as stream:
        stream.write_table(table)
    with pa.ipc.new_file(tmp_path / "c.bin", table.schema) as file:
        file.write_table(table)
    for name in ("a.bin", "b.bin", "c.bin"):
        assert values(tmp_path / name) == written


def test_folders(tmp_path: Path) -> None:
    """What ``save_to_disk`` wrote, without the caches beside it; and shards in their order."""
    written = [{"instruction": f"row {i}"} for i in range(10)]
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(written).save_to_disk(saved, num_shards=2)
    shutil.copy(next(saved.glob("*.arrow")), saved / "cache-0123.arrow")
    assert values(saved) == written
    datasets.DatasetDict(train=datasets.Dataset.from_list(written)).save_to_disk(tmp_path / "parts")
    with pytest.raises(InputError, match=r"holds several parts \(train\)"):
        values(tmp_path / "parts")
    assert values(tmp_path / "parts" / "train") == written
    (tmp_path / "shards" / "data").mkdir(parents=True)
    (tmp_path / "shards" / "README.md").write_text("x")
    for i, row in enumerate(written):
        (tmp_path / "shards" / "data" / f"{i}.jsonl").write_text(json.dumps(row))
    assert values(tmp_path / "shards") == written
    (tmp_path / "shards" / "data" / "x.csv").write_text("instruction,b\n1,2")
    with pytest.raises(InputError, match="several forms"):
        values(tmp_path / "shards")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="neither a run nor a folder of data files"):
        values(tmp_path / "none")


def test_a_run(run_folder: Path, tmp_path: Path) -> None:
    """Its accepted records, as its own export has them."""
    with RunStore.read(run_folder) as run, (tmp_path / "rows").open("wb") as file:
        with writer("alpaca", file) as write:
            for row in rows(run):
                write(row)
    assert values(run_folder) == values(tmp_path / "rows")


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "rows: is empty"),
    "blank": (b"\xef\xbb\xbf \n\n", "rows: is empty"),
    "latin1": ('{"a": 1}\n{"a": "café"}'.encode("latin-1"), "rows:2: is not UTF-8"),
    "latin1_list": ('[{"a": 1},\n{"a": "café"}]'.encode("latin-1"), "rows:2: is not UTF-8"),
    "latin1_csv": ("a,b\nx,y\né,z".encode("latin-1"), "is not UTF-8"),
    "cut_line": (b'{"a": 1}\n{"a": ', "rows:2: not JSON"),
    "cut_list": (b'[\n{"a": 1},\n{"a": ', "rows:3: not JSON"),
    "cut_objects": (b'{\n"a": 1}\n{\n"a": ', "rows:3: not JSON"),
    "row_no_object": (b'{"a": 1}\n["a"]', "rows:2: the row is not an object"),
    "rows_no_objects": (b"[1, 2]", "rows:1: the row is not an object"),
    "columns": (b'{"a": {"0": "x"}, "b": {"0": "y"}}', "instead of rows"),
    "lists": (b'{"train": [{"a": 1}], "test": [{"a": 1}]}', "instead of rows"),
    "columns_of_lists": (b'{"a": ["x", "y"], "b": ["z", "w"]}', "instead of rows"),
    "deep": (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
    "many_digits": (b'{"a": ' + b"1" * 5_000 + b"}", "cannot be read|can be read"),
    "prose": (b"Once upon a time", "holds neither JSON, CSV"),
    "cells": (b"a,b\n1,2\n1,2,3", "rows:3: has 3 cells, the header has 2"),
    "header": (b"a,a\n1,2", "rows:1: the header names a column twice"),
    "open_quote": (b'a,b\n1,"2', "not CSV that can be read"),
    "zip": (b"PK\x03\x04rest", "packed with zip"),
    "zstandard": (b"\x28\xb5\x2f\xfdrest", "packed with zstandard"),
    "parquet": (b"PAR1 no such thing", "not a Parquet file"),
    "arrow": (b"ARROW1 no such thing", "not an Arrow file"),
    "gzip_cut": (gzip.compress(b'{"a": 1}' * 100)[:-20], "gzip is damaged"),
    "gzip_no_more": (b"\x1f\x8b\x08rest", "gzip is damaged"),
    "gzip_twice": (gzip.compress(gzip.compress(b'{"a": 1}')), "packed twice"),
    "utf16_cut": ('{"a": 1}'.encode("utf-16")[:-1], "not whole UTF-16"),
}


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_read_is_one_line_with_its_place(
    data: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        values(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_gzip_bomb_is_bounded(tmp_path: Path) -> None:
    """A gigabyte of rows in one megabyte ends after 64 MiB; honest text of any size does not."""
    path = tmp_path / "bomb.jsonl.gz"
    row = json.dumps({"instruction": "a" * 1000}).encode() + b"\n"
    with gzip.open(path, "wb", 9) as file:
        for _ in range(1000):
            file.write(row * 1000)
    with in_linear_time():
        with pytest.raises(InputError, match="200 times its size"):
            for _ in read_rows(path):
                pass
    with gzip.open(path, "wb") as file:
        file.write(b" " * (forms.MAX_LINE_BYTES + 2**20) + b"\n" + row)
    with pytest.raises(InputError, match=r"200 times its size|longer than"):
        values(path)


HOSTILE = (
    "\n",
    " ",
    "[",
    "{",
    '{"a":',
    "{}",
    "[]",
    '"',
    "\\",
    "1",
    "-",
    ",",
    "a,",
    "\t",
    "\r",
    "NaN",
)


@pytest.mark.parametrize("fragment", HOSTILE)
@pytest.mark.parametrize("before", ["", "[", '{"a": "', "a,b\n"])
def test_a_megabyte_of_anything_is_read_in_no_time(
    before: str, fragment: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows"
    path.write_text(before + fragment * (1_000_000 // len(fragment)))
    with in_linear_time():
        try:
            for _ in Dataset(path):
                pass
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either outcome is right
            assert len(str(error)) < 600  # noqa: PT017
