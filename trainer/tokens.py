"""Records to token ids, once: tokenised in batches, cached by content, mapped into every process.

The cache's key is a hash of everything the ids follow from (the records, the tokenizer, the
settings), so a stale entry cannot be hit and nothing needs to be invalidated. The price: the
dataset is read and hashed at each start, which for 52,000 Alpaca records takes under a second.

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

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.config import DataSettings
from trainer.errors import ConfigError, DataError, DiskError
from trainer.records import Example
from trainer.template import Piece, Template

__all__ = ["Dropped", "TokenDataset", "Tokenised", "opening_ids", "tokenise", "tokenised_dataset"]

FORMAT = 1
"""Part of the cache's key; counts changes of this file that change ids."""

_BATCH = 1024
"""Records that go to the tokenizer in one call."""

_ARRAYS = ("ids", "learned", "offsets")


@dataclass(frozen=True, slots=True)
class Tokenised:
    """One record: ``ids[i]`` is learned (predicted from what stands before it) where
    ``learned[i]``.
    """

    ids: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that is not trained on, and why: ``too_long`` or ``no_target``."""

    name: str
    reason: str
    tokens: int


class TokenDataset:
    """A tokenised dataset on disk, mapped into memory: ``len``, ``[i]``, and lengths for planning.

    ``key`` is the hash of what it was made from.
    """

    def __init__(self, folder: Path) -> None:
        self.key = folder.name
        meta = json.loads((folder / "meta.json").read_bytes())
        self.chats: int = meta["chats"]
        """Records that the model's chat template laid out; the rest are in Alpaca's layout."""
        self.dropped = tuple(Dropped(**row) for row in meta["dropped"])
        arrays = [np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in _ARRAYS]
        self._ids, self._learned, self._offsets = arrays
        self.lengths: npt.NDArray[np.int64] = np.diff(self._offsets)  # (N,)
        # The first token of a record is predicted from nothing, so it is never a target.
        counts = np.concatenate([[0], np.cumsum(self._learned, dtype=np.int64)])
        learned = counts[self._offsets[1:]] - counts[self._offsets[:-1]]
        self.targets: npt.NDArray[np.int64] = learned - self._learned[self._offsets[:-1]]  # (N,)
        self.largest_id = int(self._ids.max())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tokenised:
        span = slice(self._offsets[index], self._offsets[index + 1])
        return Tokenised(self._ids[span], self._learned[span])


def tokenised_dataset(
    examples: Sequence[Example], tokenizer: Any, settings: DataSettings
) -> TokenDataset:
    """The dataset of ``examples``, from the cache or tokenised now.

    Raises:
        ConfigError, DataError: as ``tokenise``; DataError too when no record is left.
        DiskError: the cache cannot be written.
    """
    cache = settings.dataset_cache_dir.expanduser()
    folder = cache / _key(examples, tokenizer, settings)
    if _is_whole(folder):
        return TokenDataset(folder)
    kept: list[Tokenised] = []
    dropped: list[Dropped] = []
    for result in tokenise(examples, tokenizer, settings):
        kept.append(result) if isinstance(result, Tokenised) else dropped.append(result)
    if not kept:
        reasons = ", ".join(sorted({row.reason for row in dropped}))
        raise DataError(
            f"all {len(dropped)} records were dropped ({reasons}); raise --model_max_length, now"
            f" {settings.model_max_length}, or use --too_long truncate"
        )
    try:
        template = Template(tokenizer, settings.template)
        _write(folder, kept, dropped, sum(map(template.is_chat, examples)))
    except OSError as exc:
        raise DiskError(f"{cache}: {exc.strerror}; free space or set --dataset_cache_dir") from exc
    return TokenDataset(folder)


def tokenise(
    examples: Sequence[Example], tokenizer: Any, settings: DataSettings
) -> Iterator[Tokenised | Dropped]:
    """Token ids of each example, in order.

    Raises:
        ConfigError: the tokenizer has no end-of-text token, or cannot lay a conversation out.
        DataError: the chat template refuses a record.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-text token; answers could never end")
    template = Template(tokenizer, settings.template)
    opening = opening_ids(tokenizer)
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        laid_out = [template.pieces(example) for example in batch]
        ids_of = _Encoder(tokenizer, laid_out, whole=settings.boundary != "split")
        for example, pieces in zip(batch, laid_out, strict=True):
            if template.is_chat(example):  # the template brings its own first and last token
                ids, learned = ids_of.apart(pieces)
            else:
                ids, learned = ids_of.joined(pieces, settings.boundary)
                ids = [*opening, *ids, tokenizer.eos_token_id]
                learned = [*[False] * len(opening), *learned, True]
            yield _within(example.name, ids, learned, settings)


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


def _key(examples: Sequence[Example], tokenizer: Any, settings: DataSettings) -> str:
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = {
        "format": FORMAT,
        "tokenizer": backend.to_str()
        if backend is not None
        else repr(sorted(tokenizer.get_vocab().items())),
        "opening": opening_ids(tokenizer),
        "eos": tokenizer.eos_token_id,
        "chat_template": tokenizer.chat_template,
        "template": settings.template,
        "max_length": settings.model_max_length,
        "boundary": settings.boundary,
        "too_long": settings.too_long,
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for example in examples:
        digest.update(json.dumps([type(example).__name__, asdict(example)]).encode())
    return digest.hexdigest()


def _write(folder: Path, kept: list[Tokenised], dropped: list[Dropped], chats: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
    try:
        arrays = {
            "ids": np.concatenate([row.ids for row in kept]),
            "learned": np.concatenate([row.learned for row in kept]),
            "offsets": np.cumsum([0, *(len(row.ids) for row in kept)], dtype=np.int64),
        }
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        meta = {
            "chats": chats,
            "dropped": [asdict(row) for row in dropped],
            "sha256": {name: _sha256(temporary / f"{name}.npy") for name in _ARRAYS},
        }
        (temporary / "meta.json").write_text(json.dumps(meta))
        for file in temporary.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        # Whatever stands there is damaged, or another process has just written the same.
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    try:
        digests = json.loads((folder / "meta.json").read_bytes())["sha256"]
        return all(_sha256(folder / f"{name}.npy") == digests[name] for name in _ARRAYS)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
