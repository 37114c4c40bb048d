"""A real vLLM that embeds: the default model, as a server's and as this machine's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import models
from engine.backends.vllm.servers import Server, serving
from engine.dedup.encoder import _SAMPLE, SentenceEncoder
from engine.embeddings.kept import TemporaryVectors
from engine.embeddings.remote import RemoteEncoder
from engine.embeddings.served import with_served
from engine.settings import RunConfig
from engine.store import RunReader

pytestmark = [pytest.mark.vllm, pytest.mark.anyio, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A vLLM server of the default embedding model."""
    if (named := os.environ.get("WOOLMILL_VLLM_PYTHON")) is None:
        pytest.skip("WOOLMILL_VLLM_PYTHON is not set; run make test-vllm")
    models.fetch("minilm")
    logs = tmp_path_factory.mktemp("logs")
    arguments = {"dtype": "float32", "max_num_seqs": "32"}
    with serving("minilm", python=Path(named), args=arguments, log_dir=logs) as [server]:
        yield server


async def test_vectors_are_those_of_sentence_transformers(server: Server) -> None:
    """Of texts beyond the context too: vLLM cuts where sentence-transformers does."""
    config = await with_served(RunConfig(semantic_url=server.base_url))
    assert (config.semantic_model, config.semantic_dimension) == ("minilm", 384)
    encoder = RemoteEncoder(config, None, TemporaryVectors(), print)
    texts = [*_SAMPLE, *(f"Explain step {n} of {n * 3} to a child." for n in range(100))]
    try:
        vectors = encoder.encode(texts)
    finally:
        encoder.close()
    cosines = (vectors * SentenceEncoder().encode(texts)).sum(axis=1)
    assert cosines.min() > 0.9999


def test_a_run_decides_as_with_the_model_here(server: Server, tmp_path: Path) -> None:
    """And again without the server's being asked: another address would not answer."""

    def woolmill(*arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "engine", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def reasons(run: Path) -> list[str | None]:
        with RunReader(run) as reader:
            return [decision.reason for decision in reader.decisions()]

    run = ["generate", "--backend", "scripted", "--target", "40", "--no-progress"]
    run += ["--semantic-threshold", "0.6", "--out"]
    here, there = tmp_path / "here", tmp_path / "there"
    woolmill(*run, str(here), "--semantic")
    woolmill(*run, str(there), "--semantic-url", server.base_url)
    assert "duplicate_semantic" in reasons(here)
    assert reasons(there) == reasons(here)
    nobody = ["--semantic-url", "http://127.0.0.1:9/v1"]
    woolmill("redecide", str(there), "--semantic-threshold", "0.6", *nobody)
    assert reasons(there) == reasons(here)
