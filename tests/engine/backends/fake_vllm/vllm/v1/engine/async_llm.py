"""The engine that echoes."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine.backends.scripted import alpaca_text

from .exceptions import EngineDeadError


class Tokenizer:
    """A token is a character."""

    chat_template = "yes"

    def __call__(self, text: Any, **_: Any) -> Any:
        ids = (
            [ord(c) for c in text] if isinstance(text, str) else [[ord(c) for c in t] for t in text]
        )
        return SimpleNamespace(input_ids=ids)

    def apply_chat_template(
        self, turns: Any, *, continue_final_message: bool = False, **_: Any
    ) -> str:
        text = f"<{'|'.join(turn['content'] for turn in turns)}>"
        return text.removesuffix(">") if continue_final_message else text


class AsyncLLM:
    """vLLM's asynchronous engine, with a worker process as it has one."""

    def __init__(self, args: Any, stat_loggers: list[Any]) -> None:
        self._loggers = [factory(None, 0) for factory in stat_loggers]
        self.model_config = SimpleNamespace(max_model_len=args.max_model_len)
        # It holds the marker open for as long as it lives; see the tests that look for leftovers.
        sleep = "import time, sys; f = open(sys.argv[1], 'w'); time.sleep(600)"
        marker = Path(args.model) / "worker"
        self._worker = subprocess.Popen([sys.executable, "-c", sleep, str(marker)])

    @classmethod
    def from_engine_args(cls, args: Any, stat_loggers: list[Any]) -> "AsyncLLM":
        if args.dtype == "memory":
            _log("EngineCore: torch.OutOfMemoryError: CUDA out of memory. Tried 9 GiB")
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        if args.dtype == "exit":
            _log("ValueError: no such quantization")
            os._exit(3)
        if args.dtype == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return cls(args, stat_loggers)

    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer()

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        text = "".join(map(chr, prompt["prompt_token_ids"]))
        await asyncio.sleep(0)
        if text == "step by step":
            for logger in self._loggers * 3:
                logger.record(None, SimpleNamespace(num_generation_tokens=1), engine_idx=0)
                await asyncio.sleep(0.6)
        if text == "slow":
            await asyncio.get_running_loop().create_future()
        elif text == "boom":
            raise ValueError("bad request")
        elif text == "dead":
            raise EngineDeadError
        elif text.startswith("die once in "):
            _die_once(Path(text.removeprefix("die once in ")))
        elif text == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = repr(params) if text == "parameters" else text.upper()
        reason = "abort" if text == "abort" else "stop"
        if text.rstrip().endswith("Instruction:"):
            await asyncio.sleep(0.2)
            answer = alpaca_text(text, seed=params.seed)
        output = SimpleNamespace(text=answer, finish_reason=reason, token_ids=[1, 2, 3])
        yield SimpleNamespace(
            outputs=[output], metrics=SimpleNamespace(first_token_latency=0.25), prompt=params
        )

    def shutdown(self) -> None:
        self._worker.kill()
        self._worker.wait()


def _log(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _die_once(marker: Path) -> None:
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
