"""Thoughts that a reasoning model writes into its answer, told from the answer itself.

Servers with a parser for reasoning send the thoughts in a field of their own; the others leave them
before the answer, between the tags of the model's chat template. Where the template opens the tag,
the answer begins with the thought and holds only the closing tag.
"""

from __future__ import annotations

import re
from dataclasses import replace

from engine.records import Completion

__all__ = ["THOUGHTS_ONLY", "is_thoughts_only", "thoughts_apart"]

THOUGHTS_ONLY = "thoughts_only"
"""The reason of an answer whose tokens were all spent on thinking."""
TAGS = {
    "<think>": "</think>",  # DeepSeek-R1, Qwen3, GLM-4.5, MiniMax, SmolLM3, Nemotron
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",  # Gemini's compatible endpoint
    "<reasoning>": "</reasoning>",
    "<reason>": "</reason>",
    "[THINK]": "[/THINK]",  # Magistral
    "<seed:think>": "</seed:think>",  # Seed-OSS
    "◁think▷": "◁/think▷",  # Kimi
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|channel|>analysis<|message|>": "<|channel|>final<|message|>",  # gpt-oss, unparsed
}
"""Opening tags, each with what ends the thought."""
BARE = re.compile(
    "|".join(
        re.escape(TAGS[tag])
        for tag in ("<think>", "[THINK]", "<seed:think>", "◁think▷", "<|START_THINKING|>")
    )
)
"""Ends of thoughts whose opening tag a chat template writes, so that the answer lacks it."""
OPENING = {closing: opening for opening, closing in TAGS.items()}
"""The same the other way round: what opens a thought that ends so."""
SIGNS = ("think>", "THINK", "think▷")
"""Each of the ends above has one of these."""
NOT_BLANK = re.compile(r"\S")
"""Where the text begins, without a copy as ``strip`` would make one."""


def thoughts_apart(completion: Completion) -> Completion:
    """The completion with its leading thoughts moved from ``text`` to ``reasoning``.

    A thought that never ends (the token limit fell into it) leaves no text. Idempotent, and linear
    in the length of the text.
    """
    text, start, thoughts = completion.text, 0, []
    if not any(sign in text for sign in SIGNS) and text.lstrip()[:1] not in ("<", "[", "◁"):
        return completion  # as nearly all: none of the tags can be there
    while (found := _leading_thought(text, start)) is not None:
        thought, start = found
        thoughts.append(thought.strip())
    if not thoughts:
        return completion
    parts = [completion.reasoning, *thoughts]
    return replace(completion, text=text[start:], reasoning="\n\n".join(filter(None, parts)))


def is_thoughts_only(completion: Completion) -> bool:
    """Whether the model thought and never answered; ``completion`` is as ``thoughts_apart`` gives
    it. OpenAI's thoughts are counted and never shown.
    """
    thought = completion.reasoning or completion.usage.reasoning_tokens
    return bool(thought) and not completion.text.strip()


def _leading_thought(text: str, start: int) -> tuple[str, int] | None:
    """The thought that ``text`` has at ``start``, and where it goes on behind it; None: none."""
    first = NOT_BLANK.search(text, start)
    if first is None:
        return None
    for opening, closing in TAGS.items():
        if text.startswith(opening, first.start()):
            begin = first.start() + len(opening)
            end = text.find(closing, begin)
            return (text[begin:], len(text)) if end < 0 else (text[begin:end], end + len(closing))
    bare = BARE.search(text, start)
    if bare is None or text.find(OPENING[bare[0]], start, bare.start()) >= 0:
        return None  # the second: a pair of tags within the answer is its subject
    return text[start : bare.start()], bare.end()
