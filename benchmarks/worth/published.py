"""Stanford Alpaca's loop, written from its description (generate_instruction.py and its README).

Batches of five prompts, each with three seed tasks drawn at random; answers cut at ``###``; the
published filters; ROUGE-L F above 0.7 against all seeds and all rows so far, by a loop over the
package ``rouge_score``, as published. The prompt's words, the model and its sampling are those of
the other arms. Answers are kept in a file, so that a loop that was killed goes on with the next.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rouge_score import rouge_scorer

from engine.backends.local.backend import TransformersBackend
from engine.recipes.alpaca import demonstration, header, tail
from engine.records import Completion, Prompt, Sampling, SeedTask

BATCH, SHOWN = 5, 3
SIMILAR = 0.7
BLOCKED = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps",
    "draw", "plot", "go to", "video", "audio", "music", "flowchart", "diagram",
)  # fmt: skip


async def answers(
    path: Path,
    model: str,
    tasks: Sequence[SeedTask],
    sampling: dict[str, Any],
    seed: int,
    most: int,
) -> None:
    """Fill ``path`` with answers, one a line, until they have ``most`` completion tokens."""
    there = kept(path)
    tokens = sum(answer["tokens"] for answer in there)
    if tokens >= most:
        return
    backend = TransformersBackend(model)
    await backend.start()
    draws = _prompts(tasks, sampling, seed)
    for _ in there:
        next(draws)
    try:
        while tokens < most:
            asked = [next(draws) for _ in range(BATCH)]
            for completion in await backend.complete(asked):
                assert isinstance(completion, Completion)
                used = completion.usage.completion_tokens
                told = {"text": completion.text, "tokens": used, "why": completion.finish_reason}
                _keep(path, told)
                tokens += used
    finally:
        await backend.aclose()


def kept(path: Path) -> list[dict[str, Any]]:
    """The answers in ``path``."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _keep(path: Path, answer: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(answer) + "\n")


def _prompts(tasks: Sequence[SeedTask], sampling: dict[str, Any], seed: int) -> Iterator[Prompt]:
    draw, index = random.Random(seed), 0
    while True:
        shown = enumerate(draw.sample(list(tasks), SHOWN), 1)
        parts = [header(), *(demonstration(n, task).render(SHOWN) for n, task in shown)]
        how = Sampling(
            **sampling, stop=("\n20", "20.", "20."), forbid_eos=True, seed=draw.getrandbits(60)
        )
        yield Prompt(
            index=index, text="".join([*parts, tail(SHOWN)]), api="completions", sampling=how
        )
        index += 1


def rows(path: Path, tasks: Sequence[SeedTask]) -> Iterator[dict[str, str]]:
    """What the loop accepts of the answers in ``path``, in their order."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    known = [scorer._tokenizer.tokenize(task.instruction) for task in tasks]
    for answer in kept(path):
        for row in _parsed(answer["text"], cut=answer["why"] == "length"):
            words = scorer._tokenizer.tokenize(row["instruction"])
            scores = (rouge_scorer._score_lcs(words, other).fmeasure for other in known)
            if max(scores) <= SIMILAR:
                known.append(words)
                yield row


def _parsed(text: str, *, cut: bool) -> Iterator[dict[str, str]]:
    pieces = re.split("###", f"{SHOWN + 1}. Instruction:{text}")
    for place, piece in enumerate(pieces):
        if cut and place == len(pieces) - 1:
            continue
        number = place + SHOWN + 1
        parts = re.split(rf"{number}\.\s+(Instruction|Input|Output):", piece)
        if len(parts) != 7:
            continue
        instruction, given, output = (parts[at].strip() for at in (2, 4, 6))
        if _refused(instruction):
            continue
        given = "" if given.lower() == "<noinput>" else given
        yield {"instruction": instruction, "input": given, "output": output}


def _refused(instruction: str) -> bool:
    count = len(instruction.split())
    return (
        count <= 3
        or count > 150
        or any(re.search(rf"\b({word})\b", instruction, re.I) for word in BLOCKED)
        or instruction.startswith("Write a program")
        or instruction[0] in string.punctuation
        or not instruction[0].isascii()
    )
