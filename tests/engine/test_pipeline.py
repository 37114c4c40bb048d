"""The run as a whole: plan order, exact target, few answers in vain, stops that lose nothing."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
import pytest

from engine.backends.base import Verdict
from engine.backends.scripted import ScriptedBackend
from engine.errors import AuthError, ConfigError, StoppedError
from engine.export import export
from engine.limits import Pool
from engine.records import Prompt
from engine.run import generate as generate_module
from engine.run.display import SilentDisplay
from engine.run.generate import Result, generate
from engine.run.progress import Progress
from engine.settings import RunConfig
from engine.store import RunStore
from engine.store.inserts import Inserts
from engine.store.writer import Work

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


def answer(prompt: Prompt, records: int = 2) -> str:
    """Records of random words, a pure function of the prompt's index: never near-duplicates."""
    words = hashlib.sha256(str(prompt.index).encode()).hexdigest()
    first = len(prompt.demonstrations) + 1
    text = ""
    for number in range(first, first + records):
        mark = random.Random(f"{words}{number}").choices("abcdefghijklmnop", k=48)
        said = " ".join("".join(mark[at : at + 6]) for at in range(0, 48, 6))
        label = "" if number == first else f"{number}. Instruction:"
        text += f"{label} Tell {said}\n{number}. Input:\n\n{number}. Output:\n{said}\n###\n"
    return text


def jitter(prompt: Prompt) -> float:
    """Seconds; late answers are common, and their order is not that of the plan."""
    return random.Random(prompt.index * 7919).choice([0.0, 0.0, 0.001, 0.02])


class Watcher:
    """A display that remembers, and can act."""

    def __init__(self, act: Callable[[Progress], None] = lambda progress: None) -> None:
        self.notes: list[str] = []
        self.act = act

    def refresh(self, progress: Progress, pool: Pool) -> None:
        self.act(progress)

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ScriptedBackend:
    """What ``generate`` uses in place of a backend of its own."""
    backend = ScriptedBackend(answer, max_in_flight=None)
    monkeypatch.setattr(generate_module, "make_backends", lambda config: [backend])
    return backend


async def ran(folder: Path, watcher: Watcher | None = None, **settings: object) -> Result:
    config = RunConfig.model_validate(
        {"backend": "scripted", "out": folder, "semantic": False, "target": 100, **settings}
    )
    return await generate(config, watcher or Watcher())


def exported(folder: Path) -> bytes:
    path = folder / "rows.jsonl"
    with RunStore.read(folder) as store:
        export(store, "jsonl", path)
    return path.read_bytes()


async def test_the_result_does_not_depend_on_concurrency_or_latency(
    tmp_path: Path, backend: ScriptedBackend
) -> None:
    """One at a time at once, or 64 with late answers: the exported bytes are the same."""
    await ran(tmp_path / "one", max_in_flight=1)
    backend._delay_s = jitter
    result = await ran(tmp_path / "many", max_in_flight=64)
    assert result.stop.reached
    assert exported(tmp_path / "one") == exported(tmp_path / "many")


@pytest.mark.parametrize("records", [1, 2, 3, 7])
async def test_exactly_the_target_and_few_answers_in_vain(
    tmp_path: Path, backend: ScriptedBackend, records: int
) -> None:
    backend._answer = lambda prompt: answer(prompt, records)
    result = await ran(tmp_path, target=500, max_in_flight=64)
    assert result.progress.accepted == 500
    assert exported(tmp_path).count(b"\n") == 500
    needed = -(-500 // records)
    assert backend.calls.total() <= needed * 1.1 + 4


async def test_a_higher_target_goes_on_inside_the_last_answer(
    tmp_path: Path, backend: ScriptedBackend
) -> None:
    backend._answer = lambda prompt: answer(prompt, 7)
    await ran(tmp_path / "steps", target=10)
    await ran(tmp_path / "steps", target=11)
    await ran(tmp_path / "steps", target=60)
    await ran(tmp_path / "whole", target=60)
    assert exported(tmp_path / "steps") == exported(tmp_path / "whole")


async def test_a_finished_run_starts_nothing(tmp_path: Path, backend: ScriptedBackend) -> None:
    await ran(tmp_path)
    backend.calls.clear()
    result = await ran(tmp_path)
    assert result.stop.reached
    assert not backend.calls


async def test_a_restart_pays_nothing_twice(tmp_path: Path, backend: ScriptedBackend) -> None:
    """Stopped by --max-requests, then gone on: each index is asked once."""
    first = await ran(tmp_path / "cut", max_requests=17, max_in_flight=8)
    assert isinstance(first.stop.error, StoppedError)
    await ran(tmp_path / "cut", max_in_flight=8)
    assert max(backend.calls.values()) == 1
    await ran(tmp_path / "whole", max_in_flight=8)
    assert exported(tmp_path / "cut") == exported(tmp_path / "whole")


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 2), (signal.SIGTERM, 15)])
async def test_fault_068_a_signal_drains_and_commits(
    tmp_path: Path, backend: ScriptedBackend, signum: signal.Signals, status: int
) -> None:
    """Nothing more is sent, everything in flight comes home, and going on pays nothing twice."""
    backend._delay_s = lambda prompt: 0.03

    def interrupt(progress: Progress) -> None:
        if progress.answered and not progress.draining:
            os.kill(os.getpid(), signum)

    result = await ran(tmp_path / "cut", Watcher(interrupt), target=5000, max_in_flight=32)
    assert result.stop.signum == status
    with RunStore.read(tmp_path / "cut") as store:
        counts = store.counts()
        assert counts.sent == counts.answered == backend.calls.total()
    backend._delay_s = 0
    await ran(tmp_path / "cut", target=200)
    assert max(backend.calls.values()) == 1


