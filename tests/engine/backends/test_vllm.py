"""The vllm backend's side of the pipe, with the real child program and a fake vLLM in it.

``tests/vllm`` has the same with vLLM itself.
"""

from __future__ import annotations

import asyncio
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.backends.base import Failure
from engine.backends.vllm.arguments import child_environment, engine_arguments, last_error
from engine.backends.vllm.backend import VllmBackend
from engine.errors import ConfigError, UnavailableError, WoolmillError
from engine.records import Completion, Message, Prompt, Sampling
from engine.store import RunStore

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

FAKE = Path(__file__).parent / "fake_vllm"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter whose environment has the fake vLLM, and no other."""
    path = tmp_path / "python"
    path.write_text(
        f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(FAKE))} exec {shlex.quote(sys.executable)} "$@"\n'
    )
    path.chmod(0o755)
    return path


@asynccontextmanager
async def started(python: Path, folder: Path, **options: Any) -> AsyncIterator[VllmBackend]:
    """A backend from ``start`` to ``aclose``."""
    backend = VllmBackend(str(folder), python=python, **options)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.aclose()


def prompt(text: str, **changed: Any) -> Prompt:
    """A prompt of few tokens."""
    return Prompt(index=0, text=text, api="completions", sampling=Sampling(max_tokens=8), **changed)


def text_of(answer: Completion | BaseException) -> str:
    """The text of what must be an answer."""
    assert isinstance(answer, Completion), answer
    return answer.text


def verdict(answer: Completion | BaseException) -> Any:
    """What a failed answer says."""
    assert isinstance(answer, Failure), answer
    return answer.verdict


def child_pid(backend: VllmBackend) -> int:
    """The child's process id."""
    child = backend._child
    assert child is not None
    assert child._process is not None
    return child._process.pid


def holders(path: Path) -> Iterator[int]:
    """Processes that have ``path`` open."""
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.path.realpath(fd) == str(path) for fd in folder.iterdir()):
                yield int(folder.parent.name)
        except OSError:
            continue


