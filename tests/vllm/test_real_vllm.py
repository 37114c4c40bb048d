"""A real vLLM on the small real model: over HTTP with both APIs, and in a child process.

``make test-vllm`` builds the environment; WOOLMILL_VLLM_PYTHON names its interpreter.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.backends.base import Failure
from engine.backends.openai.backend import HttpBackend
from engine.backends.vllm.backend import VllmBackend
from engine.backends.vllm.servers import Server
from engine.errors import WoolmillError
from engine.records import Completion, Prompt, Sampling
from engine.store import RunStore
from tests.engine.backends.test_vllm import child_pid, holders, wait_for_end

pytestmark = [pytest.mark.vllm, pytest.mark.anyio, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


def greedy(text: str, max_tokens: int = 12, **changed: object) -> Prompt:
    """A prompt with one right answer."""
    sampling = Sampling(max_tokens=max_tokens, temperature=0)
    return Prompt(index=0, text=text, sampling=sampling, **{"api": "completions"} | changed)  # type: ignore[arg-type]


def text_of(answer: Completion | BaseException) -> str:
    """The text of what must be an answer."""
    assert isinstance(answer, Completion), answer
    return answer.text


async def test_both_apis_over_http(server: Server) -> None:
    """The server's context is known, both APIs answer, an overlong prompt is an overflow."""
    backend = HttpBackend(server.base_url, "smollm2")
    await backend.start()
    try:
        assert backend.context_length == 2048
        [text] = await backend.complete([greedy("The capital of France is")])
        [chat] = await backend.complete([greedy("Name a colour.", api="chat")])
        counts = await backend.count_tokens(["The capital of France is"])
        try:
            [long] = await backend.complete([greedy("word " * 3000)])
        except Failure as failure:
            long = failure
    finally:
        await backend.aclose()
    assert text_of(text).startswith(" Paris")
    assert text_of(chat)
    assert counts == [5]
    assert isinstance(long, Failure)
    assert long.verdict.kind == "overflow"
    assert long.verdict.context_length == 2048


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_generate_over_http(server: Server, tmp_path: Path, api: str) -> None:
    """``woolmill generate`` to the end and ``woolmill export``: whole, unique Alpaca records."""
    run = tmp_path / "run"
    woolmill = [sys.executable, "-m", "engine"]
    generate = [*woolmill, "generate", "--base-url", server.base_url, "--api", api]
    requests = "8" if api == "chat" else "60"
    generate += ["--target", "4", "--max-tokens", "256", "--max-requests", requests]
    generate += ["--no-semantic"]
    generate += ["--temperature", "0.7", "--out", str(run), "--no-progress"]
    done = subprocess.run(generate, cwd=ROOT, capture_output=True, text=True, check=False)
    # A model this small may keep too little of the format for the target: 75, and resumable.
    assert done.returncode in ((0, 75) if api == "chat" else (0,)), done.stderr
    target = tmp_path / "alpaca.json"
    export = [*woolmill, "export", str(run), "--format", "alpaca", "-o", str(target)]
    subprocess.run(export, cwd=ROOT, check=True, capture_output=True)
    rows = json.loads(target.read_text())
    assert len(rows) == 4 or api == "chat"
    assert len({row["instruction"] for row in rows}) == len(rows)
    assert all(row["instruction"] and row["output"] for row in rows)


async def test_fault_057_in_a_child_process(python: Path, tmp_path: Path) -> None:
    """Right answers, before and after kill -9 of the child with requests in flight."""
    log_file = tmp_path / "vllm.log"
    backend = VllmBackend(
        "smollm2",
        python=python,
        max_in_flight=16,
        args={"max_model_len": "2048"},
        log_file=log_file,
    )
    await backend.start()
    try:
        assert backend.context_length == 2048
        assert await backend.count_tokens(["The capital of France is"]) == [5]
        calls = [
            asyncio.ensure_future(backend.complete([greedy("The capital of France is", 200 + n)]))
            for n in range(8)
        ]
        [long] = await backend.complete([greedy("word " * 3000)])
        [chat] = await backend.complete([greedy("Name a colour.", api="chat")])
        while not backend.tokens_in_the_making:
            assert not all(call.done() for call in calls)
            await asyncio.sleep(0.05)
        killed = child_pid(backend)
        os.kill(killed, signal.SIGKILL)
        answers = [text_of(answer) for [answer] in await asyncio.gather(*calls)]
        assert child_pid(backend) != killed
    finally:
        await backend.aclose()
    assert all(answer.startswith(" Paris") for answer in answers)
    assert text_of(chat)
    assert isinstance(long, Failure)
    assert (long.verdict.kind, long.verdict.prompt_tokens) == ("overflow", 3001)
    await asyncio.to_thread(wait_for_end, killed)


def command(python: Path, out: Path, *more: str) -> list[str]:
    """``woolmill generate`` for two records with vLLM, two rows at a time."""
    run = [sys.executable, "-m", "engine", "generate", "--backend", "vllm", "--target", "2"]
    run += ["--vllm-python", str(python), "--vllm-arg", "max_model_len=2048", "--no-semantic"]
    return [*run, "--max-in-flight", "8", "--no-progress", "--out", str(out), *more]


def instructions(out: Path) -> list[str]:
    """Those of the accepted rows, in order."""
    with RunStore.read(out) as store:
        return [row.record["instruction"] for row, _ in store.accepted() if row.record]


def test_generate_on_a_server_of_its_own(python: Path, tmp_path: Path) -> None:
    """``--serve``: exactly the rows wanted, and no server left."""
    out = tmp_path / "run"
    done = subprocess.run(
        command(python, out, "--serve"), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(set(instructions(out))) == 2
    none_is_left(out)


def test_fault_057_a_run_whose_child_and_whose_self_are_killed(
    python: Path, tmp_path: Path
) -> None:
    """kill -9 of the run while vLLM answers: the child ends too. The same command goes on, its own
    child is killed, and it ends with exactly the rows wanted.
    """
    out = tmp_path / "run"
    with subprocess.Popen(
        command(python, out), cwd=ROOT, stderr=subprocess.DEVNULL, text=True
    ) as run:
        child = answering(out, run)
        run.kill()
    wait_for_end(child)
    kept = instructions(out)
    with RunStore.read(out) as store:
        sent = store.counts().sent
    with subprocess.Popen(command(python, out), cwd=ROOT, stderr=subprocess.PIPE, text=True) as run:
        os.kill(answering(out, run, sent), signal.SIGKILL)
        said = run.communicate()[1]
    assert run.returncode == 0, said
    assert "vLLM died by SIGKILL" in said
    rows = instructions(out)
    assert len(set(rows)) == len(rows) == 2
    assert rows[: len(kept)] == kept
    none_is_left(out)


def vllm_processes(out: Path) -> Iterator[int]:
    """Processes that write a vLLM log of this run."""
    for log in out.glob("vllm*.log"):
        yield from holders(log)


def none_is_left(out: Path) -> None:
    """Return when vLLM's processes are gone. What is killed with gigabytes takes a moment to end,
    and what is not would be there when the test's time is over.
    """
    for pid in vllm_processes(out):
        wait_for_end(pid)


def answering(out: Path, run: subprocess.Popen[str], sent: int = 0) -> int:
    """Wait until more requests than ``sent`` were sent; the leader of vLLM's processes."""
    while True:
        assert run.poll() is None
        with contextlib.suppress(WoolmillError), RunStore.read(out) as store:
            leaders = [pid for pid in vllm_processes(out) if os.getpgid(pid) == pid]
            if leaders and store.counts().sent > sent:
                return leaders[0]
        time.sleep(0.2)
