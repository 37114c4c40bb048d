"""``woolmill dedup``: datasets in, datasets and decisions out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from engine import datasets
from engine.dedup import cascade
from engine.dedup import command as tool
from engine.errors import InputError, OutputError, UsageError
from tests.engine.dedup.tool import ROWS, dataset, dedup, lines

__all__ = ["dataset"]  # a fixture

pytestmark = pytest.mark.slow


def test_who_waits_hears_how_far_it_is(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "TOLD_EVERY_S", 0.0)
    result = dedup(dataset, "-o", tmp_path / "out.jsonl")
    assert result.stderr.splitlines()[-1] == "woolmill: 5 rows, 3 accepted"
    assert "woolmill:" not in result.stdout


def test_decisions_and_accepted_rows(dataset: Path, tmp_path: Path) -> None:
    """One decision a line, in the order of the file; accepted rows with all their fields."""
    result = dedup(dataset, "-o", tmp_path / "out.jsonl", "--decisions", tmp_path / "why.jsonl")
    assert result.exit_code == 0, result.output
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == ["1", str(2**70), "None"]
    decisions = lines(tmp_path / "why.jsonl")
    assert [" ".join(decision) for decision in decisions] == [
        "index file line id text accepted reason nearest_index nearest_file nearest_line"
        " nearest_id nearest_text score nearest_cosine"
    ] * 5
    assert decisions[1] == {
        "index": 1,
        "file": str(dataset),
        "line": 2,
        "id": str(ROWS[1]["id"]),
        "text": "name three primary colours\nx",
        "accepted": False,
        "reason": "duplicate_rouge",
        "nearest_index": 0,
        "nearest_file": str(dataset),
        "nearest_line": 1,
        "nearest_id": str(ROWS[0]["id"]),
        "nearest_text": "Name three primary colours.",
        "score": pytest.approx(8 / 9),
        "nearest_cosine": None,
    }
    assert [d["reason"] for d in decisions] == [
        None,
        "duplicate_rouge",
        "duplicate_exact",
        None,
        None,
    ]
    assert "5 rows, 3 accepted" in result.output


def test_where_the_nearest_are_not_looked_for_any_more_it_is_said(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cascade, "COMPARED_WITH_ALL", 2)
    result = dedup(dataset, "--decisions", tmp_path / "why.jsonl")
    assert "the nearest by ROUGE-L is not looked for where they are accepted" in result.output
    assert [row["accepted"] for row in lines(tmp_path / "why.jsonl")].count(True) == 3
    monkeypatch.undo()
    assert "not looked for" not in dedup(dataset, "--decisions", tmp_path / "2.jsonl").output


def test_against_files_are_compared_with_and_never_written(dataset: Path, tmp_path: Path) -> None:
    """The decision names the file and the line instead of a row of ours."""
    for name, text in (("a.jsonl", "unrelated"), ("b.jsonl", "Name three primary colours!")):
        (tmp_path / name).write_bytes(b"\n" + orjson.dumps({"instruction": text}))
    against = [f"--against={tmp_path / name}" for name in ("a.jsonl", "b.jsonl")]
    said = dedup(
        dataset, "-o", tmp_path / "o.json", "--decisions", tmp_path / "why.jsonl", *against
    ).output
    assert "--against compares whole texts: a question inside a longer row" in said
    first = lines(tmp_path / "why.jsonl")[0]
    assert first["reason"] == "duplicate_rouge"
    assert first["nearest_index"] is None
    assert (first["nearest_file"], first["nearest_line"]) == (str(tmp_path / "b.jsonl"), 2)
    kept = orjson.loads((tmp_path / "o.json").read_bytes())
    assert [row["instruction"] for row in kept] == ["写一首诗", "写一首歌"]


def test_rows_with_a_run_of_words_of_a_benchmark_are_left_out(tmp_path: Path) -> None:
    path, out, why = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "why.jsonl"
    question = "How many apples does Ann have if she buys six and eats two?"
    turns = [("user", "Hello!"), ("assistant", "Hi."), ("user", f"Now tell me: {question}")]
    rows: list[list[dict[str, Any]]] = [
        [{"role": role, "content": content} for role, content in turns],
        [{"role": "user", "content": "Hello!"}],
        [{"role": "user", "content": [{"type": "text", "text": f"{question} Think first."}]}],
        [{"role": "user", "content": "How many apples does Bob have?"}],
        [{"role": "system", "content": question}],
    ]
    path.write_bytes(b"\n".join(orjson.dumps({"messages": row}) for row in rows))
    bench = tmp_path / "bench.csv"
    bench.write_text(f"question,answer\nWhat is it?,7\n{question},4\n")
    words = (path, "-o", out, "--decisions", why, "--against", bench)
    said = dedup(*words).output
    assert rows[0] in [row["messages"] for row in lines(out)]
    assert "--against-words 13 does" in said
    said = dedup(*words, "--against-words", 8, "--overwrite").output
    assert [row["messages"] for row in lines(out)] == [rows[1], rows[3]]
    assert "5 rows, 2 accepted\n        3  shared_words\n" in said
    assert f"        3  of these for a row of {bench}\n" in said
    assert "        1  of the rows of --against have fewer than 8 words: compared as" in said
    assert "is not looked for" not in said
    assert "nothing stands" not in said
    told = lines(why)
    assert [decision["reason"] for decision in told] == [
        "shared_words", None, "shared_words", None, "shared_words"
    ]  # fmt: skip
    assert (
        told[0]
        | {
            "nearest_file": str(bench),
            "nearest_line": 3,
            "nearest_text": question,
            "shared": "how many apples does ann have if she",
            "compared": False,
        }
        == told[0]
    )
    with pytest.raises(InputError, match=r"no row there has 20 words; give --against-words a low"):
        dedup(*words, "--against-words", 20, "--overwrite")
    with pytest.raises(UsageError, match="name these by --against"):
        dedup(path, "-o", out, "--against-words", 8, "--overwrite")


EMPTY = [
    {"instruction": value, "input": f"text {i}"} for i, value in enumerate([None, "", " ", "\n\t"])
]


NO_TURN = [
    {"messages": turns, "id": i}
    for i, turns in enumerate(
        [[], [{"role": "system", "content": "s"}], [{"role": "user", "content": None}]]
    )
]


@pytest.mark.parametrize("rows", [EMPTY, NO_TURN])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_rows_with_nothing_to_compare_are_kept_and_counted(
    rows: list[dict[str, Any]], name: str, tmp_path: Path
) -> None:
    """They are different rows: none is a copy of another, whatever else stands in them."""
    path = tmp_path / name
    with datasets.writer(path) as write:
        for row in rows:
            write(datasets.Row(path, 1, row))
    output, why = tmp_path / f"out-{name}", tmp_path / "why.jsonl"
    summary = dedup(path, "-o", output, "--decisions", why).output
    assert [row.values for row in datasets.read_rows(output)] == rows
    assert f"{len(rows)} rows, {len(rows)} accepted" in summary
    assert f"{len(rows)}  kept without a comparison" in summary
    assert "; --on-empty drop leaves them out\n" in summary
    assert all(d["accepted"] and d["compared"] is False for d in lines(why))


def test_of_chats_the_users_first_turn_is_compared_and_it_is_said(tmp_path: Path) -> None:
    """So a question inside a longer prompt, or in a later turn, is not found, as the help says."""
    question = {"role": "user", "content": "At how many degrees does water boil on Mount Everest?"}
    longer = "Read with care, think about it, and then answer for a class of young children: "
    chats: list[list[dict[str, str]]] = [
        [
            {"role": "system", "content": "Be brief."},
            question,
            {"role": "assistant", "content": ""},
        ],
        [{"role": "user", "content": longer + question["content"]}],
        [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "?"}, question],
    ]
    rows = [{"messages": chat, "id": i} for i, chat in enumerate(chats)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    (tmp_path / "bench.jsonl").write_bytes(orjson.dumps({"question": question["content"]}))
    against = ("--against", tmp_path / "bench.jsonl")
    said = dedup(tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *against).output
    assert lines(tmp_path / "out.jsonl") == rows[1:]
    assert "compared by messages (of a chat the user's first turn); name other fields" in said
    assert "bench.jsonl by question\n" in said
    (tmp_path / "chats.jsonl").write_bytes(orjson.dumps({"messages": chats[0]}))
    against = ("--against", tmp_path / "chats.jsonl")
    said = dedup(tmp_path / "bench.jsonl", "-o", tmp_path / "o.jsonl", *against).output
    assert lines(tmp_path / "o.jsonl") == []
    assert "chats.jsonl by messages (of a chat the user's first turn)\n" in said


def test_ids_that_come_again_are_told_with_their_lines(tmp_path: Path) -> None:
    """Those that differ by case or type are others; none at all is no id."""
    ids = ["a", "A", 1, "1", None, None, "", "", "b", "a", "\u001b" * 9 + "x" * 99, "a"]
    rows = [{"instruction": f"w{i} v{i}", "id": value} for i, value in enumerate(ids)]
    content = b"\n".join(map(orjson.dumps, [*rows, {"instruction": "none"}, {"instruction": "no"}]))
    (tmp_path / "in.jsonl").write_bytes(b"\n" + content)
    said = dedup(tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl").output
    line = '        2  with the id of an earlier row, as "a" on lines 2 and 11; tell them apart by'
    assert line in said
    (tmp_path / "two").mkdir()
    for name in ("1.jsonl", "2.jsonl"):
        (tmp_path / "two" / name).write_bytes(content.splitlines()[0])
    why = tmp_path / "why.jsonl"
    said = dedup(tmp_path / "two", "-o", tmp_path / "both.jsonl", "--decisions", why).output
    one, two = (str(tmp_path / "two" / name) for name in ("1.jsonl", "2.jsonl"))
    named = [(d["file"], d["line"], d["nearest_file"], d["nearest_line"]) for d in lines(why)]
    assert named == [(one, 1, None, None), (two, 1, one, 1)]
    assert '1  with the id of an earlier row, as "a" on rows 1 and 2; tell them apart by' in said
    (tmp_path / "in.json").write_text("[\n\n" + content.decode().replace("\n", ",") + "]")
    said = dedup(tmp_path / "in.json", "-o", tmp_path / "out.json").output
    assert 'earlier row, as "a" on rows 1 and 10; tell them apart by their row, or ' in said
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(content.splitlines()[:9]))
    said = dedup(tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--overwrite").output
    assert "earlier row" not in said


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv"])
def test_rows_with_nothing_to_compare_are_left_out_where_asked(name: str, tmp_path: Path) -> None:
    path, out, why = tmp_path / name, tmp_path / "out.jsonl", tmp_path / "why.jsonl"
    with datasets.writer(path) as write:
        for i, text in enumerate(["Sing.", "", " ", "Eat."]):
            write(datasets.Row(path, 1, {"instruction": text, "id": f"r{i}"}))
    summary = dedup(path, "-o", out, "--decisions", why, "--on-empty", "drop").output
    assert [row["id"] for row in lines(out)] == ["r0", "r3"]
    assert "4 rows, 2 accepted\n        2  empty: nothing stands in instruction" in summary
    assert "kept without" not in summary
    told = [(d["id"], d["accepted"], d["reason"], d.get("compared", True)) for d in lines(why)]
    empty = [("r1", False, "empty", False), ("r2", False, "empty", False)]
    assert told == [("r0", True, None, True), *empty, ("r3", True, None, True)]


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv"])
def test_a_row_without_what_is_required_keeps_none_out(name: str, tmp_path: Path) -> None:
    path, out, why = tmp_path / name, tmp_path / "out.jsonl", tmp_path / "why.jsonl"
    rows = [("Sing a song.", " "), ("Sing a song.", "La."), ("Sing a song.", "Lo."), ("", "")]
    with datasets.writer(path) as write:
        for number, (instruction, output) in enumerate(rows):
            values = {"instruction": instruction, "output": output, "id": f"r{number}"}
            write(datasets.Row(path, 1, values))
    words = (path, "-o", out, "--decisions", why, "--field", "instruction")
    summary = dedup(*words, "--require", "output").output
    assert [row["id"] for row in lines(out)] == ["r1"]
    assert "4 rows, 1 accepted\n        2  empty:output\n        1  duplicate_" in summary
    told = [(d["id"], d["reason"], d.get("compared", True), d["nearest_id"]) for d in lines(why)]
    assert told == [
        ("r0", "empty:output", False, None),
        ("r1", None, True, None),
        ("r2", told[2][1], True, "r1"),
        ("r3", "empty:output", False, None),
    ]
    before = out.read_bytes()
    with pytest.raises(InputError, match=r"no row has the field 'outptu' .* has instruction, out"):
        dedup(*words, "--require", "outptu", "--overwrite")
    assert out.read_bytes() == before


def test_rows_with_the_id_of_an_earlier_one_are_left_out_where_asked(tmp_path: Path) -> None:
    """But for those that are left out for other reasons before."""
    path, out, why = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "why.jsonl"
    texts = "Sing a song.", "Name a colour.", "Why is the sky blue?", "Count to ten.", "Hop!", "Hi"
    outputs, ids = ("", "a", "b", "c", "d", "e"), (7, 7, 7, "7", None, None)
    rows = [
        {"instruction": text, "output": output, "id": number}
        for text, output, number in zip(texts, outputs, ids, strict=True)
    ]
    path.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    words = (path, "-o", out, "--decisions", why, "--require", "output")
    said = dedup(*words).output
    assert "        1  with the id of an earlier row, as 7 on lines 2 and 3; tell them" in said
    assert "apart by their line, or leave them out: --unique-id id\n" in said
    said = dedup(*words, "--unique-id", "id", "--overwrite").output
    assert lines(out) == [rows[1], *rows[3:]]
    assert "6 rows, 4 accepted\n        1  empty:output\n        1  duplicate:id\ncompared" in said
    told = lines(why)[2]
    assert (told["reason"], told["nearest_index"], told["nearest_line"]) == ("duplicate:id", 1, 2)
    assert (told["nearest_id"], told["nearest_text"], told["compared"]) == (7, None, False)
    with pytest.raises(InputError, match=r"no row has the field 'name' of --unique-id; the last"):
        dedup(*words, "--unique-id", "name", "--overwrite")


def test_a_set_to_stay_clear_of_may_have_other_columns(tmp_path: Path) -> None:
    """Each is compared by what it has; one with nothing to compare is refused, not ignored."""
    (tmp_path / "in.csv").write_text("prompt,n\nName three primary colours.,1\nSing a song,2\n")
    (tmp_path / "bench.jsonl").write_text(
        '{"question": "name three PRIMARY colours!"}\n{"question": null}\n{"question": ""}'
    )
    summary = dedup(
        tmp_path / "in.csv", "-o", tmp_path / "out.csv", "--against", tmp_path / "bench.jsonl"
    ).output
    assert (tmp_path / "out.csv").read_text() == "prompt,n\nSing a song,2\n"
    assert "compared by prompt" in summary
    assert "bench.jsonl by question" in summary
    (tmp_path / "bench.jsonl").write_text('{"question": null}')
    with pytest.raises(InputError, match="holds nothing to compare with"):
        dedup(tmp_path / "in.csv", "-o", tmp_path / "o.csv", "--against", tmp_path / "bench.jsonl")


def test_fields_are_compared_together(tmp_path: Path) -> None:
    """Several ``--field``: rows of one instruction with other inputs are not duplicates."""
    rows = [{"q": "Translate this", "a": f"text{i} " * 5} for i in range(3)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    dedup(tmp_path / "in.jsonl", "-o", tmp_path / "one.jsonl", "--field", "q")
    dedup(tmp_path / "in.jsonl", "-o", tmp_path / "two.jsonl", "--field", "q", "--field", "a")
    assert len(lines(tmp_path / "one.jsonl")) == 1
    assert lines(tmp_path / "two.jsonl") == rows


def test_a_field_that_no_row_has_is_an_error_that_names_those_there_are(tmp_path: Path) -> None:
    """Also where bad rows are left out: a dataset of none would look like a success."""
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"instruction": "Sing.", "id": 1}\n' * 12)
    with pytest.raises(InputError, match=r"no field 'txt'; there are: 'instruction', 'id'; see"):
        dedup(path, "-o", out, "--field", "txt")
    with pytest.raises(InputError, match=r"none of its 12 rows can be compared.*check.* --field"):
        dedup(path, "-o", out, "--field", "txt", "--on-bad-row", "skip")
    assert sorted(tmp_path.iterdir()) == [path]


def test_language_is_that_of_rows_all_over_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rows may be of another."""
    monkeypatch.setattr(tool, "LOOKED_AT", 50)
    texts = ["Name a colour."] * 60 + ["说出一种颜色。"] * 600
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(orjson.dumps({"instruction": text}) for text in texts))
    assert tool.language_of_rows(datasets.Dataset(path), (), print) == "zh"


