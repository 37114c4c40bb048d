"""Files to rows: by content and not by name, whole or named as damaged, and nothing executed."""

from __future__ import annotations

import gzip
import importlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import ConfigError, DataError, UnavailableError
from trainer.files import find_files, rows_of
from trainer.formats import Rules
from trainer.records import BadRow, Instruction, Records, Text, read_examples

ROWS = [{"instruction": f"a{i}", "input": "", "output": f"b,\n{i}"} for i in range(3)]
LINES = "\n".join(map(json.dumps, ROWS)).encode()
LIST = json.dumps(ROWS).encode()


def values(path: Path) -> list[Any]:
    return [row for _, row in rows_of(path)]


@pytest.mark.parametrize("packed", ["", "gzip", "bz2", "lzma"])
@pytest.mark.parametrize(
    "body",
    [
        LINES,
        LIST,
        LIST.decode().encode("utf-16"),
        b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
        b"\n\n" + json.dumps(ROWS, indent=2).encode(),
        "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
        json.dumps({"version": 1, "data": ROWS}).encode(),
        json.dumps({"data": ROWS}, indent=1).encode(),
    ],
    ids=["lines", "list", "utf-16", "bom", "indented list", "objects", "wrapped", "indented"],
)
def test_json_in_every_dress_under_a_name_that_says_nothing(
    tmp_path: Path, body: bytes, packed: str
) -> None:
    """Lists, lines, objects over several lines, wrapped lists; UTF-8 and UTF-16; packed or not."""
    path = tmp_path / "rows.bin"
    path.write_bytes(importlib.import_module(packed).compress(body) if packed else body)
    assert values(path) == ROWS


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_tables_with_a_header(tmp_path: Path, delimiter: str) -> None:
    """Cells may hold line breaks; names say the line where the row ends."""
    import csv

    path = tmp_path / "rows.txt"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    assert list(rows_of(path))[:2] == [("rows.txt:3", ROWS[0]), ("rows.txt:5", ROWS[1])]
    assert [e.output for e in read_examples(path) if isinstance(e, Instruction)] == [
        row["output"] for row in ROWS
    ]


def test_parquet_and_arrow_and_what_save_to_disk_leaves(tmp_path: Path) -> None:
    """One file or a folder; of several splits the training one, and the person is told."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "table")
    with pa.ipc.new_file(tmp_path / "file", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(tmp_path / "stream", table.schema) as writer:
        writer.write_table(table)
    for name in ("table", "file", "stream"):
        assert values(tmp_path / name) == ROWS
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert [e.name for e in read_examples(tmp_path / "saved")] == [
        "data-00000-of-00002.arrow#0",
        "data-00000-of-00002.arrow#1",
        "data-00001-of-00002.arrow#0",
    ]
    splits = datasets.DatasetDict({"train": dataset, "test": dataset.select([0])})
    splits.save_to_disk(str(tmp_path / "splits"))
    records = Records(tmp_path / "splits")
    assert len(list(records)) == 3
    assert records.notes == [f"{tmp_path}/splits: trains on its train split; not read are test"]


def test_nested_columns_of_a_column_store(tmp_path: Path) -> None:
    """Calls of different functions in one Parquet file get no arguments that their rows had not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "messages": [
                {"role": "user", "content": "?"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": {key: "v"}}}],
                },
            ]
        }
        for key in ("a", "b")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    calls = [e.messages[1].tool_calls for e in read_examples(tmp_path / "d.parquet")]  # type: ignore[union-attr]
    assert [call["function"]["arguments"] for (call,) in calls] == [{"a": "v"}, {"b": "v"}]


