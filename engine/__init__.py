"""Woolmill: any data that a model can write, with exactly N rows and a reason for each refused one.

>>> import engine
>>> for row in engine.generate("alpaca", target=100, out="runs/alpaca", base_url="http://…/v1"):
...     print(row["instruction"], row["output"])
>>> with engine.open_run("runs/alpaca") as run:
...     print(len(run))
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine import loop
    from engine.api import OpenRun, agenerate, generate, open_run, preview
    from engine.dedup.rouge import RougeIndex
    from engine.dedup.semantic import SemanticIndex
    from engine.errors import WoolmillError
    from engine.recipes.base import Ask, Part, Piece, Recipe
    from engine.records import Completion, Decision, Message, Record

    __version__: str

__all__ = [
    "Ask",
    "Completion",
    "Decision",
    "Message",
    "OpenRun",
    "Part",
    "Piece",
    "Recipe",
    "Record",
    "RougeIndex",
    "SemanticIndex",
    "WoolmillError",
    "__version__",
    "agenerate",
    "generate",
    "loop",
    "open_run",
    "preview",
]

_HOME = {
    "engine.api": ("OpenRun", "agenerate", "generate", "open_run", "preview"),
    "engine.dedup.rouge": ("RougeIndex",),
    "engine.dedup.semantic": ("SemanticIndex",),
    "engine.errors": ("WoolmillError",),
    "engine.recipes.base": ("Ask", "Part", "Piece", "Recipe"),
    "engine.records": ("Completion", "Decision", "Message", "Record"),
}
"""Where the public names are: loaded when they are first asked for, so that importing is fast."""
_MODULES = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("woolmill")
    if name == "loop":
        return import_module("engine.loop")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
