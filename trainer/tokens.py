"""Records to token ids, in batches.

Where prompt and response meet, a tokenizer may merge characters of both into one token (``:`` and
``-``). ``boundary`` says what then happens:

    split    each is tokenised by itself and the ids are joined, which is what a model sees when it
             answers a tokenised prompt; no token straddles the border
    alpaca   the whole is tokenised, and as many tokens as the prompt has by itself are not learned:
             Alpaca's way, which now and then skips the response's first characters
    prefix   the whole is tokenised, and learning starts at the first token that differs from the
             prompt's own
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.config import DataSettings
from trainer.encode import RowEncoder
from trainer.errors import ConfigError, DataError
from trainer.examples import Example
from trainer.template import Piece, Template

__all__ = ["Dropped", "LayoutWarning", "Tokenised", "opening_ids", "tokenise"]

FORMAT = 3
"""Part of the key of the token cache; counts changes of layout or tokenising that change ids."""

_BATCH = 1024
"""Records that go to the tokenizer in one call."""


@dataclass(frozen=True, slots=True)
class Tokenised:
    """One record: ``ids[i]`` is learned (predicted from what stands before it) where
    ``learned[i]``.
    """

    ids: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that is not trained on, and why: ``too_long``, ``no_target`` or ``bad_row``."""

    name: str
    reason: str
    tokens: int
    detail: str = ""
    """What is wrong with a bad row."""


def tokenise(
    examples: Iterable[Example],
    tokenizer: Any,
    settings: DataSettings,
    notes: Counter[str] | None = None,
) -> Iterator[Tokenised | Dropped]:
    """Token ids of each example, in order; an example may give several rows, or be dropped.

    Args:
        notes: takes what a person should know about how records were laid out, and of how many it
            is so. Without it each note is a :class:`LayoutWarning`.

    Raises:
        ConfigError: the tokenizer has no end-of-text token, or cannot lay a conversation out.
        DataError: the chat template refuses a record.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-text token; answers could never end")
    template = Template(tokenizer, settings.template)
    opening = opening_ids(tokenizer)
    chat_ids: Callable[[list[list[Piece]]], list[tuple[list[int], list[bool]]]] | None = None
    stream = iter(examples)
    while batch := list(itertools.islice(stream, _BATCH)):
        laid_out = []
        for example in batch:
            try:
                laid_out.append(template.rows(example))
            except DataError as exc:
                if settings.on_bad_row == "refuse":
                    raise
                yield Dropped(example.name, "bad_row", 0, str(exc))
                laid_out.append([])
        are_chats = [template.is_chat(example) for example in batch]
        plain = [rows for rows, is_chat in zip(laid_out, are_chats, strict=True) if not is_chat]
        ids_of = _Encoder(tokenizer, [*itertools.chain(*plain)], whole=settings.boundary != "split")
        if chat_ids is None and any(are_chats):
            chat_ids = RowEncoder(tokenizer) if tokenizer.is_fast else _apart(tokenizer)
        chats = [rows for rows, is_chat in zip(laid_out, are_chats, strict=True) if is_chat]
        of_chats = iter(chat_ids([*itertools.chain(*chats)]) if chat_ids else ())
        for example, rows, is_chat in zip(batch, laid_out, are_chats, strict=True):
            for number, pieces in enumerate(rows):
                if is_chat:  # the template brings its own first and last token
                    ids, learned = next(of_chats)
                else:
                    ids, learned = ids_of.joined(pieces, settings.boundary)
                    ids = [*opening, *ids, tokenizer.eos_token_id]
                    learned = [*[False] * len(opening), *learned, True]
                name = f"{example.name}, answer {number + 1}" if len(rows) > 1 else example.name
                yield _within(name, ids, learned, settings)
    if notes is not None:
        notes.update(template.notes)
        return
    for note, count in template.notes.items():
        warnings.warn(f"{note} ({count} records)", LayoutWarning, stacklevel=2)


class LayoutWarning(UserWarning):
    """Records are laid out in a way that a person should know of."""


def _apart(tokenizer: Any) -> Callable[[list[list[Piece]]], list[tuple[list[int], list[bool]]]]:
    """The ids of rows, piece by piece: all that a tokenizer without offsets can do."""
    return lambda rows: [_Encoder(tokenizer, rows, whole=False).apart(row) for row in rows]


class _Encoder:
    """The ids of all pieces of a batch of records, tokenised in two calls."""

    def __init__(self, tokenizer: Any, laid_out: list[list[Piece]], *, whole: bool) -> None:
        texts = {p.text for pieces in laid_out for p in pieces if not p.literal}
        if whole:
            texts |= {_text(pieces) for pieces in laid_out}
            texts |= {_text(pieces, prompt=True) for pieces in laid_out}
        literals = {p.text for pieces in laid_out for p in pieces if p.literal}
        self._ids = _encode(tokenizer, sorted(texts))
        self._literal_ids = _encode(tokenizer, sorted(literals), split_special_tokens=True)

    def apart(self, pieces: list[Piece]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        learned: list[bool] = []
        for piece in pieces:
            new = (self._literal_ids if piece.literal else self._ids)[piece.text]
            ids += new
            learned += [piece.learned] * len(new)
        return ids, learned

    def joined(self, pieces: list[Piece], boundary: str) -> tuple[list[int], list[bool]]:
        """As ``boundary`` says; a record that spells special tokens is always split."""
        if boundary == "split" or any(piece.literal for piece in pieces):
            return self.apart(pieces)
        prompt, ids = self._ids[_text(pieces, prompt=True)], self._ids[_text(pieces)]
        start = len(prompt)
        if boundary == "prefix":
            same = (a == b for a, b in zip(prompt, ids, strict=False))
            start = sum(1 for _ in itertools.takewhile(bool, same))
        return ids, [index >= start for index in range(len(ids))]


def _text(pieces: list[Piece], *, prompt: bool = False) -> str:
    return "".join(piece.text for piece in pieces if not (prompt and piece.learned))


def _encode(tokenizer: Any, texts: list[str], **options: Any) -> dict[str, list[int]]:
    if not texts:
        return {}
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **options,
    )
    return dict(zip(texts, encoded["input_ids"], strict=True))


def opening_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: usually its begin-of-text token, or nothing."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return dressed[:start]
    return []


def _within(
    name: str, ids: list[int], learned: list[bool], settings: DataSettings
) -> Tokenised | Dropped:
    limit = settings.model_max_length
    if len(ids) > limit and settings.too_long == "drop":
        return Dropped(name, "too_long", len(ids))
    if not any(learned[1:limit]):
        return Dropped(name, "no_target", len(ids))
    return Tokenised(np.array(ids[:limit], np.int32), np.array(learned[:limit], np.bool_))
