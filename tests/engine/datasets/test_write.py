"""Rows are written in the form they came in, or the one that a name asks for; nothing is lost."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.datasets import Dataset, Form, writer
from engine.errors import OutputError, UsageError


def copied(source: Path, target: Path) -> bytes:
    """The rows of one file, written to another."""
    dataset = Dataset(source)
    rows = list(dataset)
    with writer(target, dataset.form, source) as write:
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
    with pytest.raises(OutputError, match=r"holds lists, and CSV has only text.*\.jsonl"):
        copied(source, tmp_path / "new.csv")
    source.write_text('{"instruction": "a"}\n{"instruction": "b", "more": "c"}')
    with pytest.raises(OutputError, match="has other fields than the first"):
        copied(source, tmp_path / "new.csv")
    assert not (tmp_path / "new.csv").exists()


MIXED: dict[str, list[dict[str, Any]]] = {
    "late_column": [{"instruction": "a"}] * 1_001 + [{"instruction": "a", "late": 1}],
    "late_nested": [{"instruction": "a", "o": {"p": 1}}] * 1_001
    + [{"instruction": "a", "o": {"q": 2}}],
    "late_in_a_list": [{"instruction": "a", "o": [{"p": 1}]}] * 1_001
    + [{"instruction": "a", "o": [{"p": 1}, {"q": 2}]}],
    "two_types": [{"instruction": "a", "o": 1}, {"instruction": "a", "o": "1"}],
}


@pytest.mark.parametrize("rows", MIXED.values(), ids=MIXED.keys())
def test_a_table_takes_all_of_a_row_or_refuses_it(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Arrow leaves out, in silence, what the first rows had no column for."""
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(OutputError, match=r"out\.parquet: .*give -o a name that ends in .jsonl"):
        copied(source, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("column", ["more", "o"])
def test_a_folder_of_tables_loses_no_column_in_silence(column: str, tmp_path: Path) -> None:
    """Wherever in the folder the file is that has it."""
    plain = pa.table({"instruction": ["a"], "o": [{"p": 1}]})
    other = pa.table({"instruction": ["b"], column: [{"p": 1, "q": 2}]})
    for folder, tables in (("last", (plain, other)), ("first", (other, plain))):
        (tmp_path / folder).mkdir()
        for number, table in enumerate(tables):
            pq.write_table(table, tmp_path / folder / f"{number}.parquet")
        out = tmp_path / f"{folder}.parquet"
        if folder == "first" and column == "o":
            copied(tmp_path / folder, out)
            values = pq.read_table(out).column("o").to_pylist()
            assert values == [{"p": 1, "q": 2}, {"p": 1, "q": None}]
            continue
        with pytest.raises(OutputError, match=r"row 1 of .*/1.parquet has other fields than those"):
            copied(tmp_path / folder, out)
        assert not out.exists()


def test_a_table_has_the_columns_of_all_its_first_rows(tmp_path: Path) -> None:
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
        writer(tmp_path / name, Form(kind="lines")),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