def test_what_an_instruction_is_about_counts_where_rows_say_it(tmp_path: Path) -> None:
    """Alpaca's rows give the same instruction about other things; some have no input at all."""
    rows = [
        {"instruction": "Translate the sentence."},
        {"instruction": "Translate the sentence.", "input": "Auf Wiedersehen bis morgen"},
        {"instruction": "Translate the sentence.", "input": "Guten Tag"},
        {"instruction": "Translate the sentence.", "input": "Guten Tag"},
        {"instruction": "Translate the sentence.", "input": None},
    ]
    lines_in = [*map(orjson.dumps, rows), b'{"instruction": "Name a colour.", "input": NaN}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines_in))
    out = tmp_path / "out.jsonl"
    said = dedup(tmp_path / "in.jsonl", "-o", out, "--rouge-threshold", "0.8").output
    assert out.read_bytes().splitlines() == [*lines_in[:3], lines_in[-1]]
    assert "compared by instruction, with its input where there is one; name other" in said


def test_other_failures_are_one_line_too(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "no.parquet").write_bytes(b"PAR1 no such thing")
    (tmp_path / "no.json").write_bytes(b'{"a": [], "b": []}')
    for path, error in [
        (tmp_path / "missing.jsonl", InputError),
        (tmp_path / "no.parquet", InputError),
        (tmp_path / "no.json", InputError),
        (tmp_path / "in.txt", InputError),
    ]:
        with pytest.raises(error, match=path.name):
            dedup(path, "-o", tmp_path / "out.jsonl")
    (tmp_path / "in.txt").write_text("Once upon a time")
    with pytest.raises(UsageError, match="nothing to write"):
        dedup(dataset)
    with pytest.raises(OutputError):
        dedup(dataset, "-o", tmp_path / "missing" / "out.jsonl")


def test_borderline_band_counts_both_sides(tmp_path: Path) -> None:
    """How many decisions another threshold would turn, with the closest examples."""
    texts = ["a b c d e f g h i j", "a b c d e f g x y z", "a b c d e f g h u v w x", "one two"]
    (tmp_path / "in.jsonl").write_bytes(
        b"\n".join(orjson.dumps({"instruction": text}) for text in texts)
    )
    summary = dedup(tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl").output
    assert "at ROUGE-L 0.65 instead of 0.70, 1 more refused" in summary
    assert "at ROUGE-L 0.75 instead of 0.70, 1 more accepted" in summary
    assert "0.727" in summary
    narrow = dedup(tmp_path / "in.jsonl", "-o", tmp_path / "new.jsonl", "--borderline", "0.01")
    assert "at ROUGE-L 0.69 instead of 0.70, 1 more refused" in narrow.output
    assert "more accepted" not in narrow.output
    (tmp_path / "in.jsonl").write_bytes(
        b"\n".join(orjson.dumps({"instruction": text}) for text in [*texts, texts[2], texts[2]])
    )
    again = dedup(tmp_path / "in.jsonl", "-o", tmp_path / "again.jsonl", "--borderline", "0.05")
    assert again.output.count(texts[2]) == 1, "one example of the same two texts"


def test_explain_shows_pairs_by_score(dataset: Path) -> None:
    """Each band says how many rows have their nearest there, and shows some."""
    output = dedup(dataset, "--explain").output
    assert "ROUGE-L" in output
    assert "1.00: 1 rows" in output
    assert "Name three primary  COLOURS." in output


def test_explain_says_which_rows_it_does_not_show(tmp_path: Path) -> None:
    """Long ones have no nearest by ROUGE-L."""
    text = " ".join(f"w{i}" for i in range(3_000))
    (tmp_path / "in.jsonl").write_text(
        "\n".join(orjson.dumps({"text": f"{text} {i}"}).decode() for i in range(2))
    )
    assert "2 rows of more than 2,048 tokens" in dedup(tmp_path / "in.jsonl", "--explain").output


@pytest.mark.parametrize(
    "options",
    [("--rouge-threshold", "nan"), ("--semantic-threshold", "nan"), ("--borderline", "NaN")],
)
def test_what_is_no_number_is_no_threshold(options: tuple[str, str], dataset: Path) -> None:
    done = dedup(dataset, "--explain", *options)
    assert done.exit_code == 2
    assert "is no number" in done.output
