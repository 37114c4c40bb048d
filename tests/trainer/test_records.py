"""Reading datasets: every format is the same records, and a bad row is named."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import ConfigError, DataError
from trainer.records import Conversation, Instruction, Message, read_examples

ROW = {"instruction": "Add", "input": "1 2", "output": "3"}
BARE = {"instruction": "Say\u2028it", "output": "It"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
SEED = {
    "id": "seed_task_0",
    "instruction": "Add",
    "instances": [{"input": "1 2", "output": "3"}, {"input": "2 2", "output": "4"}],
    "is_classification": False,
}


def test_json_lines_of_every_kind(tmp_path: Path) -> None:
    """One file may mix Alpaca, chats, ShareGPT and seed tasks; names say the line."""
    path = tmp_path / "d.jsonl"
    rows = [ROW, BARE, CHAT, SHAREGPT, SEED]
    # U+2028 is a line break to str.splitlines, and legal inside a JSON string.
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    turns = (Message("user", "hi"), Message("assistant", "ho"))
    assert read_examples(path) == [
        Instruction("d.jsonl:1", "Add", "1 2", "3"),
        Instruction("d.jsonl:3", "Say\u2028it", "", "It"),
        Conversation("d.jsonl:5", turns),
        Conversation("d.jsonl:7", turns),
        Instruction("d.jsonl:9", "Add", "1 2", "3"),
        Instruction("d.jsonl:9.1", "Add", "2 2", "4"),
    ]


def test_a_json_list_and_parquet(tmp_path: Path) -> None:
    """Alpaca's own file, with a byte order mark or without, and the same rows in Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.json").write_text("\ufeff" + json.dumps([ROW, BARE]))
    pq.write_table(pa.Table.from_pylist([ROW, BARE]), tmp_path / "a.parquet")
    texts = [
        [(e.instruction, e.input, e.output) for e in read_examples(tmp_path / name)]  # type: ignore[union-attr]
        for name in ("a.json", "a.parquet")
    ]
    assert texts[0] == texts[1] == [("Add", "1 2", "3"), ("Say\u2028it", "", "It")]


def test_the_folder_of_a_run_gives_its_accepted_records(tmp_path: Path) -> None:
    """In plan order; refused pieces are left out."""
    run = tmp_path / "run"
    run.mkdir()
    with sqlite3.connect(run / "run.sqlite") as database:
        database.execute("CREATE TABLE decision (request, position, reason, body, sum)")
        for request, reason, record in [(2, None, ROW), (1, "too_long", ROW), (0, None, BARE)]:
            body = json.dumps({"index": request, "record": record})
            row = (request, 0, reason, body, 0)
            database.execute("INSERT INTO decision VALUES (?, ?, ?, ?, ?)", row)
    database.close()
    names = [example.name for example in read_examples(run)]
    assert names == ["run#0.0", "run#2.0"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "d.json#0: is a str, not an object"),
        ({"instruction": "a"}, "d.json#0: output is missing, not text"),
        ({"instruction": "a", "output": 3}, "d.json#0: output is a int, not text"),
        ({"instruction": "a", "input": [], "output": "b"}, "d.json#0: input is a list, not text"),
        ({"instruction": "\ud800", "output": "b"}, "d.json#0: instruction holds half a surrogate"),
        ({"messages": "hi"}, "d.json#0: its turns are a str, not a list"),
        ({"messages": [3]}, "d.json#0: turn 0 is a int, not an object"),
        ({"messages": [{"role": "judge", "content": ""}]}, "turn 0 has the role 'judge'; known"),
        ({"messages": [{"role": "user", "content": None}]}, "turn 0: content is missing, not text"),
        ({"messages": [{"role": "user", "content": "a"}]}, "has no turn of the assistant to learn"),
        ({"instruction": "a", "instances": [3]}, "d.json#0: is a int, not an object"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    """65 for the whole file: training on fewer records than were given is worse than stopping."""
    path = tmp_path / "d.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("d.json", b"[\n{]", "d.json:2:2: Expecting property name"),
        ("d.jsonl", b'{"instruction": "a", "output": "b"}\n{', "d.jsonl:2:2: Expecting property"),
        ("d.json", b"\xff\xff", "is not UTF-8 at byte 0"),
        ("d.json", b"[]", "holds no records"),
        ("d.parquet", b"PAR1", "is not a whole Parquet file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, body: bytes, message: str) -> None:
    """With line and column where it has them."""
    (tmp_path / name).write_bytes(body)
    with pytest.raises(DataError) as caught:
        read_examples(tmp_path / name)
    assert message in str(caught.value)


def test_a_missing_file_and_a_folder_that_is_no_run(tmp_path: Path) -> None:
    """78: the command line is to blame, not the data."""
    with pytest.raises(ConfigError, match="there is no such file; check --data_path"):
        read_examples(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"is a folder without run\.sqlite"):
        read_examples(tmp_path)
    (tmp_path / "run.sqlite").write_bytes(b"not a database, but long enough to look like one" * 9)
    with pytest.raises(DataError, match="is not a whole run store"):
        read_examples(tmp_path)
