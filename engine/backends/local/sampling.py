"""Choose the next token of each row, and tell where its text must end.

The choice: one uniform number a token, drawn from the request's own generator and looked up in the
cumulative distribution. A row's draws so depend on its seed and its own length alone, not on what
else is in the batch, and cost one number where Gumbel noise would cost one for each token known.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.records import Sampling

__all__ = ["Draw", "StopText", "Tokenizer", "choose"]

_NUCLEUS = (64, 1024)
"""Tokens that are tried first as the nucleus: nearly always few are enough, and sorting the whole
vocabulary for each row would cost more than the model."""


class Tokenizer(Protocol):
    """What is needed of transformers' tokenizers here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


@dataclass(slots=True)
class Draw:
    """How one row samples: its request's parameters and its own stream of uniform numbers."""

    sampling: Sampling
    uniform: random.Random

    @classmethod
    def of(cls, sampling: Sampling) -> Draw:
        """The draws of a request; without a seed they differ from run to run."""
        return cls(sampling, random.Random(sampling.seed))

    def next(self) -> float:
        """A number in [0, 1), and below 1 also after rounding to single precision."""
        return min(self.uniform.random(), 1 - 2**-23)


def choose(logits: Tensor, draws: Sequence[Draw], eos_ids: Sequence[int]) -> list[int]:
    """The next token of each row, from ``logits`` (B, V), which are overwritten."""
    silent = [row for row, draw in enumerate(draws) if draw.sampling.forbid_eos]
    if silent and eos_ids:
        rows = torch.tensor(silent, device=logits.device)[:, None]
        logits[rows, torch.tensor(list(eos_ids), device=logits.device)] = -torch.inf
    if all(draw.sampling.temperature == 0 for draw in draws):
        return [int(token) for token in logits.argmax(-1)]

    # A temperature of nearly nothing stands for none, so that greedy rows may share the batch.
    temperature = [max(draw.sampling.temperature, 1e-6) for draw in draws]
    scale = torch.tensor(temperature, device=logits.device, dtype=torch.float32)[:, None]
    weights = (logits.float() / scale).softmax(-1)
    for row, draw in enumerate(draws):
        if draw.sampling.temperature > 0 and draw.sampling.top_p < 1:
            weights[row] = _nucleus(weights[row], draw.sampling.top_p)
    uniform = [draw.next() if draw.sampling.temperature > 0 else 0.0 for draw in draws]
    cumulative = weights.cumsum(-1)
    wanted = torch.tensor(uniform, device=logits.device, dtype=torch.float32)[:, None]
    # Right: a token of weight 0 is never the first whose cumulative weight exceeds the number.
    tokens = torch.searchsorted(cumulative, wanted * cumulative[:, -1:], right=True)[:, 0].tolist()
    for row, draw in enumerate(draws):
        if draw.sampling.temperature == 0:
            tokens[row] = int(logits[row].argmax())
    return [int(token) for token in tokens]


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Only the likeliest tokens that together reach ``top_p``, at least one; (V,)."""
    for count in [*(few for few in _NUCLEUS if few < len(weights)), len(weights)]:
        ordered, tokens = weights.topk(count)
        before = ordered.cumsum(-1) - ordered
        if count == len(weights) or before[-1] >= top_p:
            break
    kept = torch.zeros_like(weights)
    inside = before < top_p
    inside[0] = True
    return kept.scatter(0, tokens[inside], ordered[inside])


class StopText:
    """The text of one row as it grows, cut at the first stop string.

    Text is decoded a few tokens at a time: a token is only final when what follows it is known to
    join on, because a character may take several tokens and some tokenizers decode a leading space
    only within a text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._overlap = max((len(text) for text in self._stop), default=1) - 1
        self._ids: list[int] = []
        self._context = self._read = (
            0  # tokens before _read are in text; those from _context are decoded anew
        )
        self.text = ""

    def add(self, token: int) -> bool:
        """Take one token; True when a stop string is complete: ``text`` then ends before it."""
        self._ids.append(token)
        known = self._decode(self._ids[self._context : self._read])
        whole = self._decode(self._ids[self._context :])
        if len(whole) <= len(known) or whole.endswith("\ufffd"):
            return False
        self._context, self._read = self._read, len(self._ids)
        return self._append(whole[len(known) :])

    def finish(self) -> str:
        """The whole text, unfinished characters included, when nothing more comes."""
        known = self._decode(self._ids[self._context : self._read])
        self._append(self._decode(self._ids[self._context :])[len(known) :])
        return self.text

    def _append(self, new: str) -> bool:
        start = max(0, len(self.text) - self._overlap)
        self.text += new
        found = [at for stop in self._stop if (at := self.text.find(stop, start)) >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
