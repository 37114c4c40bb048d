"""Which models a server says that it has: ``read_models`` reads the answer to ``GET /models``.

OpenAI's form is ``{"data": [{"id": …}]}``; Together has the bare list, Ollama and llama.cpp a list
``models``. Names come with prefixes (``models/gemini-…``) and tags (``llama3:latest``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.backends.openai.error_body import clean

__all__ = ["Served", "find_model", "listed", "read_models"]

LENGTHS = ("max_model_len", "context_length", "context_window", "max_context_length")
"""What vLLM, OpenRouter and Together, Groq, and Mistral call the context's length."""
MOST_TOKENS = 10**8
"""A context length beyond this is a mistake of the server's and counts as unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One model of a server's list."""

    id: str
    root: str
    """What it really is, where ``id`` is a name that the server was told to use."""
    owner: str = ""
    context_length: int | None = None


def read_models(data: Any) -> list[Served]:
    """The models of a list in any of the known forms; empty where it is none."""
    if isinstance(data, dict):
        found = data.get("data")
        data = found if isinstance(found, list) else data.get("models")
    return [
        served
        for card in (data if isinstance(data, list) else ())
        if (served := _model(card)) is not None
    ]


def _model(card: Any) -> Served | None:
    if isinstance(card, str):
        card = {"id": card}
    if not isinstance(card, dict):
        return None
    name = card.get("id") or card.get("name") or card.get("model")
    if not isinstance(name, str):
        return None
    lengths = (card.get(key) for key in LENGTHS)
    return Served(
        id=name,
        root=str(card.get("root") or name),
        owner=str(card.get("owned_by") or ""),
        context_length=next(
            (n for n in lengths if isinstance(n, int) and 0 < n <= MOST_TOKENS), None
        ),
    )


def find_model(served: Sequence[Served], wanted: str) -> Served | None:
    """The model of that name, with or without the prefix or tag that a host puts to it."""
    tagless = wanted.partition(":")[0]
    for names in ({wanted}, {f"models/{wanted}"}, {tagless, f"{wanted}:latest"}):
        if found := next((model for model in served if model.id in names), None):
            return found
    return None


def listed(served: Sequence[Served]) -> str:
    """The names, for a person."""
    return ", ".join(clean(model.id) for model in served[:8]) or "no model"
