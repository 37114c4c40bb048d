"""vLLM's asynchronous engine as a process of its own: prompts come in on stdin, answers go out on
stdout.

A program, not a module to import: ``process.py`` starts it, maybe with the interpreter of another
environment, so it needs vLLM and the standard library, and of woolmill one file beside it.

Messages are frames, as ``engine/processes/frames.py`` has them, without a body:

    in   {"start": {engine arguments}}                       first
         {"id", "text", "chat", "special_tokens", "template": {for the chat template},
          "sampling": {…}, "structured": {…}}                a prompt
         {"id", "texts"}                                     count tokens
         {"cancel": id} · {"close": true}
    out  {"ready": {"context_length"}} or {"refused", "memory"}
         {"id", "text", "finish_reason", "prompt_tokens", "completion_tokens", "ttft_s",
          "in_the_making"}
         {"id", "tokens"} · {"id", "overflow", "context_length"} · {"id", "error"}
         {"id", "setting"}                                   sampling that no request can have
         {"in_the_making"}                                   tokens of unfinished answers

End of stdin means that the parent is gone, however that came about: the whole process group, the
engine's own workers included, is killed at once. What vLLM prints goes to stderr.
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import importlib.util
import inspect
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NoReturn

TELL_S = 0.5
"""How often the tokens in the making are told."""
OLDEST = (0, 14)
"""Older versions run code that comes with a model although told not to (CVE-2026-22807)."""


def load(path: Path) -> ModuleType:
    """The module in a file whose package this environment need not have."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


frames = load(Path(__file__).parents[2] / "processes" / "frames.py")


class Statistics:
    """What vLLM calls with its own counts after each step: vllm/v1/metrics/loggers.py, where their
    fields are said not to be stable, so nothing depends on them.
    """

    def __init__(self, made: Callable[[int], None]) -> None:
        self._made = made

    def record(
        self, scheduler_stats: Any = None, iteration_stats: Any = None, *_: Any, **__: Any
    ) -> None:
        """After a step."""
        if tokens := getattr(iteration_stats, "num_generation_tokens", 0):
            self._made(tokens)

    def log(self) -> None:
        """Nothing to log."""

    def log_engine_initialized(self) -> None:
        """Nothing to log."""


