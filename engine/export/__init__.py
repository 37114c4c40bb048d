"""Store to dataset: a pure function of the run's decisions, streamed in plan order, and put in
place whole or not at all.

    rows (accepted rows with where they come from) ─▶ formats (bytes) ─▶ files (one step)
    split (which rows validate) ─────────┘            card (what the dataset is)

The same run and the same options give the same bytes, on any machine with the same pyarrow.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine import files
from engine.errors import OutputError
from engine.export import formats, ledger
from engine.export.card import card
from engine.export.formats import Format
from engine.export.rows import Row, rows
from engine.export.split import Split, split
from engine.failpoints import failpoint
from engine.files import cannot_write, check_output
from engine.recipes.seeds import KEPT
from engine.store import RunReader

__all__ = ["OWN_FILES", "Export", "Format", "export", "export_dataset", "is_earlier"]

Part = Literal["train", "validation"]
OWN_FILES = (
    *("run.sqlite", "run.sqlite-wal", "run.sqlite-shm", "run.lock", "run.reserve"),
    *("exports.json", KEPT),
)
"""Of a run, and never replaced by an export, whatever is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What was written."""

    path: Path
    records: int
    split: Split | None


def export(run: RunReader, format: Format, path: Path, *, with_similarity: bool = False) -> int:
    """Write the accepted records of ``run`` as one dataset at ``path``; how many there are.

    ``export_dataset`` with its defaults.
    """
    return export_dataset(run, format, path, with_similarity=with_similarity).records


def export_dataset(
    run: RunReader,
    format: Format,
    path: Path,
    *,
    with_similarity: bool = False,
    validation: float = 0.0,
    shard_rows: int | None = None,
    overwrite: bool = False,
) -> Export:
    """Write the accepted records of ``run`` to ``path``, replacing it in one step.

    Args:
        format: see ``engine.export.formats``.
        path: a file; a folder for ``datasets``, and with a validation part or shards.
        with_similarity: ``alpaca`` only: add what its ``regen.json`` has besides.
        validation: share of the rows for a validation part that no near-duplicate straddles.
        shard_rows: rows in a file at most; None: all in one.
        overwrite: also replace what is not an untouched earlier export of this run.

    Raises:
        OutputError: the place cannot be written, or is taken.
        DiskError: writing failed; what stood at ``path`` is untouched.
        ConfigError: the format needs a package, or the run holds nothing to split by.
    """
    check_output(path, overwrite=True, inputs=[run.folder / name for name in OWN_FILES])
    as_folder = format == "datasets" or validation > 0 or shard_rows is not None
    if path.is_dir() and not as_folder:
        raise OutputError(f"{path}: is a folder; choose another -o")
    touched = ledger.touched(run.folder, path)
    if touched and not overwrite and not (format == "alpaca" and is_earlier(run, path)):
        raise OutputError(f"{path}: {touched}; replace it with --overwrite, or choose another -o")

    def placing(written: Path) -> None:
        failpoint("export.written")
        ledger.expect(run.folder, path, written)

    parts = split(run, validation) if validation else None
    if as_folder:
        records = _folder(run, format, path, with_similarity, parts, shard_rows, placing)
    else:
        with (
            files.new_file(path, placing) as file,
            formats.writer(format, file, with_similarity) as write,
        ):
            records = 0
            for row in rows(run, provenance=format in formats.WITH_PROVENANCE):
                write(row)
                records += 1
    with cannot_write(path):
        failpoint("export.renamed")
    ledger.remember(run.folder, path)
    return Export(path=path, records=records, split=parts)


def _folder(
    run: RunReader,
    format: Format,
    path: Path,
    with_similarity: bool,
    parts: Split | None,
    shard_rows: int | None,
    placing: Callable[[Path], None],
) -> int:
    accepted = run.counts().accepted
    validating = parts.rows if parts is not None else 0
    sizes: dict[Part, int] = {"train": accepted - validating, "validation": validating}
    with files.new_folder(path, placing) as folder:
        data = folder / "data" if format == "datasets" else folder
        data.mkdir(exist_ok=True)
        with ExitStack() as stack:
            shards = {
                part: stack.enter_context(
                    _Shards(format, data, part, size, shard_rows, with_similarity)
                )
                for part, size in sizes.items()
                if size or part == "train"
            }
            for number, row in enumerate(rows(run, provenance=format in formats.WITH_PROVENANCE)):
                validates = parts is not None and parts.validates(number)
                shards["validation" if validates else "train"].write(row)
        if format == "datasets":
            text = card(run, sizes, parts)
            (folder / "README.md").write_text(text, encoding="utf-8", errors="replace")
    return accepted


def is_earlier(run: RunReader, path: Path) -> bool:
    """Whether ``path`` is what the run's first accepted records gave as ``alpaca``: its dataset as
    it was when it had fewer.
    """
    if path.is_symlink() or not path.is_file():
        return False
    try:
        return any(_begins_with(run, path, with_similarity) for with_similarity in (False, True))
    except OSError:
        return False


def _begins_with(run: RunReader, path: Path, with_similarity: bool) -> bool:
    end = b"\n]"
    with path.open("rb") as file, tempfile.TemporaryFile() as whole:
        if path.stat().st_size == len(b"[]"):
            return file.read() == b"[]"
        left = path.stat().st_size - len(end)
        with formats.writer("alpaca", whole, with_similarity) as write:
            for row in rows(run):
                write(row)
                if whole.tell() >= left:
                    break
        if whole.tell() < left or left <= 0:
            return False
        whole.seek(0)
        while left:
            size = min(left, 1 << 20)
            if file.read(size) != whole.read(size):
                return False
            left -= size
        return file.read() == end and whole.read(1) in (b",", b"\n")


class _Shards:
    """One part of a dataset, ``rows`` long: file after file of ``shard_rows`` rows."""

    def __init__(
        self,
        format: Format,
        folder: Path,
        part: Part,
        rows: int,
        shard_rows: int | None,
        with_similarity: bool,
    ) -> None:
        self._format: Format = format
        self._folder = folder
        self._part = part
        self._shard_rows = shard_rows or max(rows, 1)
        self._shards = -(-rows // self._shard_rows) or 1
        self._with_similarity = with_similarity
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
        suffix = formats.SUFFIX[self._format]
        name = f"{self._part}-{self._opened:05}-of-{self._shards:05}{suffix}"
        file = self._stack.enter_context((self._folder / name).open("xb"))
        self._write = self._stack.enter_context(
            formats.writer(self._format, file, self._with_similarity)
        )
        self._opened += 1
        self._written = 0
