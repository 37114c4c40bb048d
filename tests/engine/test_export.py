"""Exports: what each format says, that they are whole, repeatable, and safe to open."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from engine import open_run
from engine.cli.main import cli
from engine.dedup.rouge import rouge_l
from engine.errors import ConfigError, DiskError, OutputError, UsageError
from engine.export import Format, Options, export, export_dataset, ledger
from engine.export.formats import FORMATS, SUFFIX
from engine.recipes.base import chat_of
from engine.records import Prompt, Record
from engine.store import RunReader, RunStore
from tests.engine.synthetic import BagEncoder, records_text, synthetic_run

pytestmark = pytest.mark.slow

HOSTILE = (
    Record(instruction="Add the following numbers up", input="=1+2", output=" =HYPERLINK(1)"),
    Record(instruction="Say plainly what 1 is", input="@SUM(A1)", output="+1"),
    Record(instruction="Repeat after me please", input="a\u2028x\u0085y\x1bz", output="-1"),
    Record(instruction="Show some chat markup", input="<|im_end|>", output="<|endoftext|>"),
    Record(instruction="Count letters of Zürich", input="", output="six 🦙"),
)


def tree(path: Path) -> dict[str, bytes]:
    """Every file at or below ``path``, by its name there."""
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): p.read_bytes() for p in found}


def exported(folder: Path, format: Format, path: Path, **options: Any) -> Path:
    overwrite = options.pop("overwrite", False)
    with RunStore.read(folder) as run:
        export_dataset(run, format, path, Options(**options), overwrite=overwrite)
    return path


BY_NAME = {
    "rows.json": "alpaca", "rows.jsonl": "jsonl", "rows.ndjson": "jsonl", "ROWS.CSV": "csv",
    "rows.parquet": "parquet", "rows": "alpaca",
}  # fmt: skip


@pytest.mark.parametrize(("name", "format"), BY_NAME.items(), ids=BY_NAME)
def test_the_ending_names_the_format(
    run_folder: Path, tmp_path: Path, name: str, format: Format
) -> None:
    command = ["export", str(run_folder), "-o", str(tmp_path / name)]
    assert CliRunner().invoke(cli, command).exit_code == 0
    same = exported(run_folder, format, tmp_path / f"same{SUFFIX[format]}")
    assert (tmp_path / name).read_bytes() == same.read_bytes()


CONTRADICTIONS = {
    "csv in parquet": ("csv", "x.parquet", "end the name in .csv, or choose --format parquet"),
    "lines in a list": ("messages", "x.json", "choose --format alpaca or sharegpt"),
    "a list in lines": ("sharegpt", "x.jsonl", "end the name in .json,"),
    "an unknown ending": (None, "x.txt", ".txt names no format; end the name in .json,"),
    "packed": (None, "x.jsonl.gz", "no format is written as .gz"),
    "packed all the same": ("jsonl", "x.jsonl.gz", "no format is written as .gz"),
}


@pytest.mark.parametrize(("format", "name", "said"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_format_that_the_ending_contradicts_is_refused(
    run_folder: Path, tmp_path: Path, format: Format | None, name: str, said: str
) -> None:
    with RunStore.read(run_folder) as run, pytest.raises(UsageError, match=said):
        export_dataset(run, format, tmp_path / name, Options())
    assert not (tmp_path / name).exists()


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose texts are dangerous to open."""

    def answer(prompt: Prompt) -> str:
        first = len(prompt.demonstrations) + 1
        return records_text(HOSTILE, first) if prompt.index == 0 else ""

    folder = tmp_path_factory.mktemp("hostile") / "run"
    return synthetic_run(folder, len(HOSTILE), answer, vectors=False)


@pytest.mark.parametrize("format", [each for each in FORMATS if each != "preference"])
def test_the_same_run_gives_the_same_bytes(
    run_folder: Path, tmp_path: Path, format: Format
) -> None:
    """Whole, in shards and with a validation part alike."""
    layouts: dict[str, dict[str, Any]] = {
        "whole": {},
        "shards": {"shard_rows": 150},
        "split": {"shard_rows": 150, "validation": 0.1},
    }
    for name, options in layouts.items():
        one = exported(run_folder, format, tmp_path / f"{name}-1", **options)
        other = exported(run_folder, format, tmp_path / f"{name}-2", **options)
        assert tree(one) == tree(other)
        assert tree(one)


