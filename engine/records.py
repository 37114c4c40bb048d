"""What passes between the stages: one type between two neighbours.

    SeedTask ─▶ Prompt ─▶ Completion ─▶ Record ─▶ Decision

All are frozen. A stage never changes what it was given; it makes the next thing from it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

import orjson

__all__ = [
    "Answer",
    "Completion",
    "Decision",
    "Neighbour",
    "Prompt",
    "Record",
    "Sampling",
    "SeedTask",
    "Usage",
]

Api = Literal["completions", "chat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedTask:
    """One demonstration that a person wrote, in Self-Instruct's terms; its first instance only."""

    id: str
    instruction: str
    input: str
    output: str
    name: str = ""
    is_classification: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the model is asked to continue. Field names are those of the OpenAI API."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    forbid_eos: bool = False
    """Never sample the end-of-text token, so that the model goes on to the stop strings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Request ``index`` of the plan: a pure function of seeds, settings and index."""

    index: int
    text: str
    api: Api
    sampling: Sampling
    demonstrations: tuple[str, ...] = ()
    """Ids of the seed tasks shown, in order."""
    tokens: int | None = None
    """Prompt tokens as counted before sending; None where nothing can count."""
    truncated: bool = False
    """Something was left out or shortened to fit the context."""

    def key(self, model: str) -> bytes:
        """Hash of what is sent: model, text, api, sampling and index. 32 bytes."""
        s = self.sampling
        sent = [model, self.index, self.api, self.text]
        sent += [s.max_tokens, s.temperature, s.top_p, list(s.stop), s.seed, s.forbid_eos]
        return hashlib.sha256(orjson.dumps(sent)).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens billed for one completion."""

    prompt_tokens: int
    completion_tokens: int
    estimated: bool = False
    """The server did not say; counted or guessed here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One whole answer. A backend never returns one that it does not know to be complete."""

    text: str
    finish_reason: str
    """``stop`` or ``length``; ``content_filter``, ``refusal``, ``tool_calls``, ``repetition`` are
    answers too.
    """
    usage: Usage
    model: str = ""
    """As the server names it in the reply."""
    latency_s: float = 0.0
    ttft_s: float | None = None
    """Time to the first token, where the answer was streamed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What request ``index`` came to, as the store keeps it: a completion or a failure."""

    index: int
    demonstrations: tuple[str, ...]
    completion: Completion | None
    failure: str | None = None
    """The verdict's reason, where there is no completion."""
    message: str = ""
    truncated: bool = False
    attempts: int = 1
    backend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One instruction record, as parsed from an answer."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """An item that a candidate resembles, and how closely."""

    text: str
    score: float
    source: str
    """``seed:ID``, ``row:REQUEST.POSITION`` or ``against:FILE:LINE``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What became of piece ``position`` of answer ``index``: accepted, or refused with a reason."""

    index: int
    position: int
    reason: str | None
    """None: accepted. Else one of the reasons of recipes, filters and dedup, or ``failed:…``."""
    record: Record | None = None
    """None where nothing could be parsed."""
    detail: str = ""
    """For the person: the blocked word, the part that is missing, the server's message."""
    nearest: Neighbour | None = None
    most_similar: dict[str, float] = field(default_factory=dict)
    """Accepted rows: the ten nearest instructions by ROUGE-L with their F."""
    mean_similarity: float = 0.0
    """Accepted rows: the mean ROUGE-L F to all seeds and earlier accepted rows."""

    @property
    def accepted(self) -> bool:
        return self.reason is None
