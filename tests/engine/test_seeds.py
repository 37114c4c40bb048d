"""Seed files: what is read, and what is refused where."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from engine.errors import ConfigError, InputError
from engine.recipes.seeds import (
    BUNDLED,
    KEPT,
    bundled_seeds,
    fingerprint,
    keep,
    kept_seeds,
    read_seeds,
)

TASK = {
    "id": "one",
    "name": "n",
    "instruction": "Say something kind.",
    "instances": [{"input": "", "output": "You did well."}],
    "is_classification": False,
}


def line(**changes: object) -> str:
    return json.dumps({**TASK, **changes})


def written(folder: Path, *lines: str, encoding: str = "utf-8", end: str = "\n") -> Path:
    path = folder / "seeds.jsonl"
    path.write_bytes(end.join([*lines, ""]).encode(encoding))
    return path


@pytest.mark.parametrize("language", BUNDLED)
def test_bundled_seeds_are_read(language: str) -> None:
    assert len(read_seeds(bundled_seeds(language))) >= 175


def test_a_language_without_seed_tasks_needs_some() -> None:
    with pytest.raises(ConfigError, match=r"no seed tasks in Thai .* name your own with --seeds"):
        bundled_seeds("th")


TASKS = [{**TASK, "id": f"id {i}", "instruction": f"Say {i} kind things."} for i in range(3)]
LAYOUTS = {
    "list": json.dumps(TASKS).encode(),
    "indented_list": json.dumps(TASKS, indent=2).encode(),
    "indented_objects": "\n".join(json.dumps(task, indent=2) for task in TASKS).encode(),
    "wrapped": json.dumps({"tasks": TASKS}).encode(),
    "utf16": "\n".join(map(json.dumps, TASKS)).encode("utf-16"),
    "gzip": gzip.compress("\n".join(map(json.dumps, TASKS)).encode()),
}


@pytest.mark.parametrize("data", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_seeds_are_read_in_any_layout(data: bytes, tmp_path: Path) -> None:
    """A person who has a list, or indented it, need not convert it first."""
    (tmp_path / "seeds").write_bytes(data)
    plain = read_seeds(written(tmp_path, *map(json.dumps, TASKS)))
    assert read_seeds(tmp_path / "seeds") == plain


@pytest.mark.parametrize(
    ("encoding", "end"),
    [("utf-8-sig", "\n"), ("utf-8", "\r\n"), ("utf-8", "\n\n")],
    ids=["byte_order_mark", "crlf", "blank_lines"],
)
def test_harmless_layout_changes_nothing(tmp_path: Path, encoding: str, end: str) -> None:
    plain = read_seeds(written(tmp_path, line(), line(id="two")))
    other = read_seeds(written(tmp_path, line(), line(id="two"), encoding=encoding, end=end))
    assert other == plain
    assert fingerprint(other) == fingerprint(plain)


def test_alpaca_records_are_seeds_too(tmp_path: Path) -> None:
    path = written(tmp_path, '{"instruction": "Add the numbers.", "input": "1 2", "output": "3"}')
    (task,) = read_seeds(path)
    assert (task.id, task.input, task.output) == ("line_1", "1 2", "3")


def test_fingerprint_follows_the_text() -> None:
    tasks = read_seeds(bundled_seeds())
    assert fingerprint(tasks) != fingerprint(tasks[:-1])


BAD = [
    ("{", "column 2"),
    ("[]", "2: the row is not an object"),
    (json.dumps({**TASK, "id": "x", "name": "\ud83d"}), "half a surrogate pair"),
    (line(id="one"), "line 1"),
    (
        json.dumps({k: v for k, v in TASK.items() if k != "instruction"} | {"id": "x"}),
        "instruction",
    ),
    (line(id="x", instruction="  "), "empty"),
    (line(id="x", instruction=3), "int"),
    (line(id="x", instances=[]), "instances"),
    (line(id="x", instances=[{"input": ""}]), "output"),
    (line(id=True), "id"),
    ("\udcff", "2: is not UTF-8"),
]


@pytest.mark.parametrize(("bad", "said"), BAD, ids=[f"fault_116_{said}" for _, said in BAD])
def test_a_bad_line_is_named_by_path_and_line(tmp_path: Path, bad: str, said: str) -> None:
    path = tmp_path / "seeds.jsonl"
    path.write_bytes(f"{line()}\n{bad}\n".encode(errors="surrogateescape"))
    with pytest.raises(InputError) as caught:
        read_seeds(path)
    assert str(caught.value).startswith(f"{path}:2")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_seed_file_is_refused(tmp_path: Path) -> None:
    """fault_116: directory, FIFO, missing, empty, compressed and unreadable files."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    packed = tmp_path / "packed"
    packed.write_bytes(b"\x1f\x8b\x08rest")
    for path in (tmp_path, fifo, tmp_path / "none", written(tmp_path), packed):
        with pytest.raises(InputError, match=str(path)):
            read_seeds(path)


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path) -> None:
    """fault_116: a 1 GB line is refused after 256 MiB, and a text of more than 4 MiB."""
    path = tmp_path / "long"
    with path.open("wb") as file:
        file.write(b'{"id": "')
        file.truncate(2**30)
    with pytest.raises(InputError, match="longer than 256 MiB"):
        read_seeds(path)
    with pytest.raises(InputError, match="'instruction' is longer than 4 MiB"):
        read_seeds(written(tmp_path, line(instruction="a" * (4 * 2**20 + 1))))


