"""Tokenised datasets on disk: written once as a stream, mapped into every process.

The cache's key is a hash of everything the ids follow from (the files or records, the tokenizer,
the settings), so a stale entry cannot be hit and nothing needs to be invalidated. The price: files
are read and hashed at each start, at the speed of the disk. Neither records nor ids are ever in
memory as a whole; what is, are two numbers a record: its tokens, and how many of them are learned.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trainer.config import DataSettings
from trainer.errors import DataError, DiskError
from trainer.examples import Example
from trainer.records import BadRow, Records
from trainer.template import Template
from trainer.tokens import FORMAT, Dropped, Tokenised, opening_ids, tokenise

__all__ = ["Dataset", "MixedDataset", "TokenDataset", "tokenised_dataset"]

_LAYOUT = 2
"""Part of the key; counts changes of the files below."""

_FILES = {"ids": np.int32, "learned": np.bool_, "offsets": np.int64, "targets": np.int64}
"""The arrays of a cache, each a file of its own, and what each holds. 32 bits are enough for an id,
not for a place among billions of them."""


class Dataset(Protocol):
    """What plans and micro-batches need to know of tokenised records."""

    @property
    def key(self) -> str:
        """Hash of what it was made from."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,): tokens of each record."""

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        """(N,): tokens of each record that are learned."""

    def __getitem__(self, index: int) -> Tokenised: ...


class TokenDataset:
    """A tokenised dataset on disk, mapped into memory: ``len``, ``[i]``, and lengths for planning.

    ``key`` is the hash of what it was made from.
    """

    def __init__(self, folder: Path) -> None:
        self.key = folder.name
        meta = json.loads((folder / "meta.json").read_bytes())
        self.instructions: int = meta["instructions"]
        self.chats: int = meta["chats"]
        """Records that the model's chat template laid out; the rest are in other layouts."""
        self.texts: int = meta["texts"]
        """Records that are plain text, laid out by nothing."""
        self.dropped = tuple(Dropped(**row) for row in meta["dropped"])
        self.largest_id: int = meta["largest_id"]
        self.notes: dict[str, int] = meta["notes"]
        """What a person should know about how records were laid out, and of how many it is so."""
        arrays = {
            name: np.memmap(folder / f"{name}.bin", dtype, mode="r")
            for name, dtype in _FILES.items()
        }
        self._ids, self._learned = arrays["ids"], arrays["learned"]
        self._offsets = arrays["offsets"]
        self.lengths: npt.NDArray[np.int64] = np.diff(self._offsets)  # (N,)
        self.targets: npt.NDArray[np.int64] = np.array(arrays["targets"])  # (N,)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tokenised:
        span = slice(self._offsets[index], self._offsets[index + 1])
        return Tokenised(np.asarray(self._ids[span]), np.asarray(self._learned[span]))


class MixedDataset:
    """Several datasets, one after the other."""

    def __init__(self, parts: Sequence[TokenDataset]) -> None:
        self.parts = tuple(parts)
        self.key = hashlib.sha256(" ".join(part.key for part in parts).encode()).hexdigest()
        self.instructions = sum(part.instructions for part in parts)
        self.chats = sum(part.chats for part in parts)
        self.texts = sum(part.texts for part in parts)
        self.largest_id = max(part.largest_id for part in parts)
        self.lengths: npt.NDArray[np.int64] = np.concatenate([part.lengths for part in parts])
        self.targets: npt.NDArray[np.int64] = np.concatenate([part.targets for part in parts])
        self.starts = np.cumsum([0, *map(len, parts)])  # (parts + 1,)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tokenised:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part][index - int(self.starts[part])]


