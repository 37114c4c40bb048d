"""Whole runs whose embeddings come from a server: killed, resumed, decided again, cleaned."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from engine.store import RunReader
from engine.upkeep.verify import problems
from tests.engine.embedding_host import EmbeddingHost, status
from tests.engine.killed import run_with_kills

ROOT = Path(__file__).parents[3]
THRESHOLD = "0.55"
"""At which many of the texts made up are near-duplicates by their words' vectors."""
FAR = ["--semantic-threshold", THRESHOLD]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def host() -> Iterator[EmbeddingHost]:
    with EmbeddingHost() as host:
        yield host


def woolmill(*arguments: str | Path, status: int = 0, **variables: str) -> str:
    """Run a command; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "engine", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def generate(out: Path, host: EmbeddingHost, *more: str, **told: str | int) -> str:
    flags = ["--backend", "scripted", "--target", "60", "--out", str(out), "--no-progress"]
    status = int(told.pop("status", 0))
    variables = {name: str(value) for name, value in told.items()}
    flags += ["--semantic-url", host.url, *FAR]
    return woolmill("generate", *flags, *more, status=status, **variables)


def exported(run: Path, name: str = "rows.jsonl") -> bytes:
    woolmill("export", run, "-o", run / name)
    return (run / name).read_bytes()


def reasons(run: Path) -> dict[str, int]:
    with RunReader(run) as reader:
        return reader.counts().reasons


def test_a_run_is_decided_by_the_servers_vectors(host: EmbeddingHost, tmp_path: Path) -> None:
    """It records model and dimension, keeps the vectors, and is sound."""
    run = tmp_path / "run"
    generate(run, host)
    assert reasons(run)["duplicate_semantic"] > 10
    with RunReader(run) as reader:
        decision = reader.manifest.decision
        assert (decision["semantic_model"], decision["semantic_dimension"]) == ("words", 64)
        assert reader.counts().embeddings == len(list(reader.all_embeddings())) > 200
    assert list(problems(run)) == []
    assert max(host.asked.values()) <= 3, "each text once, but for the sentence of the start"


def test_deciding_again_asks_nothing_and_gives_the_same(
    host: EmbeddingHost, tmp_path: Path
) -> None:
    """Although the server's vectors are so unsteady that it would decide otherwise now."""
    host.noise = 0.01
    run = tmp_path / "run"
    generate(run, host)
    before, was = exported(run), reasons(run)
    woolmill("redecide", run, "--semantic-threshold", "0.65")
    assert reasons(run) != was
    host.requests.clear()
    woolmill("redecide", run, "--semantic-threshold", THRESHOLD)
    assert not host.requests
    assert exported(run, "again.jsonl") == before
    assert reasons(run) == was


def test_killed_runs_end_in_the_same_rows(host: EmbeddingHost, tmp_path: Path) -> None:
    host.noise = 1e-7
    settings = {
        "target": 150,
        "semantic_url": host.url,
        "semantic_threshold": float(THRESHOLD),
    }
    whole, killed = run_with_kills(tmp_path, settings, kills=3, flags=())
    assert exported(killed) == exported(whole)
    assert list(problems(killed)) == []
    host.requests.clear()
    woolmill("redecide", killed, *FAR)
    assert not host.requests
    assert exported(killed, "again.jsonl") == exported(whole)


def test_a_run_goes_on_after_an_outage(host: EmbeddingHost, tmp_path: Path) -> None:
    """Status 69, nothing lost; then to the end, with what was answered meanwhile decided."""
    run = tmp_path / "run"
    host.troubles = [None] * 10
    host.always = status(503, "gone")
    told = generate(run, host, "--max-outage", "1", status=69)
    assert "embeddings: no endpoint has answered for 1 s" in told
    with RunReader(run) as reader:
        answered = reader.counts().answered
    assert answered
    host.always = None
    generate(run, host)
    with RunReader(run) as reader:
        assert reader.counts().accepted == 60
        assert len(reader.sessions()) == 2


def test_another_model_is_refused_before_anything_is_asked(
    host: EmbeddingHost, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    generate(run, host)
    host.models = ["letters"]
    told = generate(run, host, "--target", "80", status=78)
    assert 'semantic_model: was "words", now "letters"' in told
    host.models, host.turned = ["words"], True
    told = generate(run, host, "--target", "80", status=78)
    assert "serves another model as words than before" in told


def test_a_server_without_embeddings_is_told_before_anything_is_paid(
    host: EmbeddingHost, tmp_path: Path
) -> None:
    host.always = status(404, "Not Found")
    told = generate(tmp_path / "run", host, status=78)
    assert "does it serve embeddings" in told
    assert not (tmp_path / "run" / "run.sqlite").exists()


def test_the_key_is_in_no_file(host: EmbeddingHost, tmp_path: Path) -> None:
    """Nor seen by a process that could show it: only the variable's name is."""
    host.key = "sk-embedding-canary-0123456789"
    run = tmp_path / "run"
    told = generate(run, host, "--semantic-key-env", "EMBED_KEY", EMBED_KEY=host.key)
    assert host.keys == {f"Bearer {host.key}"}
    woolmill("redecide", run, "--rouge-threshold", "0.5", EMBED_KEY=host.key)
    found = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in found if host.key.encode() in path.read_bytes()]
    assert host.key not in told
    told = woolmill("redecide", run, "--rouge-threshold", "0.9", status=78)
    assert "EMBED_KEY is not set" in told


def test_runs_are_merged_with_their_vectors(host: EmbeddingHost, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    generate(one, host)
    generate(other, host, "--seed", "1")
    host.requests.clear()
    woolmill("merge", one, other, "-o", tmp_path / "both")
    again = {text for body in host.requests for text in body["input"]}
    assert len(again) < 50, "only what the words of its own run had refused before"
    assert list(problems(tmp_path / "both")) == []


def test_salvage_keeps_the_vectors(host: EmbeddingHost, tmp_path: Path) -> None:
    run, saved = tmp_path / "run", tmp_path / "saved"
    generate(run, host)
    before = exported(run)
    with closing(sqlite3.connect(run / "run.sqlite")) as database:
        database.execute("UPDATE embedding SET body = zeroblob(128) WHERE rowid = 30")
        database.commit()
    damage = list(problems(run))
    assert any("table embedding" in line and "checksum" in line for line in damage)
    woolmill("salvage", run, "-o", saved)
    with RunReader(saved) as reader:
        kept = reader.counts().embeddings
    with RunReader(run) as reader:
        assert kept == reader.counts().embeddings - 1
    assert exported(saved) == before
    assert list(problems(saved)) == []


def test_a_dataset_is_cleaned_by_a_servers_vectors(host: EmbeddingHost, tmp_path: Path) -> None:
    """As it would be without unsteady vectors: each row has one, however often it is compared."""
    rows = [f"word{n} thing{n} other{n} some{n} more{n} last{n}" for n in range(300)]
    rows += [" ".join(reversed(row.split())) for row in rows[:40]]
    data, unique = tmp_path / "data.jsonl", tmp_path / "unique.jsonl"
    data.write_text("".join(json.dumps({"instruction": row}) + "\n" for row in rows))
    told = woolmill("dedup", data, "-o", unique, "--semantic-url", host.url)
    assert "340 rows, 300 accepted" in told
    assert len(unique.read_text().splitlines()) == 300
    assert {host.asked[row] for row in rows} == {1}
    told = woolmill("dedup", data, "--explain", "--semantic-url", host.url)
    assert "1.00: 40 rows" in told.replace("  ", " ")