def test_too_few_tasks_for_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 3"):
        read_seeds(written(tmp_path, line()), at_least=3)


def test_what_a_run_keeps_are_the_same_tasks(tmp_path: Path) -> None:
    tasks = read_seeds(bundled_seeds())
    keep(tasks, tmp_path)
    path = tmp_path / KEPT
    assert read_seeds(path) == tasks
    written = path.stat().st_mtime_ns
    keep(tasks, tmp_path)
    assert path.stat().st_mtime_ns == written
    path.write_bytes(path.read_bytes()[:100])
    keep(tasks, tmp_path)
    assert read_seeds(path) == tasks
    assert sorted(each.name for each in tmp_path.iterdir()) == [KEPT]


@pytest.mark.parametrize("plant", ["link", "hard_link", "dangling", "fifo", "folder"])
def test_what_is_planted_in_the_kept_tasks_place_is_never_written_through(
    plant: str, tmp_path: Path
) -> None:
    """A run's folder from somebody else: a link there could lead to any file of the person's."""
    precious, run = tmp_path / "precious", tmp_path / "run"
    precious.write_text("precious")
    run.mkdir()
    path = run / KEPT
    if plant == "link":
        path.symlink_to(precious)
    elif plant == "hard_link":
        path.hardlink_to(precious)
    elif plant == "dangling":
        path.symlink_to(tmp_path / "new")
    elif plant == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    tasks = read_seeds(bundled_seeds())
    keep(tasks, run)
    assert precious.read_text() == "precious"
    assert not (tmp_path / "new").exists()
    assert plant == "folder" or read_seeds(path) == tasks
    assert not path.is_symlink()


def test_a_runs_tasks_are_those_given_or_kept_or_bundled(tmp_path: Path) -> None:
    """Whichever have the fingerprint; a file that was named must be readable."""
    own = read_seeds(written(tmp_path, line(), line(id="two")))
    bundled = read_seeds(bundled_seeds())
    run = tmp_path / "run"
    run.mkdir()
    assert kept_seeds(run, fingerprint(bundled)) == bundled
    assert kept_seeds(run, fingerprint(own)) == []
    keep(own, run)
    assert kept_seeds(run, fingerprint(own)) == own
    assert kept_seeds(run, fingerprint(bundled)) == bundled
    assert kept_seeds(run, fingerprint(own), bundled_seeds()) == []
    (run / KEPT).write_text("damaged")
    assert kept_seeds(run, fingerprint(own)) == []
    with pytest.raises(InputError, match="cannot be read"):
        kept_seeds(run, fingerprint(own), tmp_path / "missing")
