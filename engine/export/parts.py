"""The files of a dataset in a folder: one of each part, or several where they are to be small."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from engine.export import formats
from engine.export.card import card
from engine.export.choice import Choice
from engine.export.formats import Format
from engine.export.layout import Layout
from engine.export.options import Options
from engine.export.rows import Row
from engine.export.split import Split
from engine.store import RunReader

__all__ = ["Part", "Parts", "name_of"]

Part = Literal["train", "validation"]


def name_of(part: Part, place: int, count: int, format: Format) -> str:
    """Of one file of a part, of ``count`` files from 0 on, as Hugging Face ``datasets`` has it."""
    return f"{part}-{place:05}-of-{count:05}{formats.SUFFIX[format]}"


class Parts:
    """A folder with the files of a dataset's parts."""

    def __init__(
        self,
        run: RunReader,
        format: Format,
        folder: Path,
        layout: Layout,
        choice: Choice,
        split: Split | None,
        options: Options,
    ) -> None:
        self._split = split
        self._stack = ExitStack()
        validating = choice.of(split.mask) if split is not None else 0
        sizes: dict[Part, int] = {"train": choice.count - validating, "validation": validating}
        data = folder / "data" if format == "datasets" else folder
        data.mkdir(exist_ok=True)
        self._shards = {
            part: _Shards(format, data, part, size, options.shard_rows, layout)
            for part, size in sizes.items()
            if size or part == "train"
        }
        self._card: Callable[[], None] = lambda: None
        if format == "datasets":

            def describe() -> None:
                digest = _digest_of(data)
                text = card(run, sizes, split, layout, digest=digest, choosing=options.choosing)
                (folder / "README.md").write_text(text, encoding="utf-8", errors="replace")

            self._card = describe

    def __enter__(self) -> Callable[[Row], None]:
        for shards in self._shards.values():
            self._stack.enter_context(shards)
        return self._write

    def __exit__(self, kind: object, *_: object) -> None:
        self._stack.close()
        if kind is None:
            self._card()

    def _write(self, row: Row) -> None:
        validates = self._split is not None and self._split.validates(row.number)
        self._shards["validation" if validates else "train"].write(row)


class _Shards:
    """One part of a dataset, ``rows`` long: file after file of ``shard_rows`` rows."""

    def __init__(
        self,
        format: Format,
        folder: Path,
        part: Part,
        rows: int,
        shard_rows: int | None,
        layout: Layout,
    ) -> None:
        self._format: Format = format
        self._folder = folder
        self._part = part
        self._shard_rows = shard_rows or max(rows, 1)
        self._shards = -(-rows // self._shard_rows) or 1
        self._layout = layout
        self._written = self._opened = 0
        self._stack = ExitStack()
        self._write: Callable[[Row], None]

    def __enter__(self) -> _Shards:
        self._open()  # a dataset without rows is a file too
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def write(self, row: Row) -> None:
        if self._written == self._shard_rows:
            self._open()
        self._write(row)
        self._written += 1

    def _open(self) -> None:
        self._stack.close()
        name = name_of(self._part, self._opened, self._shards, self._format)
        file = self._stack.enter_context((self._folder / name).open("xb"))
        self._write = self._stack.enter_context(formats.writer(self._format, file, self._layout))
        self._opened += 1
        self._written = 0


def _digest_of(folder: Path) -> str:
    """SHA-256 of the files in a folder."""
    sum_ = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            sum_.update(hashlib.file_digest(file, "sha256").digest())
    return sum_.hexdigest()
