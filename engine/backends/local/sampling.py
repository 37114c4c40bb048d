"""Choose the next token of each row, and tell where its text must end.

The choice: one uniform number a token, drawn from the request's own generator and looked up in the
cumulative distribution. A row's draws so depend on its seed and its own length alone, not on what
else is in the batch, and cost one number where Gumbel noise would cost one for each token known.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.records import Sampling

__all__ = ["KNOWN", "Draw", "Extra", "StopText", "Tokenizer", "choose"]

_NUCLEUS = (64, 1024)
"""Tokens that are tried first as the nucleus: nearly always few are enough, and sorting the whole
vocabulary for each row would cost more than the model."""


class Tokenizer(Protocol):
    """What is needed of transformers' tokenizers here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """What a request may sample by beyond ``Sampling``'s own fields; names and meanings are vLLM's
    (and so OpenAI's and transformers').
    """

    presence_penalty: float = 0.0
    """Taken off the score of each token that the answer has already."""
    frequency_penalty: float = 0.0
    """Taken off for each time that it has it."""
    repetition_penalty: float = 1.0
    """Divides positive scores, and multiplies negative ones, of tokens of prompt and answer."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0 or less: all."""
    min_p: float = 0.0
    """Only tokens of at least this share of the likeliest one's probability."""
    stop_token_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, sampling: Sampling) -> Extra:
        """Raises ValueError, with the field, for a value that is none."""
        given: dict[str, Any] = {}
        for name in KNOWN & sampling.extra.keys():
            value = sampling.extra[name]
            if name == "stop_token_ids":
                fits = isinstance(value, (list, tuple)) and all(type(id) is int for id in value)
                given[name] = tuple(value) if fits else None
            else:
                fits = type(value) is int or (type(value) is float and name != "top_k")
                fits = fits and not (name == "repetition_penalty" and value <= 0)
            if not fits:
                raise ValueError(f"{name} cannot be {value!r}")
            given.setdefault(name, value)
        return cls(**given)

    @property
    def penalises(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1


KNOWN = frozenset(field.name for field in fields(Extra))
"""Further fields of a request that are heeded here."""


@dataclass(slots=True)
class Draw:
    """How one row samples: its request's parameters and its own stream of uniform numbers."""

    sampling: Sampling
    uniform: random.Random
    extra: Extra = Extra()
    prompt: frozenset[int] = frozenset()
    """Tokens of the prompt."""
    made: Counter[int] = field(default_factory=Counter)
    """How often the answer has which token; kept only where it is penalised."""

    @classmethod
    def of(cls, sampling: Sampling, prompt: Sequence[int] = ()) -> Draw:
        """The draws of a request; without a seed they differ from run to run. Raises ValueError as
        ``Extra.of`` does.
        """
        extra = Extra.of(sampling)
        seen = frozenset(prompt) if extra.repetition_penalty != 1 else frozenset[int]()
        return cls(sampling, random.Random(sampling.seed), extra, seen)

    def next(self) -> float:
        """A number in [0, 1), and below 1 also after rounding to single precision."""
        return min(self.uniform.random(), 1 - 2**-23)

    def took(self, token: int) -> None:
        """The row has one token more."""
        if self.extra.penalises:
            self.made[token] += 1


def choose(logits: Tensor, draws: Sequence[Draw], eos_ids: Sequence[int]) -> list[int]:
    """The next token of each row, from ``logits`` (B, V), which are overwritten."""
    silent = [row for row, draw in enumerate(draws) if draw.sampling.forbid_eos]
    if silent and eos_ids:
        rows = torch.tensor(silent, device=logits.device)[:, None]
        logits[rows, torch.tensor(list(eos_ids), device=logits.device)] = -torch.inf
    for row, draw in enumerate(draws):
        if draw.extra.penalises:
            _penalise(logits[row], draw)
    if all(draw.sampling.temperature == 0 for draw in draws):
        return [int(token) for token in logits.argmax(-1)]

    # A temperature of nearly nothing stands for none, so that greedy rows may share the batch.
    temperature = [max(draw.sampling.temperature, 1e-6) for draw in draws]
    scale = torch.tensor(temperature, device=logits.device, dtype=torch.float32)[:, None]
    weights = (logits.float() / scale).softmax(-1)
    for row, draw in enumerate(draws):
        if draw.sampling.temperature > 0:
            weights[row] = _likeliest(weights[row], draw)
    uniform = [draw.next() if draw.sampling.temperature > 0 else 0.0 for draw in draws]
    cumulative = weights.cumsum(-1)
    wanted = torch.tensor(uniform, device=logits.device, dtype=torch.float32)[:, None]
    # Right: a token of weight 0 is never the first whose cumulative weight exceeds the number.
    tokens = torch.searchsorted(cumulative, wanted * cumulative[:, -1:], right=True)[:, 0].tolist()
    for row, draw in enumerate(draws):
        if draw.sampling.temperature == 0:
            tokens[row] = int(logits[row].argmax())
    return [int(token) for token in tokens]


def _penalise(logits: Tensor, draw: Draw) -> None:
    """Lower the scores (V,) of tokens that were there already, in vLLM's order."""
    extra, device = draw.extra, logits.device
    if extra.repetition_penalty != 1 and (seen := sorted(draw.prompt | draw.made.keys())):
        at = torch.tensor(seen, device=device)
        scores = logits[at]
        penalty = extra.repetition_penalty
        logits[at] = torch.where(scores > 0, scores / penalty, scores * penalty)
    if draw.made and (extra.presence_penalty or extra.frequency_penalty):
        at = torch.tensor(list(draw.made), device=device)
        times = torch.tensor(list(draw.made.values()), device=device, dtype=logits.dtype)
        logits[at] -= extra.frequency_penalty * times + extra.presence_penalty


def _likeliest(weights: Tensor, draw: Draw) -> Tensor:
    """Only the tokens (V,) that the request's limits leave: min_p, then top_k, then top_p."""
    extra = draw.extra
    if extra.min_p > 0:
        weights = weights.where(weights >= extra.min_p * weights.max(), 0.0)
    if 0 < extra.top_k < len(weights):
        kept, tokens = weights.topk(extra.top_k)
        weights = torch.zeros_like(weights).scatter(0, tokens, kept)
    if draw.sampling.top_p < 1:
        if extra.min_p > 0 or extra.top_k > 0:
            weights = weights / weights.sum()
        weights = _nucleus(weights, draw.sampling.top_p)
    return weights


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
