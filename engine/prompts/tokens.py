"""How many tokens a text has: counted by a tokenizer, or guessed from its bytes."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import anyio

from engine import models
from engine.errors import ConfigError
from engine.pretrained import open_pretrained

__all__ = ["CountTokens", "estimate", "tokenizer_counter"]

CountTokens = Callable[[Sequence[str]], Awaitable[list[int] | None]]
"""Tokens of each text; None where they cannot be counted."""

BYTES_PER_TOKEN = 3.0
"""For an estimate where no tokenizer is at hand: English has about four bytes a token, code
three."""


def estimate(texts: Sequence[str]) -> list[int]:
    """Tokens of each text, guessed from its bytes."""
    return [math.ceil(len(text.encode(errors="replace")) / BYTES_PER_TOKEN) for text in texts]


class _Tokenizer(Protocol):
    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> Any: ...


def tokenizer_counter(name: str) -> CountTokens:
    """Count with ``tiktoken:ENCODING_OR_MODEL``, or with a transformers tokenizer (folder or hub
    id).

    Raises:
        ConfigError: the package is not installed, or the tokenizer cannot be had.
    """
    if name.startswith("tiktoken:"):
        wanted = name.removeprefix("tiktoken:")
        try:
            import tiktoken

            try:
                encoding = tiktoken.get_encoding(wanted)
            except ValueError:
                encoding = tiktoken.encoding_for_model(wanted)
        except ImportError as exc:
            raise ConfigError(
                "tokenizer: tiktoken is missing; pip install 'woolmill[tiktoken]'"
            ) from exc
        except Exception as exc:  # tiktoken lets through whatever its download raised
            raise ConfigError(f"tokenizer {name!r} cannot be loaded: {exc}") from exc

        async def count_bpe(texts: Sequence[str]) -> list[int] | None:
            encoded = await anyio.to_thread.run_sync(
                lambda: encoding.encode_ordinary_batch(list(texts))
            )
            return [len(ids) for ids in encoded]

        return count_bpe

    try:
        from transformers import AutoTokenizer

        tokenizer: _Tokenizer = open_pretrained(AutoTokenizer, models.locate(name))
    except ImportError as exc:
        raise ConfigError(
            "tokenizer: transformers is missing; pip install 'woolmill[local]'"
        ) from exc
    except ConfigError:
        raise
    except Exception as exc:  # whatever transformers makes of a folder that is none of its own
        raise ConfigError(
            f"tokenizer {name!r} cannot be loaded; give a folder or a hub id"
        ) from exc

    async def count(texts: Sequence[str]) -> list[int] | None:
        encoded = await anyio.to_thread.run_sync(
            lambda: tokenizer(list(texts), add_special_tokens=False)
        )
        return [len(ids) for ids in encoded["input_ids"]]

    return count