async def test_signals_are_heard_before_anything_is_sent(
    tmp_path: Path, backend: ScriptedBackend
) -> None:
    """A terminal that closes just then would end the process, with what is under way."""
    heard = list[bool]()

    def look(progress: Progress) -> None:
        heard.append(signal.getsignal(signal.SIGHUP) not in (signal.SIG_DFL, None))

    await ran(tmp_path, Watcher(look), target=20)
    assert all(heard)
    assert heard


async def test_fault_069_a_second_signal_leaves_at_once(
    tmp_path: Path, backend: ScriptedBackend
) -> None:
    """Answers that will not come are not waited for; they are sent again later."""
    backend._delay_s = lambda prompt: 0.0 if prompt.index < 10 else 3600.0

    def interrupt(progress: Progress) -> None:
        if progress.answered >= 10:
            os.kill(os.getpid(), signal.SIGINT)

    with anyio.fail_after(10):
        result = await ran(tmp_path, Watcher(interrupt), max_in_flight=32)
    assert result.stop.signum == signal.SIGINT
    with RunStore.read(tmp_path) as store:
        assert store.counts().answered == 10
        left = [request.index for request in store.resume().in_flight]
    assert left == list(range(10, 10 + len(left)))
    backend._delay_s = 0
    watcher = Watcher()
    result = await ran(tmp_path, watcher)
    assert result.progress.accepted == 100
    assert result.resent == len(left)
    assert any("may have been billed" in note for note in watcher.notes)


async def test_the_answer_that_all_decisions_wait_for_is_asked_again(
    tmp_path: Path, backend: ScriptedBackend
) -> None:
    """It was in flight when the run was left, much is answered behind it, and little is missing."""
    backend._delay_s = lambda prompt: 3600.0 if prompt.index == 3 else 0.0

    def leave(progress: Progress) -> None:
        if progress.answered >= 30:
            os.kill(os.getpid(), signal.SIGINT)

    await ran(tmp_path / "run", Watcher(leave), target=1000, max_in_flight=40)
    backend._delay_s = 0
    sent = backend.calls.total()
    with anyio.fail_after(20):
        result = await ran(tmp_path / "run", target=8)
    assert result.stop.reached
    assert backend.calls.total() == sent + 1


async def test_fault_068_a_request_that_waits_to_be_tried_again_is_not_waited_for(
    tmp_path: Path, backend: ScriptedBackend
) -> None:
    wait = Verdict(kind="ambiguous", reason="http_500", retry_after_s=3600.0)
    backend._fault = lambda prompt, attempt: wait if prompt.index == 5 else None

    def interrupt(progress: Progress) -> None:
        if progress.answered >= 10 and not progress.draining:
            os.kill(os.getpid(), signal.SIGINT)

    with anyio.fail_after(10):
        result = await ran(tmp_path, Watcher(interrupt))
    assert result.stop.signum == signal.SIGINT
    with RunStore.read(tmp_path) as store:
        assert [request.index for request in store.resume().in_flight] == [5]


async def test_a_request_that_fails_for_good_is_a_decision(
    tmp_path: Path, backend: ScriptedBackend
) -> None:
    verdict = Verdict(kind="dead", reason="content_filter", message="no")
    backend._fault = lambda prompt, attempt: verdict if prompt.index % 5 == 3 else None
    result = await ran(tmp_path)
    assert result.stop.reached
    assert result.progress.accepted == 100
    assert 5 < result.progress.reasons["failed:content_filter"] <= result.progress.failed


async def test_retries_change_nothing(tmp_path: Path, backend: ScriptedBackend) -> None:
    await ran(tmp_path / "calm")
    fault = Verdict(kind="ambiguous", reason="http_500", retry_after_s=0.0)
    backend._fault = lambda prompt, attempt: fault if attempt < 1 + prompt.index % 3 else None
    backend.calls.clear()
    await ran(tmp_path / "rough")
    assert exported(tmp_path / "calm") == exported(tmp_path / "rough")