class Engine:
    """The engine, and the requests that it works on."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._llm: Any = None
        self._tokenizer: Any = None
        self._context_length = 0
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._made = 0
        """Tokens of answers that are not finished."""
        self._told_s = 0.0

    def say(self, message: dict[str, Any]) -> None:
        """Send one message."""
        self._out.writelines(frames.frame(json.dumps(message).encode()))
        self._out.flush()

    async def start(self, arguments: dict[str, Any]) -> bool:
        """Load the model; False, with the reason sent, where that cannot be."""
        try:
            import vllm
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            known = [field.name for field in dataclasses.fields(AsyncEngineArgs)]
            for name in arguments:
                if name not in known:
                    near = difflib.get_close_matches(name, known, n=1)
                    hint = f"; did you mean {near[0]}?" if near else ""
                    raise ValueError(f"vLLM {vllm.__version__} has no argument {name!r}{hint}")
            if (0, 0) < vllm.__version_tuple__[:2] < OLDEST:
                raise ValueError(f"vLLM {vllm.__version__} is older than 0.14")
            self._llm = AsyncLLM.from_engine_args(
                AsyncEngineArgs(**arguments), stat_loggers=[lambda *_, **__: Statistics(self.made)]
            )
            tokenizer = self._llm.get_tokenizer()  # a coroutine in older versions
            self._tokenizer = await tokenizer if inspect.isawaitable(tokenizer) else tokenizer
            self._context_length = self._llm.model_config.max_model_len
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises, the parent must know
            self.say({"refused": f"{type(error).__name__}: {error}"})
            return False
        self.say({"ready": {"context_length": self._context_length}})
        return True

    def made(self, tokens: int) -> None:
        """The engine has made so many tokens more."""
        self._made += tokens
        now_s = time.monotonic()
        if now_s - self._told_s >= TELL_S:
            self._told_s = now_s
            self.say({"in_the_making": self._made})

    def finished(self, task: asyncio.Task[None], request: int) -> None:
        """Forget a request. What was made of those that were cancelled is not known one by one."""
        self._tasks.pop(request, None)
        if not self._tasks and self._made:
            self._made = 0
            self.say({"in_the_making": 0})

    def take(self, message: dict[str, Any]) -> None:
        """Begin what a message asks for."""
        if "cancel" in message:
            if task := self._tasks.get(message["cancel"]):
                task.cancel()
        elif "texts" in message:
            encoded = self._tokenizer(message["texts"]).input_ids
            self.say({"id": message["id"], "tokens": [len(ids) for ids in encoded]})
        else:
            task = asyncio.get_running_loop().create_task(self._answer(message))
            self._tasks[message["id"]] = task
            task.add_done_callback(partial(self.finished, request=message["id"]))

    async def _answer(self, message: dict[str, Any]) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        request = message["id"]
        try:
            ids = self._encode(message)
            wanted = message["sampling"]["max_tokens"]
            if len(ids) + wanted > self._context_length:
                limit = self._context_length
                self.say({"id": request, "overflow": len(ids), "context_length": limit})
                return
            parameters = sampled(message["sampling"], message["structured"])
            answers = self._llm.generate({"prompt_token_ids": ids}, parameters, str(request))
            (answer,) = [answer async for answer in answers]
            output, metrics = answer.outputs[0], answer.metrics
            self._made = max(0, self._made - len(output.token_ids))
            self.say(
                {
                    "id": request,
                    "text": output.text,
                    "finish_reason": output.finish_reason,
                    "prompt_tokens": len(ids),
                    "completion_tokens": len(output.token_ids),
                    "ttft_s": metrics.first_token_latency if metrics else None,
                    "in_the_making": self._made,
                }
            )
        except EngineDeadError:
            # The parent starts another and sends its requests again.
            os._exit(1)
        except SamplingError as error:
            self.say({"id": request, "setting": str(error)})
        except Exception as error:  # noqa: BLE001 - one bad request must not end the others
            # A schema that no grammar can be made of is refused when the engine takes the request.
            refused = isinstance(error, ValueError) and message["structured"]
            said = "setting" if refused else "error"
            self.say({"id": request, said: f"{type(error).__name__}: {error}"})

    def _encode(self, message: dict[str, Any]) -> list[int]:
        """Token ids of a prompt's text, or of the turns of its chat in the model's own template. An
        assistant's turn at the end is gone on with.
        """
        text, chat = message["text"], message["chat"]
        if chat is not None:
            if not self._tokenizer.chat_template:
                raise ValueError("the model has no chat template; use --api completions")
            begun = chat[-1]["role"] == "assistant"
            text = self._tokenizer.apply_chat_template(
                chat,
                add_generation_prompt=not begun,
                continue_final_message=begun,
                tokenize=False,
                **message["template"],
            )
        ids: list[int] = self._tokenizer(
            text, add_special_tokens=message["special_tokens"]
        ).input_ids
        return ids

    def stop(self) -> None:
        """Shut the engine down in order."""
        self._llm.shutdown()


class SamplingError(Exception):
    """vLLM does not sample so, whatever the prompt."""


def sampled(wanted: dict[str, Any], structured: dict[str, Any]) -> Any:
    """vLLM's parameters of a request. Raises SamplingError."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    known = inspect.signature(SamplingParams).parameters
    if unknown := sorted(wanted.keys() - known.keys()):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SamplingError(f"it has no {unknown[0]!r}{hint}")
    try:
        if structured:
            wanted = wanted | {"structured_outputs": StructuredOutputsParams(**structured)}
        return SamplingParams(**wanted, output_kind=RequestOutputKind.FINAL_ONLY)
    except (TypeError, ValueError) as error:
        raise SamplingError(str(error)) from error


def read_messages(
    source: BinaryIO, loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[dict[str, Any]]
) -> None:
    """Pass on what arrives, in a thread that notices the end even when the loop is stuck."""
    while (message := frames.read_frame(source)) is not None:
        loop.call_soon_threadsafe(inbox.put_nowait, json.loads(message.head))
    os.killpg(os.getpgrp(), signal.SIGKILL)


async def serve(source: BinaryIO, out: BinaryIO) -> int:
    """Work until told to close; the exit status."""
    inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()  # messages; the parent bounds them
    arguments = (source, asyncio.get_running_loop(), inbox)
    threading.Thread(target=read_messages, args=arguments, daemon=True).start()
    engine = Engine(out)
    if not await engine.start((await inbox.get())["start"]):
        return 1
    while "close" not in (message := await inbox.get()):
        engine.take(message)
    engine.stop()
    return 0


def main() -> NoReturn:
    """Keep the pipes to ourselves and run."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # what is killed at the end must not be somebody else's
    source, out = frames.keep_pipes()
    code = asyncio.run(serve(source, out))
    sys.stderr.flush()
    os._exit(code)  # without waiting for the thread that reads


if __name__ == "__main__":
    main()
