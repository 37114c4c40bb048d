"""vLLM in a child process: as busy as a server, without a server to look after.

The choice: vLLM's asynchronous engine runs in a process of its own (``child.py``) and is fed
over pipes. A crash or an out-of-memory there ends nothing here: the child is started again, up to
three times, and what was in flight is sent again. It may run under the interpreter of another
environment, because vLLM pins what it needs. The child dies with this process, however that ends:
its end of the pipe closes. The price: texts are copied through a pipe, some microseconds a prompt.

Ctrl-C reaches this process alone: the child has a process group of its own and goes on answering
while the run drains.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio

from engine import models
from engine.backends.base import Failure, Verdict
from engine.backends.constraint import CONSTRAINT, Witness, schema_of
from engine.backends.openai.error_body import clean
from engine.backends.vllm.arguments import engine_arguments, has_gpu
from engine.backends.vllm.process import EngineDiedError, EngineProcess
from engine.errors import ConfigError, UnavailableError, WoolmillError
from engine.records import Completion, Prompt, Usage

__all__ = ["VllmBackend"]

log = logging.getLogger(__name__)

_MAX_RESTARTS = 3
"""How often a child that died is started again in one run. One fault may pass; an engine that dies
a fourth time will die again, and each start costs minutes."""


class VllmBackend:
    """The ``Backend`` that runs ``model`` in vLLM on this machine.

    Args:
        model: a fetched name (``smollm2``), a safetensors folder or a hub id.
        python: interpreter of an environment that has vLLM; by default this one.
        max_in_flight: prompts that vLLM works on at once; by default 256 on a GPU, else 32.
        args: vLLM's own engine arguments by name, values as text: ``tensor_parallel_size=2``,
            ``dtype=bfloat16``, ``gpu_memory_utilization=0.8``, ``max_model_len=4096`` …
        log_file: what vLLM prints; by default a temporary file, kept only where vLLM failed.
    """

    def __init__(
        self,
        model: str,
        *,
        python: Path | None = None,
        max_in_flight: int | None = None,
        args: Mapping[str, str] | None = None,
        log_file: Path | None = None,
    ) -> None:
        self.name = "vllm"
        self.model = model
        self.context_length: int | None = None
        self.max_in_flight: int | None = max_in_flight or (256 if has_gpu() else 32)
        self._python = python or Path(sys.executable)
        self._arguments = engine_arguments(args or {})
        self._log_file = log_file
        self.on_lesson: Callable[[str], None] = lambda what: log.warning("vllm: %s", what)
        """Called with what is found out about its answers, in words."""
        self.witness = Witness(lambda what: self.on_lesson(what))
        self._restarts = 0
        self._child: EngineProcess | None = None
        self._reviving = anyio.Lock()

    async def start(self) -> None:
        """Load the model. Raises ConfigError, or UnavailableError where memory does not suffice."""
        arguments = {
            "model": models.locate(self.model),
            "max_num_seqs": self.max_in_flight,
            "enable_prefix_caching": True,
            **self._arguments,
        }
        log.info("starting vLLM for %s", self.model)
        started = time.monotonic()
        self._child = await EngineProcess.spawn(self._python, self._log_file)
        try:
            ready = await self._child.start(arguments)
        except BaseException:  # raised again: a cancelled start leaves no child either
            await self.aclose()
            raise
        self.context_length = int(ready["context_length"])
        log.info("vLLM is up after %.1f s", time.monotonic() - started)

    async def complete(self, prompts: Sequence[Prompt]) -> list[Completion | BaseException]:
        """Answer ``prompts``; those in flight when the child dies are sent to the next one."""
        answers: dict[int, Completion | BaseException] = {}
        while len(answers) < len(prompts):
            child = self._started()
            began = time.monotonic()
            asked = {
                index: child.ask(_message(prompt))
                for index, prompt in enumerate(prompts)
                if index not in answers
            }
            try:
                for index, (_, reply) in asked.items():
                    answers[index] = self._read(await reply, time.monotonic() - began)
            except EngineDiedError as error:
                await self._revive(child, error)
            finally:
                for request, reply in asked.values():
                    child.forget(request, reply)
        for index, prompt in enumerate(prompts):
            self.witness.saw(prompt.sampling.extra, answers[index])
        return [answers[index] for index in range(len(prompts))]

    @property
    def tokens_in_the_making(self) -> int:
        """See ``engine.backends.base.Making``."""
        return self._child.tokens_in_the_making if self._child is not None else 0

    async def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        """Tokens of each text, with the special tokens that a completion's prompt gets."""
        while texts:
            child = self._started()
            request, reply = child.ask({"texts": list(texts)})
            try:
                counts: list[int] = (await reply)["tokens"]
                return counts
            except EngineDiedError as error:
                await self._revive(child, error)
            finally:
                child.forget(request, reply)
        return []

    async def aclose(self) -> None:
        """End the child in order, or by force where that takes too long."""
        child, self._child = self._child, None
        if child is not None:
            with anyio.CancelScope(shield=True):
                await child.close()

    def _started(self) -> EngineProcess:
        if self._child is None:
            raise RuntimeError("the vllm backend is used outside start() and aclose()")
        return self._child

    async def _revive(self, dead: EngineProcess, error: EngineDiedError) -> None:
        """Start the next child, once, however many requests noticed. Raises what is fatal."""
        async with self._reviving:
            if self._child is not dead:
                return
            said = dead.last_error()
            if self._restarts == _MAX_RESTARTS:
                what = UnavailableError(
                    f"vLLM died {_MAX_RESTARTS + 1} times, the last time {error}: {said}; "
                    f"its log is {dead.keep_log()}"
                )
                raise _fatal("engine_died", what) from error
            self._restarts += 1
            log.warning("vLLM died %s (%s): restart %d", error, said, self._restarts)
            await dead.close()
            try:
                await self.start()
            except WoolmillError as failed:
                raise _fatal("engine_died", failed) from failed

    def _read(self, reply: dict[str, Any], latency_s: float) -> Completion | Failure:
        """The child's reply as a completion, or as the failure that a server would answer with."""
        if "overflow" in reply:
            verdict = Verdict(
                kind="overflow",
                reason="context_overflow",
                message=f"the prompt has {reply['overflow']} tokens",
                context_length=reply["context_length"],
                prompt_tokens=reply["overflow"],
            )
            return Failure(verdict)
        if "setting" in reply:
            error = ConfigError(f"vLLM cannot sample so: {clean(reply['setting'])}")
            return Failure(
                Verdict(kind="settings", reason="sampling", message=str(error), error=error)
            )
        if "error" in reply:
            return Failure(Verdict(kind="dead", reason="refused", message=clean(reply["error"])))
        if reply["finish_reason"] in ("abort", "error"):
            reason = f"finish_{reply['finish_reason']}"
            return Failure(Verdict(kind="ambiguous", reason=reason))
        return Completion(
            text=reply["text"],
            finish_reason=reply["finish_reason"],
            usage=Usage(
                prompt_tokens=reply["prompt_tokens"],
                completion_tokens=reply["completion_tokens"],
            ),
            model=self.model,
            latency_s=latency_s,
            ttft_s=reply["ttft_s"],
        )


