"""Open what others made: models, tokenizers, embeddings. Nothing else in the engine does.

A model folder can bring code of its own (``auto_map``, ``modules.json``). It is never run, and
nobody is asked whether it may: a model that can be opened without it is, another is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import ConfigError

__all__ = ["open_embedding", "open_pretrained"]


def open_pretrained(kind: Any, where: str | Path, **options: Any) -> Any:
    """What a class of transformers (``AutoTokenizer`` …) makes of a folder or hub id.

    Raises ConfigError where that takes code that comes with the model; whatever else transformers
    raises goes through.
    """
    try:
        return kind.from_pretrained(where, **options, trust_remote_code=False)
    except ValueError as error:
        raise _explained(error, where) from error


def open_embedding(where: str | Path, device: str = "cpu") -> Any:
    """A model of sentence-transformers by folder or hub id; raises as ``open_pretrained`` does."""
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(str(where), device=device, trust_remote_code=False)
    except ValueError as error:
        raise _explained(error, where) from error


def _explained(error: ValueError, where: str | Path) -> Exception:
    if "trust_remote_code" not in str(error):
        return error
    return ConfigError(
        f"{where} needs code that comes with it, and such code is never run; "
        "choose a model that transformers knows by itself"
    )
