"""Tokenised datasets on disk: written once as a stream, mapped into every process.

The cache's key is a hash of everything the ids follow from (the records, the tokenizer, the
settings), so a stale entry cannot be hit and nothing needs to be invalidated. The price: the
dataset is read and hashed at each start, which for 52,000 Alpaca records takes under a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.config import DataSettings
from trainer.errors import DataError, DiskError
from trainer.records import Example
from trainer.template import Template
from trainer.tokens import FORMAT, Dropped, Tokenised, opening_ids, tokenise

__all__ = ["TokenDataset", "tokenised_dataset"]

_ARRAYS = ("ids", "learned", "offsets")


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