def _message(prompt: Prompt) -> dict[str, Any]:
    """A prompt as the child wants it; sampling in vLLM's own names, as they go over HTTP."""
    sampling = prompt.sampling
    wanted: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stop": list(sampling.stop),
        "seed": sampling.seed,
        "ignore_eos": sampling.forbid_eos,
        **sampling.extra,
    }
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt.chat]
    message: dict[str, Any] = {
        "text": prompt.text,
        "chat": turns if prompt.api == "chat" else None,
        "special_tokens": wanted.pop("add_special_tokens", prompt.api != "chat"),
        "template": wanted.pop("chat_template_kwargs", {}),
        "structured": _structured(wanted.pop(CONSTRAINT, None)),
    }
    message["structured"] |= wanted.pop("structured_outputs", {})
    return {**message, "sampling": wanted}


def _structured(wanted: Any) -> dict[str, Any]:
    """``response_format`` as vLLM's engine has it; what it does not know, its own words refuse."""
    if wanted is None or wanted == {"type": "text"}:
        return {}
    if (schema := schema_of({CONSTRAINT: wanted})) is not None:
        return {"json": schema}
    return {"json_object": True} if wanted == {"type": "json_object"} else {CONSTRAINT: wanted}


def _fatal(reason: str, error: WoolmillError) -> Failure:
    return Failure(Verdict(kind="fatal", reason=reason, message=str(error), error=error))