def wait_for_end(pid: int) -> None:
    """Return when the process is gone; the test's own time limit is the only one."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        select.select([descriptor], [], [])
    finally:
        os.close(descriptor)


async def test_a_request_samples_by_all_that_its_recipe_says(python: Path, tmp_path: Path) -> None:
    """Penalties go by their names, a schema as vLLM's structured outputs; what vLLM does not have
    ends the run with its name, before anything is lost.
    """
    schema = {"type": "object"}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}

    def sampled(**extra: Any) -> Prompt:
        sampling = Sampling(max_tokens=8, extra=extra)
        return Prompt(index=0, text="parameters", api="completions", sampling=sampling)

    bad = {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
    async with started(python, tmp_path) as backend:
        [tuned] = await backend.complete([sampled(top_k=40, presence_penalty=1.5)])
        [formed] = await backend.complete([sampled(response_format=form)])
        [free] = await backend.complete([sampled(response_format={"type": "json_object"})])
        [unknown] = await backend.complete([sampled(top_kk=40)])
        [refused] = await backend.complete([sampled(response_format=bad)])
        [shapeless] = await backend.complete([sampled(response_format="json")])
    assert "top_k=40, presence_penalty=1.5" in text_of(tuned)
    assert "StructuredOutputsParams(json={'type': 'object'}" in text_of(formed)
    assert "json_object=True" in text_of(free)
    for failed, words in [
        (unknown, "it has no 'top_kk'; did you mean top_k?"),
        (refused, "no grammar for that"),
        (shapeless, "response_format"),
    ]:
        assert verdict(failed).kind == "settings"
        assert words in str(verdict(failed).error)
    assert backend.witness.constrains is False


async def test_a_chat_goes_on_where_its_last_turn_ends(python: Path, tmp_path: Path) -> None:
    turns = (Message(role="user", content="q"), Message(role="assistant", content="a"))
    sampling = Sampling(max_tokens=8)
    begun = Prompt(index=0, messages=turns, api="chat", sampling=sampling)
    whole = Prompt(index=0, messages=turns[:1], api="chat", sampling=sampling)
    async with started(python, tmp_path) as backend:
        answers = await backend.complete([begun, whole])
    assert [text_of(answer) for answer in answers] == ["<Q|A", "<Q>"]


async def test_answers_come_back_to_their_prompts(python: Path, tmp_path: Path) -> None:
    """Several calls at once, each with its own answer, usage and time to the first token."""
    async with started(python, tmp_path) as backend:
        assert backend.context_length == 40
        calls = await asyncio.gather(
            *(backend.complete([prompt(f"a{n}"), prompt(f"b{n}")]) for n in range(50))
        )
        chat = Prompt(index=0, text="hi", api="chat", sampling=Sampling(max_tokens=8))
        [answer] = await backend.complete([chat])
        assert await backend.count_tokens(["abc", ""]) == [3, 0]
        assert await backend.count_tokens([]) == []
    assert [[text_of(a) for a in call] for call in calls] == [[f"A{n}", f"B{n}"] for n in range(50)]
    assert text_of(answer) == "<HI>"
    assert isinstance(answer, Completion)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 3)
    assert answer.ttft_s == 0.25


async def test_tokens_in_the_making_are_told(python: Path, tmp_path: Path) -> None:
    """The child says how far it is, and takes a finished answer out."""
    async with started(python, tmp_path) as backend:
        assert backend.tokens_in_the_making == 0
        seen = set()
        answer = asyncio.ensure_future(backend.complete([prompt("step by step")]))
        while not answer.done():
            seen.add(backend.tokens_in_the_making)
            await asyncio.sleep(0.05)
        assert {1, 2, 3} <= seen
        assert backend.tokens_in_the_making == 0


async def test_failures_stand_in_their_place(python: Path, tmp_path: Path) -> None:
    """Overflow, a refused request and an aborted one, beside one that is answered."""
    async with started(python, tmp_path) as backend:
        long, refused, aborted, fine = await backend.complete(
            [prompt("x" * 33), prompt("boom"), prompt("abort"), prompt("fine")]
        )
    assert verdict(long).kind == "overflow"
    assert (verdict(long).context_length, verdict(long).prompt_tokens) == (40, 33)
    assert (verdict(refused).kind, verdict(refused).message) == ("dead", "ValueError: bad request")
    assert (verdict(aborted).kind, verdict(aborted).reason) == ("ambiguous", "finish_abort")
    assert text_of(fine) == "FINE"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_fault_057_what_was_in_flight_is_sent_again(
    python: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """The child dies in the middle: every call is still answered, exactly once."""
    async with started(python, tmp_path, args={"max_model_len": "400"}) as backend:
        crash = f"die once in {tmp_path / 'x'}"
        calls = [backend.complete([prompt(f"a{n}"), prompt(f"b{n}")]) for n in range(20)]
        crashing = asyncio.ensure_future(backend.complete([prompt(crash)]))
        slow = asyncio.ensure_future(backend.complete([prompt("slow")]))
        answers = await asyncio.gather(*calls)
        assert text_of((await crashing)[0]) == crash.upper()
        assert not slow.done()
        os.kill(child_pid(backend), number)
        assert text_of((await backend.complete([prompt("again")]))[0]) == "AGAIN"
        slow.cancel()
    assert [[text_of(a) for a in call] for call in answers] == [
        [f"A{n}", f"B{n}"] for n in range(20)
    ]


@pytest.mark.parametrize("text", ["die", "dead"])
async def test_fault_057_the_fourth_death_is_the_last(
    python: Path, tmp_path: Path, text: str
) -> None:
    """Three new children, then exit code 69 with the log; nobody waits for ever."""
    async with started(python, tmp_path) as backend:
        with pytest.raises(Failure) as caught:
            await backend.complete([prompt(text)])
    error = caught.value.verdict.error
    assert isinstance(error, UnavailableError)
    assert error.exit_code == 69
    assert "died 4 times" in str(error)
    assert ("SIGKILL" if text == "die" else "status 1") in str(error)


async def test_a_cancelled_call_is_cancelled_in_the_child(python: Path, tmp_path: Path) -> None:
    """Nothing is computed for somebody who has left, and the child goes on."""
    async with started(python, tmp_path) as backend:
        slow = asyncio.ensure_future(backend.complete([prompt("slow")]))
        assert text_of((await backend.complete([prompt("one")]))[0]) == "ONE"
        slow.cancel()
        assert text_of((await backend.complete([prompt("two")]))[0]) == "TWO"
        child = backend._child
        assert child is not None
        assert child._owed == {}


@pytest.mark.parametrize("how", ["close", "kill"])
async def test_workers_do_not_outlive_the_child(python: Path, tmp_path: Path, how: str) -> None:
    """vLLM's own worker processes end with the child, closed in order or killed."""
    async with started(python, tmp_path) as backend:
        pid = child_pid(backend)
        worker = next(holders(tmp_path / "worker"), None)
        while worker is None:
            await backend.count_tokens(["x"])
            worker = next(holders(tmp_path / "worker"), None)
        if how == "kill":
            os.kill(pid, signal.SIGKILL)
            await asyncio.to_thread(wait_for_end, worker)
    await asyncio.to_thread(wait_for_end, worker)
    await asyncio.to_thread(wait_for_end, pid)


async def test_the_child_does_not_outlive_its_parent(python: Path, tmp_path: Path) -> None:
    """kill -9 of the engine ends the child, its workers included."""
    program = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from engine.backends.vllm.backend import VllmBackend
from tests.engine.backends.test_vllm import child_pid, holders
async def main():
    backend = VllmBackend({str(tmp_path)!r}, python=Path({str(python)!r}))
    await backend.start()
    while not (worker := next(holders(Path({str(tmp_path / "worker")!r})), None)):
        await backend.count_tokens(["x"])
    print(child_pid(backend), worker, flush=True)
    await asyncio.get_running_loop().create_future()
