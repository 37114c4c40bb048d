"""Generate in this process with transformers: the embedded default, and any causal model on a CPU,
CUDA or MPS device.

The choice: transformers brings the model, tokenizer and chat template; batching is our own
(``batching.py``), so that no row waits for another. The backend looks like a server: prompts come
one at a time, are answered as they finish, and cancelling a call frees its rows. Weights are
safetensors or GGUF, never pickles, and code that comes with a model is never run. The price: one
process holds model and engine, and a crash there is a crash of the run (which resumes); ``vllm``
keeps its engine in a child process.

Answers are a function of prompt and seed as far as arithmetic allows: in single precision, sums of
another order move scores by some 1e-5, and a row flips only where two tokens are that close.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import torch
from anyio import to_thread
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from engine import models
from engine.backends.base import GIVEN_UP, Failure, Verdict
from engine.backends.constraint import CONSTRAINT
from engine.backends.local.batching import ContinuousBatch, Finished, Request
from engine.backends.local.kv_cache import ATTENTION, Probe
from engine.backends.local.sampling import KNOWN, Extra
from engine.errors import ConfigError, StoppedError, UnavailableError, WoolmillError
from engine.pretrained import open_pretrained
from engine.records import Completion, Prompt, Sampling, Usage

__all__ = ["Loaded", "TransformersBackend", "load"]

log = logging.getLogger(__name__)

_WRONG_MODEL = (OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError)
"""What transformers raises for a name, a configuration or a file that is no model it can open.
RuntimeError is caught beside these: that is also how memory runs out."""
_ROWS = {"cpu": 32, "cuda": 128, "mps": 16}
"""Rows generated at once, by kind of device, unless ``max_in_flight`` says otherwise; 16 on any
other. Memory may admit fewer."""
_STEP_TOKENS = {"cpu": 512, "cuda": 4096, "mps": 1024}
"""New tokens in one forward pass, at most, by kind of device. More read prompts in fewer passes;
but all rows wait for the pass, so each new prompt would hold up the others for longer."""
TEMPLATE = frozenset(("add_special_tokens", "chat_template_kwargs"))
"""Further fields of a request that say how its prompt becomes tokens."""
_KV_SHARE = 0.5
"""Of the memory that is free once the model is loaded, for keys and values."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, ready: what ``load`` found out about it."""

    model: Any
    tokenizer: Any
    device: torch.device
    context_length: int
    eos_ids: tuple[int, ...]
    kv_bytes_per_token: int