def test_folders_patterns_and_several_paths(tmp_path: Path) -> None:
    """In a fixed order; files of one name are told apart; hidden files are no data."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "part.jsonl").write_bytes(LINES)
    (tmp_path / "a" / "README.md").write_text("# not data")
    (tmp_path / "a" / ".hidden.jsonl").write_bytes(LINES)
    assert find_files(tmp_path / "a", []) == [tmp_path / "a" / "part.jsonl"]
    names = [e.name for e in read_examples(f"{tmp_path}/*/part.jsonl")]
    assert names == [f"{tmp_path}/{f}/part.jsonl:{n}" for f in "ab" for n in (1, 2, 3)]
    both = read_examples([tmp_path / "b" / "part.jsonl", tmp_path / "a"])
    assert [e.name for e in both] == names[3:] + names[:3]
    with pytest.raises(ConfigError, match="no file has such a name; check --data_path"):
        read_examples(f"{tmp_path}/*.parquet")


def test_a_folder_with_splits_trains_on_its_train_split(tmp_path: Path) -> None:
    """Names as hub datasets and our own export have them; the rest is told, not trained on."""
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    notes: list[str] = []
    assert [p.name[:11] for p in find_files(tmp_path, notes)] == ["train-00000", "train-00001"]
    assert notes == [f"{tmp_path}: trains on its train split; not read are validation.jsonl"]


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its id, from transformers' own cache where there is no network; else 69."""
    from huggingface_hub import constants

    folder = tmp_path / "datasets--tatsu-lab--alpaca"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40) / "data"
    snapshot.mkdir(parents=True)
    (snapshot / "train-00000-of-00001.jsonl").write_bytes(LINES)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert len(read_examples("tatsu-lab/alpaca")) == 3
    with pytest.raises(UnavailableError, match="the dataset hub cannot be reached"):
        read_examples("tatsu-lab/other")


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (pickle.dumps(ROWS), ConfigError, "is a pickle, which can run code and is never opened"),
        (b"version https://git-lfs.github.com/spec/v1\n", ConfigError, "run git lfs pull"),
        (b"<!DOCTYPE html>", ConfigError, "is a web page or XML; download the file itself"),
        (b"PK\x03\x04rest", ConfigError, "is a zip archive; unpack it first"),
        (b"\x28\xb5\x2f\xfdrest", ConfigError, "is packed with zstd; unpack it first"),
        (b"SQLite format 3\0rest", ConfigError, "is a database; of a run, name the folder"),
        (b"Once upon a time", ConfigError, "is none of JSON, JSON Lines, CSV with a header"),
        (gzip.compress(LINES)[:-9], DataError, "is not a whole packed file"),
        (b"ARROW1\0\0rest", DataError, "is not a whole Arrow file"),
        (b"a,a\n1,2\n", DataError, "x:1: two columns have one name"),
        (b"a,b\n1\n", DataError, "x:2: has not as many cells as line 1"),
        (b'a,b\n1,"x"y"\n', DataError, "x: after line 1: ',' expected after"),
        (b"a,b\n1,\xff\n", DataError, "is not UTF-8 at byte 6"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', DataError, "is not UTF-8 at byte 24"),
        (b"[" * 100_000, DataError, "is nested too deeply"),
        (b"[" + b"1" * 5000 + b"]", DataError, "Exceeds the limit (4300 digits)"),
        (b'{"text": ' + b"1" * 5000 + b"}", DataError, "x:1: Exceeds the limit (4300 digits)"),
        (b'{"a": ' * 100_000, DataError, "x:1: is nested too deeply"),
        (b"", DataError, "holds no records"),
        (b" \n ", DataError, "holds no records"),
    ],
    ids=range(20),
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, body: bytes, error: type[Exception], message: str
) -> None:
    path = tmp_path / "x"
    path.write_bytes(body)
    with pytest.raises(error) as caught:
        read_examples(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("bad_first", [True, False])
def test_bad_rows_are_skipped_by_name_where_asked(tmp_path: Path, bad_first: bool) -> None:
    """Torn lines and rows that are no records; the good ones before and after are read."""
    lines = ['{"text": "a"', '{"text": 3}', '{"text": "b"}', '{"text": "c", "label": 1}']
    order = lines if bad_first else lines[2:] + lines[:2]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(order))
    rows = list(Records(path, Rules(on_bad_row="skip")))
    assert [row.completion for row in rows if isinstance(row, Text)] == ["b"]
    why = {row.name: row.why for row in rows if isinstance(row, BadRow)}
    assert len(why) == 3
    assert any("text is a int, not text" in text for text in why.values())
    assert any("would lose label" in text for text in why.values())
    with pytest.raises(DataError):
        read_examples(path)


def test_a_renamed_column_that_no_row_has(tmp_path: Path) -> None:
    """78: a typing mistake in the flag must not pass."""
    path = tmp_path / "d.jsonl"
    path.write_bytes(LINES)
    with pytest.raises(ConfigError, match="no row has the column 'questoin'; check --column_map"):
        read_examples(path, Rules(columns={"questoin": "instruction"}))


def test_the_digest_follows_content_and_rules(tmp_path: Path) -> None:
    """Equal for equal bytes, another for other bytes, names or rules."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_bytes(LINES)
    two.write_bytes(LINES + b" ")
    digests = [
        Records(one).digest(),
        Records(two).digest(),
        Records([one, two]).digest(),
        Records(one, Rules(ignore=("x",))).digest(),
    ]
    assert len(set(digests)) == 4
    assert Records(one).digest() == digests[0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "state.json: is damaged: Expecting"),
        ("[]", "state.json: is damaged"),
        ("{}", "state.json: is damaged: it has no list of _data_files"),
        ('{"_data_files": [{}]}', "it names no data files"),
        ('{"_data_files": [], "_indices_data_files": [{"filename": "x"}]}', "save it again"),
    ],
)
def test_a_folder_of_save_to_disk_that_is_damaged(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "state.json").write_text(body)
    with pytest.raises((DataError, ConfigError)) as caught:
        read_examples(tmp_path)
    assert message in str(caught.value)


def test_names_in_a_dataset_lead_nowhere_else(tmp_path: Path) -> None:
    """Splits and files that a stranger has named stay inside their folder."""
    secret = tmp_path / "secret.jsonl"
    secret.write_bytes(LINES)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "state.json").write_text('{"_data_files": [{"filename": "../secret.jsonl"}]}')
    assert find_files(folder, []) == [folder / "secret.jsonl"]
    for split in ("..", ".", "../data"):
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": [split]}))
        with pytest.raises(DataError, match="names a split outside of the folder"):
            read_examples(folder)