async def test_fault_026_a_refused_key_stops_the_run_and_keeps_what_came(
    tmp_path: Path, backend: ScriptedBackend
) -> None:
    fatal = Verdict(kind="fatal", reason="http_401", error=AuthError("the key is refused"))
    backend._fault = lambda prompt, attempt: fatal if prompt.index == 20 else None
    result = await ran(tmp_path, max_in_flight=4)
    assert isinstance(result.stop.error, AuthError)
    assert backend.calls.total() <= 20 + 4
    with RunStore.read(tmp_path) as store:
        assert store.counts().answered >= 19


async def test_fault_065_collapse_ends_the_run(tmp_path: Path, backend: ScriptedBackend) -> None:
    """The same answer for ever is refused for ever; the run says so and stops."""
    backend._answer = lambda prompt: " Say the same thing twice\n4. Input:\n\n4. Output:\nx"
    result = await ran(tmp_path, max_barren_requests=20)
    assert isinstance(result.stop.error, StoppedError)
    assert "duplicate_exact" in str(result.stop.error)
    assert result.progress.accepted == 1


async def test_little_is_asked_until_something_is_accepted(
    tmp_path: Path, backend: ScriptedBackend
) -> None:
    """A setting that spoils every answer is not paid for by all the requests that there may be."""
    backend._answer = lambda prompt: "nothing that has the format"
    result = await ran(tmp_path, target=200, max_in_flight=512, max_barren_requests=40)
    assert isinstance(result.stop.error, StoppedError)
    assert 40 <= backend.calls.total() <= 40 + 2 * 40


async def test_fault_109_a_slow_disk_holds_sending_back(
    tmp_path: Path, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request waits for its record, behind the answers that came before: so no more answers wait
    for the disk than may be in flight, however fast the server and slow the disk.
    """
    commit, answers = Inserts.commit, []

    def slow(self: Inserts, group: Sequence[Work]) -> None:
        time.sleep(0.02)  # in the thread of the store
        answers.append(sum(len(work.answers) for work in group))
        commit(self, group)

    monkeypatch.setattr(Inserts, "commit", slow)
    result = await ran(tmp_path, target=400, max_in_flight=8)
    assert result.stop.reached
    assert max(answers) == 8


async def test_a_run_that_is_left_while_scouts_wait_ends(
    tmp_path: Path, backend: ScriptedBackend
) -> None:
    """Of unknown context, calls go one by one; those that never went out hold nothing up."""
    backend.context_length, backend._delay_s = None, 3600
    signals = iter([signal.SIGINT, signal.SIGINT])

    def act(progress: Progress) -> None:
        if progress.sent and (signum := next(signals, None)) is not None:
            os.kill(os.getpid(), signum)

    with anyio.fail_after(20):
        result = await ran(tmp_path, Watcher(act), max_in_flight=8)
    assert result.stop.signum == signal.SIGINT
    assert result.progress.answered == 0
    assert result.progress.sent == 1


async def test_fault_101_a_run_does_not_go_on_with_other_settings(
    tmp_path: Path, backend: ScriptedBackend
) -> None:
    await ran(tmp_path, target=10)
    with pytest.raises(ConfigError, match="temperature"):
        await ran(tmp_path, target=20, temperature=0.5)
    result = await ran(tmp_path, target=20, max_in_flight=3)
    assert result.progress.accepted == 20


async def test_fault_102_a_run_does_not_go_on_with_other_seeds(
    tmp_path: Path, backend: ScriptedBackend
) -> None:
    seeds = tmp_path / "seeds.jsonl"
    rows = [f'{{"id": "{n}", "instruction": "Do {n}.", "output": "{n}"}}' for n in range(5)]
    seeds.write_text("\n".join(rows))
    await ran(tmp_path / "run", target=10, seeds=seeds)
    seeds.write_text("\n".join(rows[:-1]))
    with pytest.raises(ConfigError, match="seeds"):
        await ran(tmp_path / "run", target=20, seeds=seeds)


async def test_accepted_rows_carry_their_neighbours(
    tmp_path: Path, backend: ScriptedBackend
) -> None:
    await ran(tmp_path, target=30)
    with RunStore.read(tmp_path) as store:
        decisions = [decision for decision, _ in store.accepted()]
    for decision in decisions:
        assert len(decision.most_similar) == 10
        assert max(decision.most_similar.values()) <= 0.7
        assert decision.mean_similarity is not None
        assert 0 <= decision.mean_similarity < 0.7


async def test_prompts_of_one_call_are_answered_apart(
    tmp_path: Path, backend: ScriptedBackend
) -> None:
    """Alpaca's request_batch_size changes the calls, not the result."""
    await ran(tmp_path / "single")
    await ran(tmp_path / "batched", request_batch_size=5)
    assert exported(tmp_path / "single") == exported(tmp_path / "batched")


async def test_a_context_that_no_prompt_fits_is_one_line_at_the_start(tmp_path: Path) -> None:
    config = RunConfig(backend="scripted", semantic=False, out=tmp_path, context_length=10)
    with pytest.raises(ConfigError, match=r"of the 10 tokens of the context.*--context-length"):
        await generate(config, SilentDisplay())