def test_alpaca_is_what_jdump_writes(run_folder: Path, tmp_path: Path) -> None:
    """Byte for byte ``json.dump(rows, indent=4)``, though no more than a row is in memory."""
    path = exported(run_folder, "alpaca", tmp_path / "a.json", with_similarity=True)
    rows = json.loads(path.read_text())
    assert path.read_text() == json.dumps(rows, indent=4)
    assert list(rows[0])[:3] == ["instruction", "input", "output"]
    assert rows[9]["avg_similarity_score"] > 0


def test_a_run_without_rows_exports_an_empty_list(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="max-requests"):
        synthetic_run(tmp_path / "run", 5, lambda prompt: "nothing", max_requests=3)
    for format in ("alpaca", "sharegpt"):
        assert json.loads(exported(tmp_path / "run", format, tmp_path / format).read_text()) == []
    assert exported(tmp_path / "run", "jsonl", tmp_path / "rows").read_bytes() == b""
    exported(tmp_path / "run", "datasets", tmp_path / "folder")


def test_every_row_says_where_it_comes_from(run_folder: Path, tmp_path: Path) -> None:
    """Request and piece, the model as it named itself, and the seed tasks it was shown."""
    path = exported(run_folder, "jsonl", tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 400
    assert {row["model"] for row in rows} == {"scripted"}
    assert all(len(row["demonstrations"]) == 3 for row in rows)
    assert rows[-1]["most_similar_instructions"][0].keys() == {"instruction", "score"}


def test_shards_hold_all_rows_in_order(run_folder: Path, tmp_path: Path) -> None:
    whole = exported(run_folder, "jsonl", tmp_path / "whole").read_bytes()
    shards = tree(exported(run_folder, "jsonl", tmp_path / "shards", shard_rows=150))
    assert list(shards) == [f"train-{i:05}-of-00003.jsonl" for i in range(3)]
    assert b"".join(shards.values()) == whole
    assert [s.count(b"\n") for s in shards.values()] == [150, 150, 100]


# -- the split ------------------------------------------------------------------------------------


def test_no_near_duplicate_straddles_the_split(run_folder: Path, tmp_path: Path) -> None:
    """Checked against every pair, by both measures; and no row is lost."""
    parts = tree(exported(run_folder, "jsonl", tmp_path / "split", validation=0.1))
    train, validation = (
        [
            json.loads(line)["instruction"]
            for line in parts[f"{name}-00000-of-00001.jsonl"].splitlines()
        ]
        for name in ("train", "validation")
    )
    assert len(train) + len(validation) == 400
    assert 20 <= len(validation) <= 40
    assert max(rouge_l(a, b) for a in train for b in validation) < 0.6
    encoder = BagEncoder()
    assert (encoder.encode(train) @ encoder.encode(validation).T).max() < 0.8


def test_a_crowd_of_near_duplicates_is_trained_on(tmp_path: Path) -> None:
    """Rows with more close neighbours than the store names do not leak into validation."""
    words = [f"w{i}" for i in range(400)]

    def answer(prompt: Prompt) -> str:
        draw = np.random.default_rng(prompt.index)
        crowd = prompt.index % 3 > 0
        own = list(draw.choice(words, 6 if crowd else 12, replace=False))
        stem = ["Tell", *"me of the long and winding road".split()] if crowd else ["Sing"]
        record = Record(instruction=" ".join([*stem, *own]), input="", output="Yes.")
        return records_text([record], len(prompt.demonstrations) + 1)

    folder = synthetic_run(tmp_path / "run", 120, answer, vectors=False)
    with RunStore.read(folder) as run:
        crowded = [d for d, _ in run.accepted() if min(d.most_similar.values()) >= 0.5]
        assert len(crowded) > 20
    parts = tree(exported(folder, "jsonl", tmp_path / "split", validation=0.2))
    train, validation = (
        [
            json.loads(line)["instruction"]
            for line in parts[f"{name}-00000-of-00001.jsonl"].splitlines()
        ]
        for name in ("train", "validation")
    )
    assert validation
    assert max(rouge_l(a, b) for a in train for b in validation) < 0.6


@pytest.mark.parametrize("share", [1.0, -0.5, 7])
def test_a_share_lies_between_zero_and_one(run_folder: Path, tmp_path: Path, share: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        exported(run_folder, "jsonl", tmp_path / "x", validation=share)
    assert not any(tmp_path.iterdir())


def test_one_row_at_least_is_held_out(run_folder: Path, tmp_path: Path) -> None:
    command = ["export", str(run_folder), "-o", str(tmp_path / "x"), "--validation", "0.001"]
    assert ", 1 of them validation" in CliRunner().invoke(cli, command).output


def answered(folder: Path, questions: Sequence[str], *more: str) -> Path:
    """A run of a recipe that compares nothing: a row for each question."""
    rows = folder / "questions.jsonl"
    rows.write_text("".join(json.dumps({"question": each}) + "\n" for each in questions))
    words = ["generate", "--recipe", "respond", "--rows", str(rows), "--backend", "scripted"]
    done = CliRunner().invoke(cli, [*words, "--out", str(folder / "run"), *more])
    assert done.exit_code == 0, done.output
    return folder / "run"


def test_rows_that_no_run_compared_are_split_by_what_they_ask(tmp_path: Path) -> None:
    """Their near-duplicates are looked for at the export, and the card claims no more than that."""
    rng, words = random.Random(1), [f"w{n}" for n in range(400)]
    distinct = [" ".join(rng.sample(words, 8)) for _ in range(60)]
    near = [f"{each} {n}" for n, each in enumerate(distinct[:15])]
    questions = [*distinct, *near, *distinct[15:25]]
    folder = answered(tmp_path, questions, "--samples", "2")
    path = exported(folder, "datasets", tmp_path / "split", validation=0.1)
    parts = {
        part: pq.read_table(next((path / "data").glob(f"{part}-*"))).to_pylist()
        for part in ("train", "validation")
    }
    train, validation = ({row["instruction"] for row in rows} for rows in parts.values())
    assert len(parts["train"]) + len(parts["validation"]) == 2 * len(questions)
    assert len(parts["validation"]) >= 4
    assert max(rouge_l(a, b) for a in train for b in validation) < 0.6
    card = (path / "README.md").read_text()
    assert "all rows of one input row are on the same side" in card
    assert "near-duplicates left out" not in card


def test_the_card_of_a_dataset_without_rows_names_its_file(tmp_path: Path) -> None:
    folder = answered(tmp_path, ["Why is the sky blue?"], "--target", "1")
    path = exported(folder, "datasets", tmp_path / "none", take=0)
    assert "path: data/train-*.parquet" in (path / "README.md").read_text()


def test_rows_that_all_resemble_each_other_cannot_be_split(tmp_path: Path) -> None:
    folder = answered(tmp_path, [f"What is said of the number {n}?" for n in range(30)])
    with pytest.raises(ConfigError, match="each resembles another one"):
        exported(folder, "jsonl", tmp_path / "split", validation=0.2)
    assert not (tmp_path / "split").exists()
    # F is 6/7 for any two, so they may straddle from a threshold above that on, and not at it.
    with pytest.raises(ConfigError, match="with a higher --validation-threshold"):
        exported(folder, "jsonl", tmp_path / "split", validation=0.2, validation_threshold=6 / 7)
    path = exported(folder, "datasets", tmp_path / "split", validation=0.2,
                    validation_threshold=0.86)  # fmt: skip
    assert "a near-duplicate (a ROUGE-L F of 0.86 or more)" in (path / "README.md").read_text()
    with pytest.raises(UsageError, match="goes with --validation"):
        exported(folder, "jsonl", tmp_path / "one.jsonl", validation_threshold=0.86)


@pytest.mark.parametrize("more", [("--take", "200"), ("--sort=-length(output)", "--top", "150")])
def test_the_rows_are_chosen_first_and_split_then(
    run_folder: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """What is said is what is written, and the share is that of the rows chosen."""
    command = ["export", str(run_folder), "-o", str(tmp_path / "x"), "--validation", "0.1", *more]
    done = CliRunner().invoke(cli, [*command, "--format", "jsonl"])
    assert done.exit_code == 0, done.exception
    files = (tmp_path / "x").iterdir()
    sizes = {path.name.split("-")[0]: path.read_bytes().count(b"\n") for path in files}
    count = int(more[-1])
    assert sizes["train"] + sizes["validation"] == count
    assert f"{count} records, {sizes['validation']} of them validation" in done.output
    assert count * 0.05 <= sizes["validation"] <= count * 0.1


# -- whole or not at all --------------------------------------------------------------------------


def test_fault_122_what_is_not_ours_is_not_replaced(run_folder: Path, tmp_path: Path) -> None:
    """Exit 73 for a foreign file and for an export that was edited; an untouched one is renewed."""
    path = tmp_path / "rows.jsonl"
    command = ["export", str(run_folder), "--format", "jsonl", "-o", str(path)]
    path.write_text("mine")
    refused = CliRunner().invoke(cli, command)
    assert isinstance(refused.exception, OutputError)
    assert refused.exception.exit_code == 73
    assert "--overwrite" in str(refused.exception)
    assert path.read_text() == "mine"
    assert CliRunner().invoke(cli, [*command, "--overwrite"]).exit_code == 0
    assert CliRunner().invoke(cli, command).exit_code == 0
    path.write_text(path.read_text() + "edited")
    edited = CliRunner().invoke(cli, command)
    assert isinstance(edited.exception, OutputError)
    assert "changed" in str(edited.exception)


@pytest.mark.parametrize("format", ["jsonl", "datasets"])
def test_fault_081_a_failed_write_leaves_the_old_dataset(
    run_folder: Path, tmp_path: Path, format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room when all is written and only the sync is left: the old one stands, no rest lies."""
    path = exported(run_folder, format, tmp_path / "data")
    before = tree(path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="No space left"):
        exported(run_folder, format, path)
    assert tree(path) == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_said(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be created"):
        exported(run_folder, "jsonl", tmp_path / "no" / "rows")
    with pytest.raises(OutputError, match="is a folder"):
        exported(run_folder, "jsonl", tmp_path)


def test_memory_does_not_grow_with_the_rows(run_folder: Path, tmp_path: Path) -> None:
    """An export of 400 rows needs no more than an interpreter with its imports: under 300 MB."""
    code = (
        "from engine.cli.main import cli\n"
        f"cli(['export', {str(run_folder)!r}, '--format', 'parquet', '--validation', '0.1', '-o',"
        f" {str(tmp_path / 'out')!r}], standalone_mode=False)\n"
        "print(*[line for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-2]) < 300_000  # KiB


# -- safe to open ---------------------------------------------------------------------------------


def test_security_34_no_csv_cell_is_a_formula(hostile_run: Path, tmp_path: Path) -> None:
    path = exported(hostile_run, "csv", tmp_path / "rows.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[1] == ["Add the following numbers up", "'=1+2", "'=HYPERLINK(1)"]
    assert all(not cell.startswith(tuple("=+-@\t\r")) for row in rows for cell in row)
    assert len(rows) == 1 + len(HOSTILE)


@pytest.mark.parametrize("format", ["jsonl", "messages"])
def test_security_35_json_lines_have_no_other_line_ends(
    hostile_run: Path, tmp_path: Path, format: Format
) -> None:
    """Whatever splits lines sees as many as there are rows, and no terminal code is raw."""
    raw = exported(hostile_run, format, tmp_path / "rows").read_bytes()
    assert len(raw.decode().splitlines()) == len(HOSTILE)
    assert b"\x1b" not in raw
    row = json.loads(raw.splitlines()[2])
    assert "a\u2028x\u0085y\x1bz" in (row.get("input") or row["messages"][0]["content"])


def test_security_36_special_tokens_stay_text(hostile_run: Path, tmp_path: Path) -> None:
    """They are exported as they are; the card says what the tokenizer must do."""
    rows = exported(hostile_run, "messages", tmp_path / "rows").read_text().splitlines()
    assert json.loads(rows[3])["messages"][1]["content"] == "<|endoftext|>"
    card = exported(hostile_run, "datasets", tmp_path / "d") / "README.md"
    assert "split special tokens" in card.read_text()


# -- readers --------------------------------------------------------------------------------------


def test_pandas_reads_what_it_can(run_folder: Path, tmp_path: Path) -> None:
    import pandas as pd

    readers: dict[Format, Callable[[Path], Any]] = {
        "alpaca": pd.read_json,
        "jsonl": lambda path: pd.read_json(path, lines=True, dtype=False),
        "messages": lambda path: pd.read_json(path, lines=True),
        "csv": pd.read_csv,
        "parquet": pd.read_parquet,
    }
    frames = {f: read(exported(run_folder, f, tmp_path / f)) for f, read in readers.items()}
    assert {len(frame) for frame in frames.values()} == {400}
    with open_run(run_folder) as run:
        expected = [record["instruction"] for record in run]
    for format in ("alpaca", "jsonl", "csv", "parquet"):
        assert list(frames[format]["instruction"]) == expected


def test_datasets_loads_the_folder(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    folder = exported(run_folder, "datasets", tmp_path / "d", validation=0.1, shard_rows=200)
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "validation"}
    assert loaded["train"].num_rows + loaded["validation"].num_rows == 400
    assert "licen" in (folder / "README.md").read_text().lower()
    (tmp_path / "other").mkdir()  # the library tells folders by their last name
    again = exported(run_folder, "datasets", tmp_path / "other" / "d", take=7)
    loaded = datasets.load_dataset(str(again), cache_dir=str(tmp_path / "cache"))
    assert {part: rows.num_rows for part, rows in loaded.items()} == {"train": 7}


@pytest.mark.parametrize("format", ["alpaca", "jsonl", "messages", "sharegpt", "parquet"])
def test_our_trainer_reads_it(run_folder: Path, tmp_path: Path, format: Format) -> None:
    """Every format but the spreadsheet's: all rows, the same instructions and outputs."""
    from trainer.records import Conversation, Instruction, read_examples

    path = exported(run_folder, format, tmp_path / f"rows{SUFFIX[format]}")
    examples = read_examples(path)
    with open_run(run_folder) as run:
        records = list(run)
    assert len(examples) == len(records)
    for example, record in zip(examples, records, strict=True):
        if isinstance(example, Conversation):
            said = [message.content for message in example.messages]
            assert said == [turn["content"] for turn in chat_of(record) or ()]
        else:
            assert isinstance(example, Instruction)
            assert (example.instruction, example.input) == (record["instruction"], record["input"])
            assert example.output == record["output"]


@pytest.mark.slow
def test_trl_takes_messages(run_folder: Path, tmp_path: Path) -> None:
    """Conversational by TRL's own check, in the shape that its SFTTrainer applies a template to."""
    from trl import data_utils

    path = exported(run_folder, "messages", tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert all(data_utils.is_conversational(row) for row in rows)
    assert {tuple(m["role"] for m in row["messages"]) for row in rows} == {("user", "assistant")}


# -- Python ---------------------------------------------------------------------------------------


def test_open_run_iterates_records(run_folder: Path, tmp_path: Path) -> None:
    with open_run(run_folder) as run:
        records = list(run)
        assert len(run) == len(records) == 400
        assert sum(1 for d in run.decisions(accepted=False)) == sum(run.counts.reasons.values())
        assert run.settings.fixed["model"] == "scripted"
    with RunStore.read(run_folder) as store:
        assert export(store, "messages", tmp_path / "rows") == 400
    asked = json.loads((tmp_path / "rows").read_text().splitlines()[0])["messages"][0]["content"]
    assert asked.startswith(records[0]["instruction"])


@pytest.mark.parametrize("name", ["run.sqlite", "run.lock", "seed_tasks.jsonl", "link", "hard"])
def test_no_export_or_report_takes_the_place_of_the_run(
    run_folder: Path, tmp_path: Path, name: str
) -> None:
    """Whatever is asked, and by whatever name; nor does a folder that holds the run."""
    run = tmp_path / "runs" / "run"
    shutil.copytree(run_folder, run)
    (run / "link").symlink_to("run.sqlite")
    (run / "hard").hardlink_to(run / "run.sqlite")
    before = (run / "run.sqlite").read_bytes()
    for argv in (
        ["export", str(run), "-o", str(run / name), "--overwrite"],
        ["report", str(run), "-o", str(run / name), "--overwrite"],
        ["export", str(run), "--format", "datasets", "-o", str(run), "--overwrite"],
        ["export", str(run), "--format", "datasets", "-o", str(run.parent), "--overwrite"],
    ):
        done = CliRunner().invoke(cli, argv)
        assert isinstance(done.exception, OutputError)
        assert "is read by this command" in str(done.exception)
    assert (run / "run.sqlite").read_bytes() == before


def test_a_run_that_ends_replaces_no_dataset_that_somebody_changed(
    run_folder: Path, tmp_path: Path
) -> None:
    """Neither one that was there, nor an export that was edited; an untouched one is renewed, also
    where the crash came before it was noted.
    """
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    dataset = run / "alpaca_data.json"
    with RunReader(run) as reader:
        dataset.write_text("precious")
        with pytest.raises(OutputError, match="did not export it"):
            export(reader, "alpaca", dataset)
        assert dataset.read_text() == "precious"
        dataset.unlink()
        export(reader, "alpaca", dataset)
        whole = dataset.read_bytes()
        dataset.write_bytes(whole + b" ")
        with pytest.raises(OutputError, match="was changed since"):
            export(reader, "alpaca", dataset)
        dataset.unlink()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ledger, "remember", lambda *_: None)
            export(reader, "jsonl", run / "rows.jsonl")
        export(reader, "jsonl", run / "rows.jsonl")
        dataset.symlink_to(run / "rows.jsonl")
        with pytest.raises(OutputError, match="did not export it"):
            export(reader, "alpaca", dataset)
        dataset.unlink()
        first = whole[: whole.index(b"\n    },\n") + len(b"\n    }")] + b"\n]"
        for earlier in (b"[]", first, whole):  # what an older Woolmill wrote without a note
            dataset.write_bytes(earlier)
            (run / "exports.json").unlink(missing_ok=True)
            export(reader, "alpaca", dataset)
            assert dataset.read_bytes() == whole
        for other in (first[:-3] + b"x\n]", whole[:-2], b"[", b""):
            dataset.write_bytes(other)
            (run / "exports.json").unlink(missing_ok=True)
            with pytest.raises(OutputError):
                export(reader, "alpaca", dataset)


def test_a_split_leaves_something_for_both_parts(run_folder: Path, tmp_path: Path) -> None:
    """Where all rows, or none, are those that are held out of the run, the export says which."""
    with pytest.raises(ConfigError, match="there is no row to hold out"):
        exported(run_folder, "jsonl", tmp_path / "x", validation=0.5, take=0)
    with pytest.raises(ConfigError, match=r"all of these 1 row would be held out, and none left"):
        exported(run_folder, "jsonl", tmp_path / "x", validation=0.5, take=1)
    done = CliRunner().invoke(cli, ["export", str(run_folder), "-o", "x", "--validation", "0"])
    assert done.exit_code == 2
    assert not (tmp_path / "x").exists()


def test_an_export_goes_through_a_pipe(run_folder: Path, tmp_path: Path) -> None:
    """Nothing is read from it, and no note says that it holds an export."""
    place, whole = tmp_path / "fifo", tmp_path / "rows.jsonl"
    os.mkfifo(place)
    command = [sys.executable, "-m", "engine", "export", str(run_folder), "--format", "jsonl"]
    with subprocess.Popen(
        [*command, "-o", str(place)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        came = place.read_bytes()
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, b"")
    assert b"400 records" in err
    exported(run_folder, "jsonl", whole)
    assert came == whole.read_bytes()


def test_a_pipe_in_the_place_of_the_run_s_own_dataset_holds_nothing_up(
    run_folder: Path, tmp_path: Path
) -> None:
    """A folder from somebody else may have one: nobody would ever read from it."""
    os.mkfifo(tmp_path / "dataset.jsonl")
    with (
        RunStore.read(run_folder) as run,
        pytest.raises(OutputError, match="is no file; move it away"),
    ):
        export(run, "jsonl", tmp_path / "dataset.jsonl")
