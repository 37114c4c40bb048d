"""A real vLLM on each of two nodes that Ray places servers on, one of which loses power.

``make ray`` and ``make test-vllm`` build the environments; WOOLMILL_RAY_PYTHON and
WOOLMILL_VLLM_PYTHON name their interpreters.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import models
from engine.backends.vllm.servers import serving
from engine.upkeep.verify import problems
from tests.ray.rig import answered, ended, exported
from tests.ray.test_ray import Cluster, a_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

ROWS, TARGET = 16, 10
"""Questions, and answers wanted: the small model leaves some unfinished."""
NODES = ("127.0.0.12", "127.0.0.13")
LOADING_S = 400.0
"""Two servers that load at once on two cores."""
TOPICS = ("rain", "bees", "salt", "clocks", "moss", "glass", "harbours", "bread")


@pytest.fixture
def vllm_python() -> str:
    if (found := os.environ.get("WOOLMILL_VLLM_PYTHON")) is None:
        pytest.skip("WOOLMILL_VLLM_PYTHON is not set; run make test-vllm")
    return found


@pytest.fixture
def cluster(python: str, tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "ray"
    folder.mkdir()
    with a_cluster(python, folder, *NODES) as made:
        yield made


def test_a_node_with_a_real_vllm_loses_power(
    cluster: Cluster, vllm_python: str, tmp_path: Path
) -> None:
    """As many rows as were asked for, byte for byte those of one server that nobody disturbed, and
    no server is left.
    """
    model = str(models.fetch("smollm2"))
    rows = tmp_path / "questions.jsonl"
    questions = [f"Say in one sentence what {TOPICS[n % 8]} is for, take {n}." for n in range(ROWS)]
    rows.write_text("".join(json.dumps({"question": each}) + "\n" for each in questions))
    # One at a time on each server, and greedily: a batch rounds otherwise than a prompt alone.
    settings: dict[str, Any] = {"max_in_flight": 1, "temperature": 0.0, "max_tokens": 32}
    settings |= {"model": model, "recipe": "respond", "rows": str(rows), "rouge_threshold": 1.0}
    out = tmp_path / "run"
    placed = cluster.on_ray(cluster.address, len(NODES), vllm_python=vllm_python)
    run = cluster.generate(out, target=TARGET, **settings, **placed)
    soon(lambda: len({node for _, node in servers(NODES)}) == len(NODES), "two servers")
    soon(lambda: out.exists() and answered(out) >= 3, "no answers")
    cluster.say(f"kill {NODES[0]}")
    status, said = ended(run)
    assert status == 0, said
    assert "has left" in said
    assert not servers(NODES)
    assert list(problems(out)) == []

    whole = tmp_path / "uncut"
    arguments = {"max_model_len": "2048"}
    logs = tmp_path / "logs"
    with serving(model, python=Path(vllm_python), args=arguments, log_dir=logs) as [server]:
        alone = cluster.generate(whole, target=TARGET, base_url=[server.base_url], **settings)
        status, said = ended(alone)
    assert status == 0, said
    assert exported(out).count(b"\n") == TARGET
    assert exported(out) == exported(whole)


def soon(condition: Callable[[], Any], what: str) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < LOADING_S, what
        time.sleep(0.5)


def servers(nodes: tuple[str, ...]) -> list[tuple[int, str]]:
    """Process ids of vLLM's servers that run, with the address of the node of each."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = [os.fsdecode(word) for word in path.read_bytes().split(b"\0")]
        except OSError:
            continue
        if "--host" in words and (node := words[words.index("--host") + 1]) in nodes:
            found.append((int(path.parent.name), node))
    return found
