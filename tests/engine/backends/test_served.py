"""Lists of models as hosts give them."""

from __future__ import annotations

from typing import Any

import pytest

from engine.backends.openai.served import Served, find_model, listed, read_models

LISTS: list[tuple[str, Any, list[Served]]] = [
    ("OpenAI", {"object": "list", "data": [{"id": "gpt-4o", "owned_by": "system"}]},
     [Served(id="gpt-4o", root="gpt-4o", owner="system")]),
    ("vLLM", {"data": [{"id": "m", "root": "org/model", "owned_by": "vllm",
                        "max_model_len": 4096}]},
     [Served(id="m", root="org/model", owner="vllm", context_length=4096)]),
    ("Together, a bare list", [{"id": "org/m", "type": "chat", "context_length": 8192}],
     [Served(id="org/m", root="org/m", context_length=8192)]),
    ("Groq", {"data": [{"id": "m", "context_window": 131072, "max_completion_tokens": 32768}]},
     [Served(id="m", root="m", context_length=131072)]),
    ("Mistral", {"data": [{"id": "m", "max_context_length": 32768, "aliases": ["n"]}]},
     [Served(id="m", root="m", context_length=32768)]),
    ("Ollama's own", {"models": [{"name": "llama3:latest", "model": "llama3:latest"}]},
     [Served(id="llama3:latest", root="llama3:latest")]),
    ("llama.cpp, both", {"models": [{"name": "x"}], "data": [{"id": "m", "owned_by": "llamacpp"}]},
     [Served(id="m", root="m", owner="llamacpp")]),
    ("names alone", ["a", "b"], [Served(id="a", root="a"), Served(id="b", root="b")]),
    ("an implausible length", [{"id": "m", "context_length": 2**63}], [Served(id="m", root="m")]),
    ("a length of nothing", [{"id": "m", "context_length": 0}], [Served(id="m", root="m")]),
    ("cards that are none", [None, 7, {}, {"id": 7}, {"id": "m"}], [Served(id="m", root="m")]),
    ("nothing", {"data": []}, []),
    ("no list", {"detail": "Not Found"}, []),
    ("a page", "welcome", []),
]  # fmt: skip


@pytest.mark.parametrize(("data", "served"), [pytest.param(*row[1:], id=row[0]) for row in LISTS])
def test_lists(data: Any, served: list[Served]) -> None:
    assert read_models(data) == served


NAMES = [
    ("gpt-4o", "gpt-4o"),
    ("gemini-2.5-flash", "models/gemini-2.5-flash"),
    ("models/gemini-2.5-flash", "models/gemini-2.5-flash"),
    ("llama3", "llama3:latest"),
    ("openai/gpt-4o:nitro", "openai/gpt-4o"),
    ("gpt-4", None),
    ("lama3", None),
    ("", None),
]


@pytest.mark.parametrize(("wanted", "found"), NAMES)
def test_names(wanted: str, found: str | None) -> None:
    """With or without a host's prefix, tag or variant; never a mere resemblance."""
    names = ("gpt-4o", "models/gemini-2.5-flash", "llama3:latest", "openai/gpt-4o")
    model = find_model([Served(id=name, root=name) for name in names], wanted)
    assert (model.id if model else None) == found


def test_a_listing_for_a_person_is_short_and_harmless() -> None:
    assert listed([]) == "no model"
    names = [f"m{i}\x1b[2J" for i in range(100)]
    assert listed([Served(id=name, root=name) for name in names]).endswith("m7")