class TransformersBackend:
    """The ``Backend`` that runs ``model`` here.

    Args:
        model: a fetched name (``smollm2``), a safetensors folder, a ``.gguf`` file or a hub id.
        max_in_flight: rows generated at once; by default what suits the device.
        dtype: of the weights, such as ``float32``; by default single precision on a CPU, bfloat16
            on CUDA, float16 on MPS.
        device: such as ``cuda:1``; by default the best there is.
    """

    def __init__(
        self,
        model: str,
        *,
        max_in_flight: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
    ) -> None:
        self.name = "transformers"
        self.model = model
        self.context_length: int | None = None
        self._device = _device(device)
        self._dtype = dtype
        self.max_in_flight: int | None = max_in_flight or _ROWS.get(self._device.type, 16)
        self.on_lesson: Callable[[str], None] = lambda what: log.warning("%s: %s", self.name, what)
        """Called with what it cannot do of what a request asks for, in words."""
        self._unheeded: set[str] = set()
        self._loaded: Loaded | None = None
        self._engine: ContinuousBatch | None = None
        self._open: dict[Request, asyncio.Future[Finished | Exception]] = {}
        """Requests that are not answered yet."""

    async def start(self) -> None:
        """Load the model. Raises ConfigError, or UnavailableError where memory does not suffice."""
        loaded = await to_thread.run_sync(load, self.model, self._device, self._dtype)
        kv_tokens = int(_free_bytes(loaded.device) * _KV_SHARE) // loaded.kv_bytes_per_token
        engine = ContinuousBatch(
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            eos_ids=loaded.eos_ids,
            device=loaded.device,
            rows=self.max_in_flight or 1,
            kv_tokens=kv_tokens,
            step_tokens=_STEP_TOKENS.get(loaded.device.type, 1024),
        )
        engine.start()
        self._loaded, self._engine = loaded, engine
        self.context_length = min(loaded.context_length, engine.longest)

    async def complete(self, prompts: Sequence[Prompt]) -> list[Completion | BaseException]:
        """Answer ``prompts``, each as a row of its own; a failure stands in its prompt's place."""
        loaded, engine = self._started()
        for prompt in prompts:
            self._heed(prompt.sampling)
        encoded = await to_thread.run_sync(_encode, loaded, prompts)
        loop = asyncio.get_running_loop()
        requests: list[Request] = []
        answers: list[asyncio.Future[Finished | Exception]] = []
        for prompt, ids in zip(prompts, encoded, strict=True):
            answer: asyncio.Future[Finished | Exception] = loop.create_future()
            answers.append(answer)
            request = Request(ids, prompt.sampling, _deliver(loop, answer), time.monotonic)
            requests.append(request)
            if (failure := self._misfit(prompt, ids)) is not None:
                answer.set_result(failure)
            else:
                self._open[request] = answer
                engine.submit(request)
        try:
            return [
                self._completion(request, await answer)
                for request, answer in zip(requests, answers, strict=True)
            ]
        finally:
            # Reached early only when cancelled: the rows are not computed on.
            for request in requests:
                request.cancelled = True
                self._open.pop(request, None)

    @property
    def tokens_in_the_making(self) -> int:
        """See ``engine.backends.base.Making``."""
        return sum(request.made for request, answer in self._open.items() if not answer.done())

    def give_up(self, within_s: float) -> tuple[int, float]:
        """See ``engine.backends.base.GivesUp``. A row that ends by itself takes fewer steps than it
        may; how many is not known, and it costs nothing to make it again.
        """
        _, engine = self._started()
        dropped, longest_s = 0, 0.0
        for request, answer in self._open.items():
            if answer.done():
                continue
            needs_s = request.left(engine.step_tokens) * engine.step_s
            if request.begun and engine.step_s and needs_s <= within_s:
                longest_s = max(longest_s, needs_s)
                continue
            request.cancelled = True
            error = StoppedError("the answer was given up when the run stopped")
            answer.set_result(Failure(Verdict(kind="fatal", reason=GIVEN_UP, error=error)))
            dropped += 1
        return dropped, longest_s

    async def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        """Tokens of each text, with the special tokens that a completion's prompt gets."""
        loaded, _ = self._started()

        def count() -> list[int]:
            return [len(ids) for ids in loaded.tokenizer(list(texts)).input_ids]

        return await to_thread.run_sync(count) if texts else []

    async def aclose(self) -> None:
        """Stop after the step now running, and let go of the model."""
        engine, self._engine, self._loaded = self._engine, None, None
        if engine is not None:
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(engine.close)

    def _started(self) -> tuple[Loaded, ContinuousBatch]:
        if self._loaded is None or self._engine is None:
            raise RuntimeError("the transformers backend is used outside start() and aclose()")
        return self._loaded, self._engine

    def _heed(self, sampling: Sampling) -> None:
        """Say, once for each, which fields are not heeded here. Raises Failure for a value that is
        none.
        """
        try:
            Extra.of(sampling)
        except ValueError as exc:
            error = ConfigError(f"the recipe's sampling: {exc}")
            what = Verdict(kind="settings", reason="sampling", message=str(error), error=error)
            raise Failure(what) from exc
        for name in sorted(sampling.extra.keys() - KNOWN - TEMPLATE - self._unheeded):
            self._unheeded.add(name)
            if name == CONSTRAINT:
                lesson = "it cannot constrain answers to a form; they are checked, and may not fit"
            else:
                lesson = f"it has no {name}, which is left out; answers differ"
            self.on_lesson(lesson)

    def _misfit(self, prompt: Prompt, ids: Sequence[int]) -> Failure | None:
        """The overflow that a server would answer with, or None."""
        limit, wanted = self.context_length or 0, prompt.sampling.max_tokens
        if not ids:
            return Failure(
                Verdict(kind="dead", reason="empty_prompt", message="no tokens to go on from")
            )
        if len(ids) + wanted <= limit:
            return None
        message = f"{len(ids)} prompt tokens and {wanted} to generate exceed the context of {limit}"
        return Failure(
            Verdict(
                kind="overflow",
                reason="context_overflow",
                message=message,
                context_length=limit,
                prompt_tokens=len(ids),
            )
        )

    def _completion(self, request: Request, answer: Finished | Exception) -> Completion | Failure:
        if isinstance(answer, Failure):
            return answer
        if isinstance(answer, Exception):
            return _fatal(answer)
        return Completion(
            text=answer.text,
            finish_reason=answer.finish_reason,
            usage=Usage(prompt_tokens=len(request.ids), completion_tokens=answer.completion_tokens),
            model=self.model,
            latency_s=time.monotonic() - request.arrived_s,
            ttft_s=answer.ttft_s,
        )


