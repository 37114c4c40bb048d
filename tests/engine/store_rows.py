"""Rows to fill a run store with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.records import Answer, Completion, Decision, Neighbour, Prompt, Record, Sampling, Usage
from engine.store import Manifest, RunStore

__all__ = ["MANIFEST", "answer", "decision", "fill", "prompt"]

MANIFEST = Manifest(
    fixed={"recipe": "alpaca", "model": "m", "sampling": {"temperature": 1.0, "stop": ["a"]}},
    decision={"rouge_threshold": 0.7},
    free={"endpoints": ["http://127.0.0.1:1"]},
    engine_version="0.1.0",
)


def prompt(index: int) -> Prompt:
    return Prompt(
        index=index,
        text=f"prompt {index}",
        api="completions",
        sampling=Sampling(max_tokens=10),
        demonstrations=("seed_1", "seed_2"),
    )


def answer(index: int, text: str = "hello") -> Answer:
    usage = Usage(prompt_tokens=7, completion_tokens=3)
    completion = Completion(text=text, finish_reason="stop", usage=usage, model="m-1", ttft_s=0.5)
    return Answer(index=index, demonstrations=("seed_1",), completion=completion, backend="b")


def decision(index: int, position: int, reason: str | None = None) -> Decision:
    return Decision(
        index=index,
        position=position,
        reason=reason,
        record=Record(instruction=f"do {index}.{position}", input="", output="done"),
        nearest=Neighbour(text="do it", score=0.5, source="seed:1"),
        most_similar={"do it": 0.5},
        mean_similarity=0.25,
    )


async def fill(folder: Path, requests: int, *, undecided: int = 0) -> None:
    """A run of ``requests`` requests, two decisions each but for the last ``undecided``."""
    store = RunStore.open(folder, MANIFEST)
    prompts = [prompt(i) for i in range(requests)]
    await store.sent(prompts, "m")
    await store.answered([answer(i) for i in range(requests)])
    for i in range(requests - undecided):
        vector = np.full(4, i, np.float32)
        pair = [decision(i, 0), decision(i, 1, "rouge_l")]
        await store.decided(pair, [vector, None])
    await store.aclose()
