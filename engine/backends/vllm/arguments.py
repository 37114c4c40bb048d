"""How vLLM is started, whoever starts it: its arguments, its environment, and what its last words
come to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.backends.openai.error_body import clean
from engine.errors import ConfigError, UnavailableError
from engine.files import tail_lines
from engine.processes.children import environment

__all__ = ["child_environment", "engine_arguments", "has_gpu", "last_error", "refusal"]

_ON_A_CPU = {"enforce_eager": True, "enable_chunked_prefill": False}
"""Compiling for a CPU takes minutes, and a compiler. A prompt that is read in parts rewinds its
request's generator, which torch's generators on a CPU cannot: any request with a seed may so end
the engine (vllm/v1/worker/gpu_model_runner.py, ``set_offset``; seen with 0.32)."""
_CODE = "trust_remote_code"
"""vLLM's flag to run code that comes with a model. It is off, and any abbreviation of it is
refused."""


def engine_arguments(args: Mapping[str, str]) -> dict[str, Any]:
    """vLLM's arguments from text: JSON where it is JSON (2, true, 0.8), else the text itself.

    Raises ConfigError for an argument that is refused here.
    """
    arguments: dict[str, Any] = {_CODE: False} | ({} if has_gpu() else _ON_A_CPU)
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
    if not has_gpu():
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
    named = re.compile(r"\b[\w.]*(?:Error|Exception|Killed)\b: .+")
    found = [named.search(line) for line in tail_lines(log_file)]
    said = [match.group() for match in found if match and "core" not in match.group().lower()]
    return clean(said[-1]) if said else ""


def has_gpu() -> bool:
    """Whether a driver of NVIDIA or AMD is there; asking torch would load it."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()
