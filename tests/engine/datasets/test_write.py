"""Rows are written in the form they came in, or the one that a name asks for; nothing is lost."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import math
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.datasets import Dataset, writer
from engine.errors import OutputError, UsageError


def copied(source: Path, target: Path) -> bytes:
    """The rows of one file, written to another."""
    dataset = Dataset(source)
    rows = list(dataset)
    with writer(target, dataset) as write:
        for row in rows:
            write(row)
    return target.read_bytes()


LINES = (
    '{"instruction": "a", "n": 1.10, "n2": 1E5, "big": 340282366920938463463374607431768211456}\n'
    '{"instruction":"\\u00e9 \\ud83d \\/", "x": NaN, "x": -Infinity}\n'
)


def test_lines_are_kept_byte_for_byte(tmp_path: Path) -> None:
    """Numbers, escapes, blanks and doubled keys, also through gzip and under other names."""
    source = tmp_path / "in.jsonl"
    source.write_text(LINES)
    for name in ("out.jsonl", "out.ndjson", "out", "out.txt"):
        assert copied(source, tmp_path / name).decode() == LINES
    assert gzip.decompress(copied(source, tmp_path / "out.jsonl.gz")).decode() == LINES
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(LINES.encode()))
    assert gzip.decompress(copied(packed, tmp_path / "no_ending")).decode() == LINES
    assert copied(packed, tmp_path / "plain.jsonl").decode() == LINES
    assert copied(packed, tmp_path / "a.jsonl.gz") == copied(packed, tmp_path / "b.jsonl.gz")
    odd = tmp_path / "lines.json"  # as on the Hugging Face Hub
    odd.write_text(LINES)
    assert copied(odd, tmp_path / "out.json").decode() == LINES


ROWS = '[{"instruction": "a", "x": NaN, "y": null}, {"instruction": "\\ud83d", "n": 1e400, "m": N}]'
ROWS = ROWS.replace("N}", f"{2**128}}}")


@pytest.mark.parametrize(
    "text", [ROWS, f'{{"version": "\u00e9", "data": {ROWS}, "z": [1]}}', f'{{"data": {ROWS}}}']
)
def test_a_document_keeps_its_values_and_what_stands_around_its_rows(
    text: str, tmp_path: Path
) -> None:
    """NaN stays NaN, null null, an integer of 128 bits itself."""
    source = tmp_path / "in.json"
    source.write_text(text)
    before, after = json.loads(text), json.loads(copied(source, tmp_path / "out.json"))
    if isinstance(before, dict):
        assert after.keys() == before.keys()
        assert repr(after.pop("data")) == repr(before.pop("data"))
    assert repr(after) == repr(before)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_csv_stays_as_it_was(delimiter: str, line_end: str, tmp_path: Path) -> None:
    """Delimiter, line ends, and cells that a spreadsheet would run: they are the person's own."""
    text = delimiter.join(("instruction", "output")) + line_end
    text += delimiter.join(("=1+1", '"a ""quoted""\nline"')) + line_end
    source = tmp_path / "in.csv"
    source.write_bytes(text.encode())
    assert copied(source, tmp_path / "out.csv") == text.encode()