def tokenised_dataset(
    records: Iterable[Example | BadRow], tokenizer: Any, settings: DataSettings
) -> TokenDataset:
    """The dataset of ``records``, from the cache or tokenised now.

    Raises:
        ConfigError, DataError: as ``tokenise`` and reading ``records`` do; DataError too when no
            record is left.
        DiskError: the cache cannot be written.
    """
    if not isinstance(records, Records):
        records = list(records)
    cache = settings.dataset_cache_dir.expanduser()
    folder = cache / _key(records, tokenizer, settings)
    if not _is_whole(folder):
        try:
            _write(folder, records, tokenizer, settings)
        except OSError as exc:
            told = f"{cache}: {exc.strerror}; free space or set --dataset_cache_dir"
            raise DiskError(told) from exc
    return TokenDataset(folder)


def _write(
    folder: Path, records: Iterable[Example | BadRow], tokenizer: Any, settings: DataSettings
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
    try:
        meta = _write_ids(temporary, records, tokenizer, settings)
        meta["sha256"] = {name: _sha256(temporary / f"{name}.bin") for name in _FILES}
        (temporary / "meta.json").write_text(json.dumps(meta))
        for file in temporary.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        try:
            temporary.rename(folder)  # fails where a folder with files stands there
        except OSError:
            if not _is_whole(folder):  # else another host has just written the same, and reads it
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_ids(
    folder: Path, records: Iterable[Example | BadRow], tokenizer: Any, settings: DataSettings
) -> dict[str, Any]:
    """Write the arrays; what else there is to say about them."""
    template = Template(tokenizer, settings.template)
    kinds: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    dropped: list[Dropped] = []
    offsets, targets, largest = array("q", [0]), array("q"), 0

    def good() -> Iterator[Example]:
        for record in records:
            if isinstance(record, BadRow):
                dropped.append(Dropped(record.name, "bad_row", 0, record.why))
                continue
            chat = template.is_chat(record)
            kinds["chat" if chat else type(record).__name__.lower()] += 1
            yield record

    with (folder / "ids.bin").open("wb") as ids, (folder / "learned.bin").open("wb") as learned:
        for row in tokenise(good(), tokenizer, settings, notes):
            if isinstance(row, Dropped):
                dropped.append(row)
                continue
            ids.write(row.ids.tobytes())
            learned.write(row.learned.tobytes())
            offsets.append(offsets[-1] + len(row.ids))
            # The first token of a record is predicted from nothing, so it is never a target.
            targets.append(int(row.learned[1:].sum()))
            largest = max(largest, int(row.ids.max()))
    if not targets:
        raise _nothing_left(records, dropped, settings)
    (folder / "offsets.bin").write_bytes(offsets.tobytes())
    (folder / "targets.bin").write_bytes(targets.tobytes())
    return {
        "instructions": kinds["instruction"],
        "chats": kinds["chat"],
        "texts": kinds["text"],
        "largest_id": largest,
        "dropped": [asdict(row) for row in dropped],
        "notes": notes,
    }


def _nothing_left(records: object, dropped: list[Dropped], settings: DataSettings) -> DataError:
    title = f"{records.title}: " if isinstance(records, Records) else ""
    if not dropped:
        return DataError(f"{title}holds no records")
    reasons = ", ".join(sorted({row.reason for row in dropped}))
    told = f"{title}all {len(dropped)} records were dropped ({reasons})"
    if all(row.reason == "bad_row" for row in dropped):
        return DataError(f"{told}; the first: {dropped[0].detail}")
    return DataError(
        f"{told}; raise --model_max_length, now {settings.model_max_length}, or use --too_long"
        " truncate"
    )


def _key(records: Iterable[Example | BadRow], tokenizer: Any, settings: DataSettings) -> str:
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = {
        "format": [FORMAT, _LAYOUT],
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
        "on_bad_row": settings.on_bad_row,
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    if isinstance(records, Records):
        digest.update(records.digest().encode())
        return digest.hexdigest()
    for record in records:
        digest.update(json.dumps([type(record).__name__, asdict(record)]).encode())
    return digest.hexdigest()


def _is_whole(folder: Path) -> bool:
    try:
        digests = json.loads((folder / "meta.json").read_bytes())["sha256"]
        return all(_sha256(folder / f"{name}.bin") == digests[name] for name in _FILES)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
