"""As much of vLLM as the engine's child process touches, with an engine that echoes.

A prompt tells the engine what to do: ``slow`` never ends, ``boom`` raises, ``die`` kills the
process, ``die once in FILE`` does so when FILE is not there yet, ``dead`` reports a dead engine,
``abort`` an aborted request. Alpaca's prompt is answered after a while with records. All else is
echoed in capitals.
"""

from dataclasses import dataclass
from typing import Any

__version__ = "0.99.0"
__version_tuple__ = (0, 99, 0)


@dataclass
class SamplingParams:
    """What a request samples by."""

    output_kind: Any
    max_tokens: int
    temperature: float
    top_p: float
    stop: list[str]
    seed: int | None
    ignore_eos: bool
    top_k: int = 0
    presence_penalty: float = 0.0
    structured_outputs: Any = None
