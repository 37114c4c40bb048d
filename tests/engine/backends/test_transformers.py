"""The transformers backend: right answers in any company, and clear words when it cannot work.

Tiny random models for the machinery, the embedded model for the claims about real text.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from engine import models
from engine.backends.base import Failure, GivesUp, Making
from engine.backends.local.backend import Loaded, TransformersBackend, load
from engine.backends.local.batching import ContinuousBatch
from engine.errors import ConfigError, StoppedError, UnavailableError, WoolmillError
from engine.limits import Pool
from engine.records import Completion, Message, Prompt, Sampling
from engine.report.figures import figures
from engine.run.display import SilentDisplay
from engine.run.generate import generate
from engine.run.progress import Progress
from engine.settings import RunConfig
from engine.store import RunStore
from tests.engine.tiny_models import save_gguf, save_llama, save_sliding

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

CPU = torch.device("cpu")
HEADER = "Write a varied list of tasks. No two of them may open with the same verb at all. " * 3
TEXTS = [
    HEADER + "One.",
    "The capital of France is",
    HEADER + "Two, and a longer end than that of the others, so that lengths differ.",
    "Once upon a time",
    HEADER,
    "1, 2, 3, 4,",
    HEADER + "One. " * 40,
]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model's folder."""
    return models.fetch("smollm2")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A tiny Llama."""
    return save_llama(tmp_path_factory.mktemp("models") / "llama", smollm2)


@pytest.fixture(scope="session")
def real(smollm2: Path) -> Loaded:
    """The embedded model, loaded once for all tests."""
    return load("smollm2", CPU)


def prompt(text: str, index: int = 0, *, api: Any = "completions", **sampling: Any) -> Prompt:
    """A prompt that is answered greedily unless told otherwise."""
    sampling = {"max_tokens": 24, "temperature": 0.0} | sampling
    return Prompt(index=index, text=text, api=api, sampling=Sampling(**sampling))


@asynccontextmanager
async def started(model: Path | str, **options: Any) -> AsyncIterator[TransformersBackend]:
    """A backend from ``start`` to ``aclose``."""
    backend = TransformersBackend(str(model), device="cpu", **options)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.aclose()


@pytest.fixture
def loaded_once(real: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends of the embedded model share the loaded one."""
    monkeypatch.setattr("engine.backends.local.backend.load", lambda *_: real)


def whole(answers: Sequence[Completion | BaseException]) -> list[Completion]:
    """The answers, none of which may be a failure."""
    assert all(isinstance(answer, Completion) for answer in answers), answers
    return [answer for answer in answers if isinstance(answer, Completion)]


def verdict(answer: Completion | BaseException) -> Any:
    """What a failed answer says."""
    assert isinstance(answer, Failure), answer
    return answer.verdict


def reference(loaded: Loaded, text: str, max_tokens: int) -> str:
    """What transformers' own ``generate`` answers, greedily."""
    ids = torch.tensor([loaded.tokenizer(text).input_ids])
    ours = loaded.model.config._attn_implementation
    loaded.model.set_attn_implementation("sdpa")
    try:
        out = loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
        )
    finally:
        loaded.model.set_attn_implementation(ours)
    answer: str = loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return answer


# Answers


@pytest.mark.parametrize("rows", [1, 3, 8])
async def test_greedy_equals_generate_in_any_mixture(tiny: Path, rows: int) -> None:
    """Batching, lanes, shared prefixes and refilled places change no token."""
    alone = load(str(tiny), CPU)
    expected = [reference(alone, text, 24) for text in TEXTS]
    async with started(tiny, max_in_flight=rows) as backend:
        for order in (TEXTS, TEXTS[::-1]):
            answers = whole(await backend.complete([prompt(text) for text in order]))
            assert [a.text for a in answers] == [expected[TEXTS.index(text)] for text in order]