def load(model: str, device: torch.device, dtype: str | None = None) -> Loaded:
    """Open ``model`` with our attention in it.

    Raises:
        ConfigError: there is no such model, its weights are damaged or incomplete, or its
            architecture does not fit.
        UnavailableError: the memory does not suffice.
    """
    where = models.locate(model)
    path = Path(where)
    source: dict[str, Any] = {"where": where}
    if path.is_file():
        source = {"where": str(path.parent), "gguf_file": path.name}
    precision = _precision(dtype, device)
    log.info("loading %s on %s in %s", model, device, str(precision).removeprefix("torch."))
    started = time.monotonic()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        tokenizer = open_pretrained(AutoTokenizer, **source)
        if path.is_file():
            source["quantization_config"] = GgufConfig(dequantize=True)
        else:
            source["use_safetensors"] = True
        opened: Any = open_pretrained(
            AutoModelForCausalLM,
            **source,
            dtype=precision,
            attn_implementation=ATTENTION,
            output_loading_info=True,
        )
        network, info = opened
        network = network.eval().to(device)
        probe = _probe(network, device)
    except (*_WRONG_MODEL, RuntimeError, MemoryError) as error:
        if _out_of_memory(error):
            raise UnavailableError(
                f"no memory for model {model!r} on {device}; choose a smaller model, or free some"
            ) from error
        raise ConfigError(f"cannot open model {model!r}: {_first_line(error)}") from error
    if lost := sorted(info["missing_keys"]):
        # transformers only warns here, and goes on with random numbers in their place.
        raise ConfigError(f"model {model!r} lacks weights: {lost[0]} and {len(lost) - 1} more")
    layers = network.config.get_text_config().num_hidden_layers
    if probe.unsupported or len(probe.layers) != layers:
        why = " and ".join(sorted(probe.unsupported)) or "layers that are not plain attention"
        raise ConfigError(f"model {model!r} has {why}; use --backend vllm for it")
    log.info("loaded %s in %.1f s", model, time.monotonic() - started)
    return Loaded(
        model=network,
        tokenizer=tokenizer,
        device=device,
        context_length=int(network.config.get_text_config().max_position_embeddings),
        eos_ids=_eos_ids(network, tokenizer),
        kv_bytes_per_token=probe.bytes_per_token,
    )


def _probe(network: Any, device: torch.device) -> Probe:
    """Run one token through, to see that every layer asks our attention and what for."""
    probe = Probe()
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.inference_mode():
        network(input_ids=zero, position_ids=zero, use_cache=False, parts=[(1, probe)])
    return probe


def _encode(loaded: Loaded, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt; chats in the model's own template."""
    if any(prompt.api == "chat" for prompt in prompts) and not loaded.tokenizer.chat_template:
        error = ConfigError("the model has no chat template; use --api completions")
        raise Failure(Verdict(kind="fatal", reason="no_chat_template", error=error))
    encoded: list[list[int]] = []
    for prompt in prompts:
        text, extra = prompt.text, prompt.sampling.extra
        if chat := prompt.api == "chat":
            turns = [{"role": turn.role, "content": turn.content} for turn in prompt.chat]
            try:
                text = loaded.tokenizer.apply_chat_template(
                    turns,
                    add_generation_prompt=not prompt.begun,
                    continue_final_message=prompt.begun,
                    tokenize=False,
                    **extra.get("chat_template_kwargs", {}),
                )
            except Exception as error:  # a template is a program, and a stranger's
                what = ConfigError(f"the model's chat template refuses: {_first_line(error)}")
                raise Failure(
                    Verdict(kind="settings", reason="chat_template", error=what, message=str(what))
                ) from error
        special = bool(extra.get("add_special_tokens", not chat))
        encoded.append(loaded.tokenizer(text, add_special_tokens=special).input_ids)
    return encoded


def _deliver(
    loop: asyncio.AbstractEventLoop, answer: asyncio.Future[Finished | Exception]
) -> Callable[[Finished | Exception], None]:
    """A callback for the engine's thread that settles ``answer`` in ``loop``."""

    def settle(outcome: Finished | Exception) -> None:
        if not answer.done():
            answer.set_result(outcome)

    def deliver(outcome: Finished | Exception) -> None:
        # A loop that is closed already has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, outcome)

    return deliver


def _fatal(error: Exception) -> Failure:
    """The failure of a request whose engine has died of ``error``."""
    if _out_of_memory(error):
        what: WoolmillError = UnavailableError(
            "generation ran out of memory; lower --max-in-flight or --max-tokens, then resume"
        )
        reason = "out_of_memory"
    else:
        what = WoolmillError(f"generation failed: {type(error).__name__}: {_first_line(error)}")
        reason = "engine_died"
    what.__cause__ = error
    return Failure(Verdict(kind="fatal", reason=reason, message=str(what), error=what))


def _out_of_memory(error: BaseException) -> bool:
    """Torch has an exception of its own for devices only; its allocator on the CPU, the kernel and
    safetensors have the words alone: "can't allocate memory", "Cannot allocate memory".
    """
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, (RuntimeError, OSError, SafetensorError))
        and "allocate memory" in str(error)
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _device(name: str | None) -> torch.device:
    if name is not None:
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ConfigError(f"no device {name!r}; use cpu, cuda, cuda:N or mps") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _precision(name: str | None, device: torch.device) -> torch.dtype:
    by_name = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name is None:
        by_device = {"cuda": torch.bfloat16, "mps": torch.float16}
        return by_device.get(device.type, torch.float32)
    if name not in by_name:
        raise ConfigError(f"no dtype {name!r}; use one of: {', '.join(by_name)}")
    return by_name[name]


def _eos_ids(network: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a text, as the model's generation settings and its tokenizer say."""
    said = network.generation_config.eos_token_id
    ids = set(said if isinstance(said, list) else [said]) | {tokenizer.eos_token_id}
    return tuple(sorted(token for token in ids if token is not None))


def _free_bytes(device: torch.device) -> int:
    """Memory that could still be taken on ``device``."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