asyncio.run(main())
"""
    parent = subprocess.Popen(  # noqa: ASYNC220 - killed below, which asyncio's cannot outlive
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in (await asyncio.to_thread(parent.stdout.readline)).split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for pid in pids:
        await asyncio.to_thread(wait_for_end, pid)


def woolmill(python: Path, model: Path, out: Path) -> subprocess.Popen[str]:
    """``woolmill generate`` on the fake vLLM, for some two seconds."""
    command = [sys.executable, "-m", "engine", "generate", "--backend", "vllm", "--no-progress"]
    command += ["--model", str(model), "--vllm-python", str(python), "--out", str(out)]
    command += ["--vllm-arg", "max_model_len=100000", "--max-tokens", "256", "--no-semantic"]
    command += ["--max-in-flight", "4", "--target", "60"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def accepted_rows(out: Path) -> list[str]:
    """The instructions that the run's store holds as accepted, in order."""
    with RunStore.read(out) as store:
        return [row.record["instruction"] for row, _ in store.accepted() if row.record]


def in_the_middle(run: subprocess.Popen[str], model: Path, out: Path) -> tuple[int, int]:
    """Wait until a run has accepted something; its vLLM child and the child's worker."""
    while True:
        assert run.poll() is None, run.communicate()[1]
        try:
            if accepted_rows(out):
                break
        except WoolmillError:  # the store is not there yet
            pass
        time.sleep(0.01)
    worker = next(holders(model / "worker"))
    stat = Path(f"/proc/{worker}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1]), worker


def test_fault_057_a_run_survives_its_child_and_its_own_end(python: Path, tmp_path: Path) -> None:
    """kill -9 of the child: the run goes on. kill -9 of the run: the child ends too, and the same
    command goes on. Both end with exactly the rows wanted, and the same ones.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    with woolmill(python, tmp_path, one) as run:
        child, _ = in_the_middle(run, tmp_path, one)
        os.kill(child, signal.SIGKILL)
        said = run.communicate()[1]
    assert run.returncode == 0, said
    assert "vLLM died by SIGKILL" in said

    with woolmill(python, tmp_path, two) as run:
        pids = in_the_middle(run, tmp_path, two)
        run.kill()
        run.communicate()
    for pid in pids:
        wait_for_end(pid)
    kept = accepted_rows(two)
    with woolmill(python, tmp_path, two) as run:
        said = run.communicate()[1]
    assert run.returncode == 0, said
    rows = accepted_rows(two)
    assert len(set(rows)) == len(rows) == 60
    assert 0 < len(kept) < 60
    assert rows[: len(kept)] == kept
    assert accepted_rows(one) == rows


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        ({"dtyp": "float32"}, ConfigError, "no argument 'dtyp'; did you mean dtype"),
        ({"dtype": "memory"}, UnavailableError, "CUDA out of memory"),
        ({"dtype": "exit"}, ConfigError, "no such quantization"),
        ({"dtype": "killed"}, UnavailableError, "not memory enough: it died by SIGKILL"),
    ],
)
async def test_an_engine_that_does_not_start(
    python: Path, tmp_path: Path, args: dict[str, str], error: type[Exception], says: str
) -> None:
    """One line with the root cause, which may stand in the log alone, and where the log is."""
    log_file = tmp_path / "vllm.log"
    backend = VllmBackend(str(tmp_path), python=python, args=args, log_file=log_file)
    with pytest.raises(error, match=says) as caught:
        await backend.start()
    assert "\n" not in str(caught.value)
    assert str(log_file) in str(caught.value)


async def test_no_vllm_and_no_interpreter(tmp_path: Path) -> None:
    """Each says what to install or name."""
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(ConfigError, match=r"pip install 'woolmill\[vllm\]'"):
        await VllmBackend(str(tmp_path), python=bare).start()
    with pytest.raises(ConfigError, match="cannot run"):
        await VllmBackend(str(tmp_path), python=tmp_path / "nothing").start()
    with pytest.raises(ConfigError, match="never run"):
        VllmBackend("m", args={"trust-remote-code": "true"})
    with pytest.raises(ConfigError, match="never run"):
        VllmBackend("m", args={"--trust-rem": "true"})
    assert engine_arguments({"seed": "3"})["trust_remote_code"] is False


def test_keys_stay_out_of_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child gets what it needs, and no key of ours."""
    secrets = ["OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "DB_PASSWORD"]
    for name in [*secrets, "HF_TOKEN", "TOKENIZERS_PARALLELISM", "PYTHONPATH"]:
        monkeypatch.setenv(name, "x")
    given = child_environment()
    assert not set(given) & {*secrets, "PYTHONPATH"}
    assert {"HF_TOKEN", "TOKENIZERS_PARALLELISM", "PATH", "VLLM_NO_USAGE_STATS"} <= set(given)


def test_the_root_cause_in_a_log(tmp_path: Path) -> None:
    """The last exception counts, without vLLM's own report that its core has failed."""
    log_file = tmp_path / "log"
    log_file.write_text(
        "ERROR safetensors_rust.SafetensorError: header too large\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert last_error(log_file) == "safetensors_rust.SafetensorError: header too large"
    assert last_error(tmp_path / "none") == ""