@pytest.mark.parametrize("step", [16, 23])
async def test_a_prompt_is_read_in_several_steps_beside_nobody(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Steps that choose no token at all, as no row has one due."""
    monkeypatch.setattr("engine.backends.local.backend._STEP_TOKENS", {"cpu": step})
    expected = reference(load(str(tiny), CPU), TEXTS[-1], 24)
    async with started(tiny, max_in_flight=1) as backend:
        (answer,) = whole(await backend.complete([prompt(TEXTS[-1])]))
    assert answer.text == expected


async def test_greedy_equals_generate_with_a_sliding_window(tmp_path: Path, smollm2: Path) -> None:
    """Tokens behind the window are not looked at, in the prefix, in the row and while reading."""
    folder = save_sliding(tmp_path / "mistral", smollm2, window=20)
    alone = load(str(folder), CPU)
    async with started(folder, max_in_flight=8) as backend:
        answers = whole(await backend.complete([prompt(text) for text in TEXTS]))
    assert [a.text for a in answers] == [reference(alone, text, 24) for text in TEXTS]


async def test_greedy_equals_generate_from_a_gguf_file(tmp_path: Path, smollm2: Path) -> None:
    """A GGUF file brings its own tokenizer; nothing else is needed beside it."""
    file = save_gguf(tmp_path / "tiny.gguf", smollm2)
    alone = load(str(file), CPU)
    async with started(file) as backend:
        answers = whole(await backend.complete([prompt(text) for text in TEXTS[:4]]))
    assert [a.text for a in answers] == [reference(alone, text, 24) for text in TEXTS[:4]]


@pytest.mark.slow
@pytest.mark.usefixtures("loaded_once")
async def test_greedy_equals_generate_on_a_real_model(real: Loaded) -> None:
    """The same claim on real text: alone and in a mixture, 16 tokens each."""
    texts = [HEADER + "Here is the first:", TEXTS[1], HEADER + "###\n1. Instruction:", TEXTS[3]]
    expected = [reference(real, text, 16) for text in texts]
    async with started("smollm2") as backend:
        mixed = whole(await backend.complete([prompt(text, max_tokens=16) for text in texts]))
        alone = whole(await backend.complete([prompt(texts[0], max_tokens=16)]))
    assert [answer.text for answer in mixed] == expected
    assert alone[0].text == expected[0]
    assert mixed[1].text.startswith(" Paris")


async def test_a_seed_gives_the_same_answer_in_any_company(tiny: Path) -> None:
    """Sampling depends on prompt and seed; another seed gives another answer."""
    sampled: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}
    async with started(tiny, max_in_flight=4) as backend:
        prompts = [prompt(text, seed=7, **sampled) for text in TEXTS]
        together = whole(await backend.complete(prompts))
        alone = [whole(await backend.complete([p]))[0] for p in prompts]
        other = whole(await backend.complete([prompt(TEXTS[0], seed=8, **sampled)]))
    assert [a.text for a in together] == [a.text for a in alone]
    assert other[0].text != together[0].text


@pytest.mark.slow
@pytest.mark.usefixtures("loaded_once")
async def test_how_an_answer_ends(real: Loaded) -> None:
    """Stop strings, the end-of-text token, its prohibition and the token limit, with usage."""
    async with started("smollm2") as backend:
        counting, ended, forbidden, cut = whole(
            await backend.complete(
                [
                    prompt("1, 2, 3, 4,", stop=(" 7", "9")),
                    prompt("Say hi.", api="chat", max_tokens=40),
                    prompt("Say hi.", api="chat", max_tokens=40, forbid_eos=True),
                    prompt("Once upon a time", max_tokens=5),
                ]
            )
        )
        assert await backend.count_tokens(["1, 2, 3, 4,", ""]) == [11, 0]
    assert (counting.text, counting.finish_reason) == (" 5, 6,", "stop")
    assert ended.finish_reason == "stop"
    assert "<|im_end|>" not in ended.text
    assert forbidden.finish_reason == "length"
    assert forbidden.usage.completion_tokens == 40 > ended.usage.completion_tokens
    assert forbidden.text.startswith(ended.text)
    assert (cut.finish_reason, cut.usage.completion_tokens) == ("length", 5)
    assert cut.usage.prompt_tokens == 4
    assert cut.ttft_s is not None
    assert 0 < cut.ttft_s <= cut.latency_s


# Rows come and go


async def test_more_prompts_than_rows(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place that gets free is taken at the next step, and never are more rows active."""
    seen: list[int] = []
    step = ContinuousBatch._step

    def counted(self: ContinuousBatch) -> None:
        seen.append(len(self._active))
        step(self)

    monkeypatch.setattr(ContinuousBatch, "_step", counted)
    lengths = [3, 9, 5, 12, 4, 7, 6, 8, 5, 10]
    async with started(tiny, max_in_flight=3) as backend:
        answers = await asyncio.gather(
            *(backend.complete([prompt(TEXTS[1], max_tokens=n, stop=())]) for n in lengths)
        )
    assert [a.usage.completion_tokens for [a] in map(whole, answers)] == lengths
    assert max(seen) == 3
    # No barrier: 69 tokens in three rows take 23 steps where none is ever idle.
    assert len(seen) <= 30


async def test_a_cancelled_request_frees_its_row(tiny: Path) -> None:
    """With one row, a second request is answered although the first would take for ever."""
    async with started(tiny, max_in_flight=1) as backend:
        first = asyncio.ensure_future(
            backend.complete([prompt(TEXTS[1], max_tokens=490, forbid_eos=True)])
        )
        await asyncio.sleep(0)
        second = asyncio.ensure_future(backend.complete([prompt(TEXTS[3], max_tokens=2)]))
        await asyncio.sleep(0)
        first.cancel()
        assert whole(await second)[0].usage.completion_tokens == 2
        assert first.cancelled()


async def test_tokens_in_the_making_and_what_is_given_up(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are counted as they are made. At a stop, a row that can be finished in time is, and
    one that cannot, or has not begun, fails at once and makes room.
    """
    step = ContinuousBatch._step

    def slow(self: ContinuousBatch) -> None:
        time.sleep(0.02)
        step(self)

    monkeypatch.setattr(ContinuousBatch, "_step", slow)
    async with started(tiny, max_in_flight=2) as backend:
        assert isinstance(backend, Making)
        assert isinstance(backend, GivesUp)
        assert backend.give_up(1.0) == (0, 0.0)

        def ask(max_tokens: int) -> asyncio.Future[list[Completion | BaseException]]:
            asked = prompt(TEXTS[1], max_tokens=max_tokens, forbid_eos=True, stop=())
            return asyncio.ensure_future(backend.complete([asked]))

        short, long = ask(60), ask(490)
        while backend.tokens_in_the_making < 4:  # noqa: ASYNC110 - made in another thread
            await asyncio.sleep(0.01)
        waiting = ask(3)
        seen = [4]
        while seen[-1] < 20:
            await asyncio.sleep(0.01)
            seen.append(backend.tokens_in_the_making)
        assert seen == sorted(seen)
        assert not short.done()
        dropped, seconds = backend.give_up(5.0)
        assert dropped == 2
        assert 0.1 < seconds < 5.0
        for answers in (await long, await waiting):
            assert verdict(answers[0]).kind == "fatal"
            assert isinstance(verdict(answers[0]).error, StoppedError)
        assert whole(await short)[0].usage.completion_tokens == 60
        assert backend.tokens_in_the_making == 0


async def test_closing_drops_what_is_under_way(tiny: Path) -> None:
    """``aclose`` does not wait for long answers, may be called twice, and before ``start``."""
    backend = TransformersBackend(str(tiny), device="cpu")
    await backend.aclose()
    await backend.start()
    long = asyncio.ensure_future(backend.complete([prompt(TEXTS[1], max_tokens=490)]))
    await asyncio.sleep(0)
    await backend.aclose()
    await backend.aclose()
    assert not long.done()
    long.cancel()


async def test_the_common_header_is_computed_once(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts cost their own tokens and one header, not a header each."""
    fed: list[int] = []
    forward = ContinuousBatch._forward

    def counted(self: ContinuousBatch, ids: list[int], *rest: Any) -> torch.Tensor:
        fed.append(len(ids))
        return forward(self, ids, *rest)

    monkeypatch.setattr(ContinuousBatch, "_forward", counted)
    texts = [HEADER + f"{number}" for number in range(10, 26)]
    async with started(tiny, max_in_flight=4) as backend:
        await backend.complete([prompt(text, max_tokens=2) for text in texts])
        lengths = await backend.count_tokens([*texts, HEADER])
    assert lengths is not None
    header = lengths.pop()
    own = sum(length - header for length in lengths)
    # Two tokens a row, of which the first comes with the prompt; a token of tolerance at the seam.
    assert sum(fed) <= header + own + 3 * len(texts)
    assert sum(fed) < sum(lengths) / 3


async def test_rows_wait_for_memory(tiny: Path) -> None:
    """Rows are admitted while their whole length fits; the rest wait, and all are answered."""
    loaded = load(str(tiny), CPU)
    engine = ContinuousBatch(loaded.model, loaded.tokenizer, (2,), CPU, 8, 500, 64)
    assert engine.longest == 125
    active: list[int] = []
    done = asyncio.Event()
    loop = asyncio.get_running_loop()
    results: list[Any] = []

    def finished(result: object) -> None:
        active.append(len(engine._active))
        results.append(result)
        if len(results) == 6:
            loop.call_soon_threadsafe(done.set)

    from engine.backends.local.batching import Request

    engine.start()
    for number in range(6):
        ids = loaded.tokenizer(f"{number} and so on").input_ids
        sampling = Sampling(max_tokens=100, temperature=0, forbid_eos=True)
        engine.submit(Request(ids, sampling, finished, loop.time))
    await done.wait()
    engine.close()
    assert {result.completion_tokens for result in results} == {100}
    assert max(active) <= 4  # a lane of four rows of 105 tokens leaves no room for another lane


# What cannot be answered


async def test_fault_031_an_overlong_prompt_is_an_overflow(tiny: Path) -> None:
    """The verdict states both numbers; the others in the call are answered."""
    async with started(tiny) as backend:
        long, fine, empty = await backend.complete(
            [prompt("word " * 600), prompt(TEXTS[1], max_tokens=2), prompt("")]
        )
    whole([fine])
    assert verdict(long).kind == "overflow"
    assert (verdict(long).context_length, verdict(long).prompt_tokens) == (512, 601)
    assert verdict(empty).reason == "empty_prompt"


async def test_a_model_without_a_chat_template(tmp_path: Path, smollm2: Path) -> None:
    """Chat prompts stop the run with the flag that helps."""
    folder = save_llama(tmp_path / "plain", smollm2)
    (folder / "chat_template.jinja").unlink()
    async with started(folder) as backend:
        with pytest.raises(Failure) as caught:
            await backend.complete([prompt("Hi", api="chat")])
    assert isinstance(caught.value.verdict.error, ConfigError)
    assert "--api completions" in str(caught.value.verdict.error)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("missing", "no model at"),
        ("empty", "cannot open model"),
        ("cut", "cannot open model"),
        ("noise", "cannot open model"),
        ("pickle", "cannot open model"),
        ("fewer_layers", "lacks weights"),
        ("state_space", "--backend vllm"),
    ],
)
async def test_models_that_cannot_be_opened(
    tmp_path: Path, tiny: Path, smollm2: Path, fault: str, says: str
) -> None:
    """Each is one line with exit code 78; pickled weights are never opened."""
    folder = tmp_path / "model"
    weights = folder / "model.safetensors"
    if fault == "empty":
        folder.mkdir()
    elif fault == "state_space":
        from transformers import MambaConfig, MambaForCausalLM

        sizes: Any = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "state_size": 4}
        MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(smollm2 / name, folder)
    elif fault != "missing":
        shutil.copytree(tiny, folder)
    if fault == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif fault == "noise":
        weights.write_bytes(random.Random(0).randbytes(4000))
    elif fault == "pickle":
        weights.unlink()
        torch.save({"model.norm.weight": torch.ones(48)}, folder / "pytorch_model.bin")
    elif fault == "fewer_layers":
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(
            config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
        )
    with pytest.raises(ConfigError, match=says) as caught:
        await TransformersBackend(str(folder), device="cpu").start()
    assert caught.value.exit_code == 78
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        SafetensorError("I/O error: Cannot allocate memory (os error 12)"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_no_memory_while_loading(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """However it is told, it is one line with exit code 69."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("engine.backends.local.backend.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(UnavailableError, match="choose a smaller model") as caught:
        await TransformersBackend(str(tiny), device="cpu").start()
    assert caught.value.exit_code == 69
    assert "\n" not in str(caught.value)


async def test_no_memory_while_generating(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's error becomes exit code 69 with a way out, for this and later requests."""

    def forward(*_: object) -> torch.Tensor:
        return torch.empty(1 << 56)

    monkeypatch.setattr(ContinuousBatch, "_forward", forward)
    async with started(tiny) as backend:
        for _ in range(2):
            [answer] = await backend.complete([prompt("Hi")])
            error = verdict(answer).error
            assert isinstance(error, UnavailableError)
            assert "--max-in-flight" in str(error)


async def test_a_bug_in_the_engine_is_no_hang(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the engine's thread, everyone who waits learns of it."""
    monkeypatch.setattr(ContinuousBatch, "_step", lambda self: self.nonsense)
    async with started(tiny) as backend:
        [answer] = await backend.complete([prompt("Hi")])
    error = verdict(answer).error
    assert type(error) is WoolmillError
    assert "nonsense" in str(error)


def test_unknown_devices_and_precisions() -> None:
    """One line with what there is."""
    with pytest.raises(ConfigError, match="use cpu, cuda"):
        TransformersBackend("smollm2", device="gpu")
    with pytest.raises(ConfigError, match="float32, float16, bfloat16"):
        load("Qwen/any", CPU, "fp8")


# Runs


class Interrupting(SilentDisplay):
    """Sends Ctrl-C once tokens are being made, and keeps what is said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def refresh(self, progress: Progress, pool: Pool) -> None:
        if progress.tokens_in_the_making and not progress.draining:
            os.kill(os.getpid(), signal.SIGINT)

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.mark.parametrize(
    ("drain_timeout_s", "answered", "said"),
    [
        (60.0, 4, "SIGINT: sending nothing more (once more to leave at once)"),
        (0.1, 0, "giving up 4 unfinished answers (they cost nothing)"),
    ],
    ids=["time enough", "too little time"],
)
async def test_ctrl_c_ends_what_can_be_ended_or_gives_it_up(
    tmp_path: Path,
    smollm2: Path,
    monkeypatch: pytest.MonkeyPatch,
    drain_timeout_s: float,
    answered: int,
    said: str,
) -> None:
    """Rows that fit the drain time are finished and kept; others are dropped at once, and the
    person is told.
    """
    step = ContinuousBatch._step

    def slow(self: ContinuousBatch) -> None:
        time.sleep(0.02)
        step(self)

    monkeypatch.setattr(ContinuousBatch, "_step", slow)
    model = save_llama(tmp_path / "model", smollm2, max_position_embeddings=2048)
    config = RunConfig(
        backend="transformers", model=str(model), max_tokens=60, max_in_flight=4, target=1000,
        semantic=False, out=tmp_path / "run", drain_timeout_s=drain_timeout_s,
    )  # fmt: skip
    display = Interrupting()
    result = await generate(config, display)
    assert result.stop.signum == signal.SIGINT
    assert result.progress.answered == answered
    assert result.progress.sent == 4
    assert display.notes[-1] == said
    with RunStore.read(tmp_path / "run") as run:
        told = figures(run)
    assert (told["responses"], told["dropped_at_a_stop"]) == (answered, 4 - answered)


@pytest.mark.usefixtures("loaded_once")
async def test_a_chat_is_begun_by_its_own_last_turn(real: Loaded) -> None:
    """The answer goes on with it; a stop token ends it."""
    turns = (
        Message(role="system", content="You know geography."),
        Message(role="user", content="What is the capital of France?"),
        Message(role="assistant", content="The capital of France is"),
    )
    (paris,) = real.tokenizer(" Paris").input_ids
    for ids, wanted in [((), " Paris"), ((paris,), "")]:
        sampling = Sampling(max_tokens=4, temperature=0, extra={"stop_token_ids": ids})
        chat = Prompt(index=0, messages=turns, api="chat", sampling=sampling)
        async with started("smollm2") as backend:
            (answer,) = whole(await backend.complete([chat]))
        assert answer.text.startswith(wanted)
        assert bool(answer.text) is bool(wanted)


@pytest.mark.usefixtures("loaded_once")
async def test_what_is_not_heeded_is_said_once() -> None:
    form = {"type": "json_schema", "json_schema": {"schema": {}}}
    said: list[str] = []
    async with started("smollm2") as backend:
        backend.on_lesson = said.append
        for _ in range(2):
            extra = {"response_format": form, "logit_bias": {}, "top_k": 5}
            await backend.complete([prompt("One", max_tokens=1, extra=extra)])
        with pytest.raises(Failure) as failed:
            await backend.complete([prompt("One", extra={"top_k": "many"})])
    assert said == [
        "it has no logit_bias, which is left out; answers differ",
        "it cannot constrain answers to a form; they are checked, and may not fit",
    ]
    assert failed.value.verdict.kind == "settings"
    assert "top_k cannot be 'many'" in str(failed.value.verdict.error)
