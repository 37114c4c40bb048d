"""What passes between the stages: one type between two neighbours.

    SeedTask ─▶ Prompt ─▶ Completion ─▶ Record ─▶ Decision

All are frozen. A stage never changes what it was given; it makes the next thing from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

__all__ = [
    "EVERY",
    "RESERVED",
    "SAMPLE",
    "Answer",
    "Api",
    "Completion",
    "Decision",
    "Message",
    "Neighbour",
    "Prompt",
    "Record",
    "Sampling",
    "SeedTask",
    "Usage",
]

Api = Literal["completions", "chat"]
EVERY = 2**62
"""As a run's target: a decision on every input row, however many are accepted."""
SAMPLE = "sample"
"""The reason of a row that went into another, with those of the other samples."""
RESERVED = frozenset(("model", "prompt", "messages", "stream", "stream_options", "n"))
"""Fields of a request's body that the engine itself must fill."""
Record = dict[str, Any]
"""One row: the fields that its recipe declares, with JSON values. Alpaca's are ``instruction``,
``input`` and ``output``.
"""


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
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further fields of the request's body, as they are; they win over the fields above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Request ``index`` of the plan: a pure function of recipe, settings, input row and index."""

    index: int
    text: str = ""
    """What a model continues, and the user's only turn where it is asked by chat."""
    messages: tuple[Message, ...] = ()
    """Or the turns of a chat; then ``text`` is empty and ``api`` is ``chat``."""
    api: Api
    sampling: Sampling
    row: Record | None = field(default=None, hash=False)
    """The input row that it was made of; None where the run has no input."""
    demonstrations: tuple[str, ...] = ()
    """Sources of the parts shown, in order; ids of seed tasks without a prefix."""
    tokens: int | None = None
    """Prompt tokens as counted before sending; None where nothing can count."""
    truncated: bool = False
    """Something was left out or shortened to fit the context."""

    @property
    def chat(self) -> tuple[Message, ...]:
        """The turns of a chat that asks this."""
        return self.messages or (Message(role="user", content=self.text),)

    @property
    def begun(self) -> bool:
        """Whether the chat ends in an assistant's turn, which the model then goes on with."""
        return bool(self.messages) and self.messages[-1].role == "assistant"

    @property
    def size_bytes(self) -> int:
        """Size of all its text in UTF-8, for estimates of its tokens."""
        return sum(len(turn.content.encode(errors="replace")) for turn in self.chat)

    def key(self, model: str) -> bytes:
        """Hash of what is sent: model, text or turns, api, sampling and index. 32 bytes.

        What came later than the first runs (turns, ``extra``, input rows) counts only where it is
        used, so that the keys of those runs hold.
        """
        s = self.sampling
        sent: list[Any] = [model, self.index, self.api, self.text]
        sent += [s.max_tokens, s.temperature, s.top_p, list(s.stop), s.seed, s.forbid_eos]
        if self.messages or s.extra:
            sent.append([[turn.role, turn.content] for turn in self.messages])
            sent.append(s.extra)
        if self.row is not None:
            sent.append(self.row)
        try:
            body = orjson.dumps(sent, option=orjson.OPT_SORT_KEYS)
        except TypeError:  # half of a surrogate pair, or an integer of any size
            body = json.dumps(sent, sort_keys=True).encode()
        return hashlib.sha256(body).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens billed for one completion."""

    prompt_tokens: int
    completion_tokens: int
    """With the thoughts, where there are any."""
    estimated: bool = False
    """The server did not say; counted or guessed here."""
    cached_tokens: int = 0
    """Of ``prompt_tokens``: read from the server's prefix cache, often at a lower price."""
    reasoning_tokens: int = 0
    """Of ``completion_tokens``: thoughts."""
    cost: float | None = None
    """What the host itself says that it charges, in its currency; None where it does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One whole answer. A backend never returns one that it does not know to be complete."""

    text: str
    finish_reason: str
    """``stop``, ``length``, or ``unknown``, after which an answer may be cut as well;
    ``content_filter``, ``refusal``, ``tool_calls`` and ``repetition`` are answers too.
    """
    usage: Usage
    reasoning: str = ""
    """The thoughts that a server sends beside the text."""
    api: Api | None = None
    """How it was asked, where a host has not the API that the prompt names."""
    model: str = ""
    """As the server names it in the reply, or else as it was asked for."""
    latency_s: float = 0.0
    ttft_s: float | None = None
    """Time to the first token, where the answer was streamed."""


NOT_ASKED = "not_asked"
"""The reason of a row about which there is nothing to ask."""


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
    row: Record | None = None
    """The input row that was asked about, so that it can be parsed again without the input."""

    @property
    def failed(self) -> bool:
        """It failed permanently. That there was nothing to ask is no failure."""
        return self.completion is None and self.failure != NOT_ASKED


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
    mean_similarity: float | None = 0.0
    """Accepted rows: the mean ROUGE-L F to all seeds and earlier accepted rows. None where neither
    this nor the nearest were looked for, as is so beyond the first million."""

    @property
    def accepted(self) -> bool:
        return self.reason is None