def test_csv_from_other_forms(tmp_path: Path) -> None:
    """Formulas are made inert, and what CSV cannot hold is refused instead of flattened."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"instruction": "=1+1", "n": 2, "x": null}')
    assert copied(source, tmp_path / "out.csv") == b"instruction,n,x\n'=1+1,2,\n"
    assert copied(source, tmp_path / "out.tsv") == b"instruction\tn\tx\n'=1+1\t2\t\n"
    source.write_text('{"instruction": "a", "tags": ["b"]}')
    with pytest.raises(
        OutputError, match=r"holds a value of type list, and CSV has only text.*\.jsonl"
    ):
        copied(source, tmp_path / "new.csv")
    source.write_text('{"instruction": "a"}\n{"instruction": "b", "more": "c"}')
    with pytest.raises(OutputError, match="has other fields than the first"):
        copied(source, tmp_path / "new.csv")
    assert not (tmp_path / "new.csv").exists()


LATE: dict[str, tuple[list[Any], list[Any]]] = {
    "fraction": ([1], [4.75]),
    "text": ([None], ["b"]),
    "list": ([[]], [["b"]]),
    "fraction_in_a_list": ([[1]], [[1.5, 2.5]]),
    "field": ([{"p": 1}], [{"p": None, "q": 2}]),
    "field_in_a_list": ([[{"p": 1}]], [[{"p": 1, "q": None}, {"p": None, "q": 2.5}]]),
    "not_a_number": ([0.5], [math.nan]),
}


@pytest.mark.parametrize(("first", "then"), LATE.values(), ids=LATE.keys())
def test_a_table_holds_what_late_rows_have(
    first: list[Any], then: list[Any], tmp_path: Path
) -> None:
    """Behind thousands that say otherwise: Arrow would cut a fraction off, or leave a field out."""
    rows = [{"instruction": "a", "o": o} for o in [*first * 2_500, *then]]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join([*map(json.dumps, rows), '{"instruction": "c", "late": 1}']))
    copied(source, tmp_path / "out.parquet")
    told = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert repr(told[-2]["o"]) == repr(*then)
    assert told[-1] == {"instruction": "c", "o": None, "late": 1}


@pytest.mark.parametrize("values", [(1, "1"), (2**53 + 1, 0.5), (True, 1), ({"p": 1}, 2), ({}, {})])
def test_a_table_that_cannot_hold_a_row_as_it_is_is_refused(
    values: tuple[Any, Any], tmp_path: Path
) -> None:
    one, other = ([json.dumps({"instruction": "a", "o": value})] for value in values)
    source = tmp_path / "in.jsonl"
    for lines in (one + other, one * 1_001 + other, other * 1_001 + one):
        source.write_text("\n".join(lines))
        with pytest.raises(OutputError, match=r"out\.parquet: .*give -o a name that ends in .json"):
            copied(source, tmp_path / "out.parquet")
        assert not (tmp_path / "out.parquet").exists()


DAY, NOON = dt.date(2020, 1, 1), dt.datetime(2020, 1, 1, 12, 0, 0, 5)
TYPES: dict[str, tuple[Any, Any]] = {
    "int_float": (pa.array([1]), pa.array([9.5])),
    "single_double": (pa.array([1.5], pa.float32()), pa.array([1e300])),
    "seconds_microseconds": (
        pa.array([dt.datetime(2020, 1, 1)], pa.timestamp("s")),
        pa.array([NOON], pa.timestamp("us")),
    ),
    "durations": (
        pa.array([dt.timedelta(seconds=1)], pa.duration("s")),
        pa.array([dt.timedelta(milliseconds=1500)], pa.duration("ms")),
    ),
    "structs": (pa.array([{"a": 1, "b": "x"}]), pa.array([{"b": "y", "a": 1.75}])),
    "null_text": (pa.array([None], pa.null()), pa.array(["x"])),
    "decimals": (pa.array([Decimal("1.10")]), pa.array([Decimal("1.12345")])),
}
APART: dict[str, tuple[Any, Any]] = {
    "date_time": (pa.array([DAY]), pa.array([NOON], pa.timestamp("us"))),
    "time_zones": (
        pa.array([NOON], pa.timestamp("us")),
        pa.array([NOON], pa.timestamp("us", "Asia/Tokyo")),
    ),
    "bool_int": (pa.array([True]), pa.array([2])),
    "unsigned_negative": (pa.array([2**64 - 1], pa.uint64()), pa.array([-1])),
    "text_bytes": (pa.array(["x"]), pa.array([b"\xff"])),
}


def folder_of(tables: Iterable[Any], folder: Path) -> Path:
    folder.mkdir()
    for number, column in enumerate(tables):
        table = pa.table({"instruction": ["a"], "o": column})
        pq.write_table(table, folder / f"{number}.parquet")
    return folder


@pytest.mark.parametrize("pair", TYPES.values(), ids=TYPES.keys())
def test_tables_of_different_types_make_one_of_the_wider(
    pair: tuple[Any, Any], tmp_path: Path
) -> None:
    """In either order."""
    for name, tables in (("there", pair), ("back", pair[::-1])):
        copied(folder_of(tables, tmp_path / name), tmp_path / f"{name}.parquet")
        values = pq.read_table(tmp_path / f"{name}.parquet").column("o").to_pylist()
        assert values == [value for table in tables for value in table.to_pylist()]


@pytest.mark.parametrize("pair", APART.values(), ids=APART.keys())
def test_tables_whose_types_no_other_holds_both_of_are_refused(
    pair: tuple[Any, Any], tmp_path: Path
) -> None:
    for name, tables in (("there", pair), ("back", pair[::-1])):
        with pytest.raises(OutputError, match=r"give -o a name that ends in .jsonl"):
            copied(folder_of(tables, tmp_path / name), tmp_path / f"{name}.parquet")
        assert not (tmp_path / f"{name}.parquet").exists()


@pytest.mark.parametrize("column", ["more", "o"])
def test_a_folder_of_tables_loses_no_column(column: str, tmp_path: Path) -> None:
    """Wherever in the folder the file is that has it; notes on the types of one go."""
    plain = pa.table({"instruction": ["a"], "o": [{"p": 1}]}).replace_schema_metadata({"x": "y"})
    other = pa.table({"instruction": ["b"], column: [{"p": 1, "q": 2}]})
    for folder, tables in (("last", (plain, other)), ("first", (other, plain))):
        (tmp_path / folder).mkdir()
        for number, table in enumerate(tables):
            pq.write_table(table, tmp_path / folder / f"{number}.parquet")
        out = tmp_path / f"{folder}.parquet"
        copied(tmp_path / folder, out)
        values = pq.read_table(out).column(column).to_pylist()
        assert {"p": 1, "q": 2} in values
        assert values.count(None) == (column == "more")
        assert b"x" not in (pq.read_schema(out).metadata or {})


def test_a_table_has_the_columns_of_all_rows(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"instruction": "a"}\n{"instruction": "b", "more": 1}')
    copied(source, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == [
        {"instruction": "a", "more": None},
        {"instruction": "b", "more": 1},
    ]
    with pytest.raises(UsageError, match="not packed once more"):
        copied(source, tmp_path / "out.parquet.gz")


def test_an_arrow_stream_stays_one(tmp_path: Path) -> None:
    """And becomes Parquet with its columns' types, or JSON without what JSON has not."""
    schema = pa.schema(
        [("instruction", pa.large_string()), ("day", pa.date32()), ("b", pa.binary())]
    )
    table = pa.Table.from_pylist([{"instruction": "a", "day": None, "b": None}], schema)
    source = tmp_path / "in.arrow"
    with pa.ipc.new_stream(source, schema) as stream:
        stream.write_table(table)
    copied(source, tmp_path / "out.arrow")
    copied(source, tmp_path / "out.parquet")
    assert pq.read_schema(tmp_path / "out.parquet").equals(schema)
    assert copied(tmp_path / "out.arrow", tmp_path / "o.jsonl") == (
        b'{"instruction":"a","day":null,"b":null}\n'
    )
    with pa.ipc.new_stream(source, schema) as stream:
        stream.write_table(pa.Table.from_pylist([{"instruction": "a", "b": b"x"}], schema))
    with pytest.raises(OutputError, match=r"type bytes.*\.parquet"):
        copied(source, tmp_path / "o2.jsonl")


@pytest.mark.parametrize("name", ["rows.xlsx", "rows.zip", "rows.jsonl.zst"])
def test_an_ending_that_nothing_is_written_as_is_refused(name: str, tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="nothing is written as"),
        writer(tmp_path / name),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
