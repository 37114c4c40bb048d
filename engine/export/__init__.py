"""Store to dataset: a pure function of the run's decisions, streamed in plan order, and put in
place whole or not at all.

    choice (which rows, in which order) ─▶ rows (with where they come from) ─▶ formats (bytes)
    layout (what fields they have) ──────────┘  split (which validate)         card (what it is)

The same run and the same options give the same bytes, on any machine with the same pyarrow.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from engine import files
from engine.datasets import BAD_ROWS, count_bad_rows
from engine.errors import ConfigError, OutputError, UsageError
from engine.export import formats, ledger
from engine.export.best import best_of
from engine.export.choice import choose
from engine.export.formats import Format
from engine.export.layout import ALPACA_FIELDS, Layout, layout_of, typed
from engine.export.options import Options
from engine.export.outcomes import Outcomes
from engine.export.parts import Part, Parts, name_of
from engine.export.preference import Pairs
from engine.export.refused import refused_lines
from engine.export.rows import Row, rows
from engine.export.split import Split, split
from engine.failpoints import failpoint
from engine.files import cannot_write, check_output, is_stream
from engine.kept import refuse_unnamed_code
from engine.recipes.load import ALPACA
from engine.recipes.seeds import KEPT
from engine.stages import (
    Lineage,
    Stage,
    folders_below,
    open_stages,
    place_in_chain,
    root_of,
    stale_lines,
)
from engine.store import SNAPSHOT, Manifest, RunReader

__all__ = [
    "OWN_FILES",
    "Export",
    "Format",
    "Options",
    "dataset_of",
    "export",
    "export_dataset",
    "is_earlier",
    "own_files",
]

OWN_FILES = (
    *("run.sqlite", "run.sqlite-wal", "run.sqlite-shm", "run.lock", "run.reserve"),
    *(SNAPSHOT, "exports.json", KEPT, "recipe.py", "recipe.toml", BAD_ROWS),
)
"""Of a run, and never replaced by an export, whatever is asked."""


def own_files(folder: Path) -> list[Path]:
    """Those of the run in ``folder``, and of all stages of the run that this is a stage of."""
    folder = folder.absolute()
    root = root_of(folder)
    folders = [root, folder, *(stage.folder for _, stage in folders_below(root))]
    return [place / name for place in folders for name in OWN_FILES]


def dataset_of(manifest: Manifest) -> tuple[Format, str]:
    """The format and file name of the dataset that a run leaves in its own folder."""
    if manifest.fixed.get("recipe", ALPACA) == ALPACA:
        return "alpaca", "alpaca_data.json"
    return "jsonl", "dataset.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What was written."""

    path: Path
    format: Format
    records: int
    split: Split | None
    as_json: tuple[str, ...] = ()
    """Columns of a table that hold their values as JSON text."""
    left_out: tuple[str, ...] = ()
    """Fields that the format has no place for."""
    unsorted: int = 0
    """Rows without a value to sort by, which come last."""
    unscored: int = 0
    """Input rows that ``best`` leaves out: no sample of theirs has a score."""
    unpaired: tuple[tuple[str, int], ...] = ()
    """Input rows that gave no preference pair: why, and how many."""
    outcomes: tuple[tuple[str, int], ...] = ()
    """Of ``Options.outcomes``: what input rows came to, and how many."""
    unread: int = 0
    """Of ``Options.outcomes``: input rows that could not be read, and have no line."""
    unlisted: str = ""
    """Of ``Options.outcomes``: why rows that nobody was asked about have no line."""


def export(run: RunReader, format: Format, path: Path, *, with_similarity: bool = False) -> int:
    """Write the accepted records of ``run`` as its own dataset at ``path``; how many there are.

    Raises as ``export_dataset`` does.
    """
    why = "is no file" if is_stream(path) else _not_to_be_replaced(run, path, format)
    if why:
        raise OutputError(f"{path}: {why}; move it away, and the same command writes it")
    return export_dataset(run, format, path, Options(with_similarity=with_similarity)).records


def export_dataset(
    run: RunReader,
    format: Format | None,
    path: Path,
    options: Options,
    *,
    overwrite: bool = False,
) -> Export:
    """Write the accepted records of ``run`` to ``path``, replacing it in one step.

    Args:
        format: see ``engine.export.formats``; None: as the ending of ``path`` says, else that of
            the run's own dataset.
        path: a file; a folder for ``datasets``, and with a validation part or shards.
        overwrite: also replace what is not an untouched earlier export of this run.

    Raises:
        OutputError: the place cannot be written, or is taken.
        DiskError: writing failed; what stood at ``path`` is untouched.
        ConfigError: the format needs a package or other rows, or no row can validate.
        UsageError: options that do not go together.
    """
    check_output(path, overwrite=True, inputs=own_files(run.folder))
    own = dataset_of(run.manifest)[0]
    as_folder = options.folder_of(format)
    format = (format or own) if as_folder else formats.format_of(path, format, own)
    if path.is_dir() and not as_folder:
        raise OutputError(f"{path}: is a folder; choose another -o")
    if format in formats.CHATS:
        refuse_unnamed_code(run)
    layout = layout_of(run)
    options.check(format, layout)
    if not overwrite and (why := _not_to_be_replaced(run, path, format)):
        raise OutputError(f"{path}: {why}; replace it with --overwrite, or choose another -o")
    layout = replace(
        layout,
        similarity=options.with_similarity,
        reasoning=options.reasoning,
        grouped=options.group,
        all_samples=options.all_samples,
        lineage=_lineage_of(run, needed=options.lineage) if options.lineage or options.by else None,
    )
    best, unscored = None, 0
    if options.best is not None:
        best, unscored = best_of(rows(run), _lineage_of(run, needed=False), options.best)
    choice = choose(
        run,
        take=options.take,
        sort=options.sort,
        top=options.top,
        samples=layout.samples if options.group else None,
        among=best,
    )
    if format in ("parquet", "datasets"):
        layout = typed(layout, run)

    def placing(written: Path) -> None:
        failpoint("export.written")
        ledger.expect(run.folder, path, written)

    if options.outcomes:
        return _outcomes(run, path, placing)
    if options.refused:
        records = _lines(run, path, refused_lines(run, layout.own("id")), placing)
        return Export(path=path, format=format, records=records, split=None)
    if options.by is not None:
        return _preference(run, layout, path, options, placing)
    parts = None
    if options.validation is not None:
        whole = options.best is not None and options.take is None and options.top is None
        lineage = _lineage_of(run, needed=False)
        parts = split(
            run,
            options.validation,
            choice,
            lineage,
            threshold=options.validation_threshold,
            among_all=whole,
        )
    records = 0
    provenance = format in formats.WITH_PROVENANCE or options.reasoning
    chosen = rows(
        run,
        provenance=provenance,
        choice=None if options.all_samples else choice,
        all_samples=options.all_samples,
    )
    with ExitStack() as stack:
        write: Callable[[Row], None]
        if as_folder:
            folder = stack.enter_context(files.new_folder(path, placing))
            write = stack.enter_context(Parts(run, format, folder, layout, choice, parts, options))
        else:
            file = stack.enter_context(files.new_output(path, placing))
            write = stack.enter_context(formats.writer(format, file, layout))
        for row in chosen:
            write(row)
            records += 1
    with cannot_write(path):
        failpoint("export.renamed")
    ledger.remember(run.folder, path)
    return Export(
        path=path,
        format=format,
        records=records,
        split=parts,
        as_json=tuple(n for n, type_ in (layout.types or {}).items() if type_ == "json"),
        left_out=_left_out(format, layout),
        unsorted=choice.unsorted,
        unscored=unscored,
    )


def _not_to_be_replaced(run: RunReader, path: Path, format: Format) -> str | None:
    """Why ``path`` is replaced on request only; None where it may be written."""
    touched = ledger.touched(run.folder, path)
    return touched if touched and not is_earlier(run, path, format) else None


def _lineage_of(run: RunReader, *, needed: bool) -> Lineage:
    """What the run's rows were made of. Raises UsageError where lineage is ``needed`` and the run
    has no stage before.
    """
    stages, place = place_in_chain(run.folder)
    if needed and place == 0:
        raise UsageError(
            f"--lineage: nothing goes before the rows of {run.folder}, which has one"
            " stage or is the first"
        )
    with open_stages(stages[:place]) as before:
        runs = [*before, run]
        _refuse_stale(stages[: place + 1], runs)
        return Lineage(stages[: place + 1], runs)


def _refuse_stale(stages: Sequence[Stage], runs: Sequence[RunReader]) -> None:
    """Raises ConfigError where a stage was decided again and a later one not yet: rows are told
    apart by their rank, so those of others would be named.
    """
    for line in stale_lines(stages, runs):
        raise ConfigError(line)


def _preference(
    run: RunReader, layout: Layout, path: Path, options: Options, placing: Callable[[Path], None]
) -> Export:
    assert layout.lineage is not None
    assert options.by is not None
    pairs = Pairs(run=run, layout=layout, lineage=layout.lineage, by=options.by)
    parts = None
    if options.validation is not None:
        parts = _split_of(pairs, options, options.validation)
        pairs = replace(pairs, ties=0, alone=0, other_prompts=0, chosen=[])
        records = _split_pairs(pairs, parts, path, placing)
    else:
        records = _lines(run, path, pairs, placing)
    unpaired = (
        ("a tie of best and worst", pairs.ties),
        ("fewer than two samples with a score", pairs.alone),
        (
            "best and worst answer different prompts (let the question come from the input row)",
            pairs.other_prompts,
        ),
    )
    return Export(
        path=path,
        format="preference",
        records=records,
        split=parts,
        unpaired=tuple((why, count) for why, count in unpaired if count),
    )


def _split_of(pairs: Pairs, options: Options, share: float) -> Split:
    """Which pairs validate, as their better rows are held out of each other."""
    if pairs.lineage.pairs_samples:
        raise UsageError(
            "--validation goes with pairs of rows; these are of samples that became one row"
        )
    for _ in pairs:
        pass
    chosen = choose(pairs.run, among=np.array(pairs.chosen, np.int64))
    return split(
        pairs.run,
        share,
        chosen,
        pairs.lineage,
        threshold=options.validation_threshold,
        among_all=True,
    )


def _split_pairs(pairs: Pairs, parts: Split, path: Path, placing: Callable[[Path], None]) -> int:
    """Write a file for each part; how many pairs there are."""
    count = 0
    with files.new_folder(path, placing) as folder, ExitStack() as stack:
        train, validation = (
            stack.enter_context((folder / name_of(part, 0, 1, "preference")).open("xb"))
            for part in get_args(Part)
        )
        for count, pair in enumerate(pairs, 1):  # noqa: B007 - it is the number of all
            file = validation if parts.validates(pairs.chosen[-1]) else train
            file.write(formats.dumps(pair) + b"\n")
    with cannot_write(path):
        failpoint("export.renamed")
    ledger.remember(pairs.run.folder, path)
    return count


def _outcomes(run: RunReader, path: Path, placing: Callable[[Path], None]) -> Export:
    stages, place = place_in_chain(run.folder)
    with open_stages(stages[:place]) as before:
        runs = [*before, run]
        _refuse_stale(stages[: place + 1], runs)
        outcomes = Outcomes(stages[: place + 1], runs)
        records = _lines(run, path, outcomes, placing)
    return Export(
        path=path,
        format="jsonl",
        records=records,
        split=None,
        outcomes=tuple(outcomes.counts.most_common()),
        unread=count_bad_rows(root_of(run.folder)),
        unlisted=outcomes.unlisted,
    )


def _lines(
    run: RunReader, path: Path, lines: Iterable[dict[str, Any]], placing: Callable[[Path], None]
) -> int:
    """Write lines of JSON that are not rows in themselves; how many."""
    count = 0
    with files.new_output(path, placing) as file:
        for count, line in enumerate(lines, 1):  # noqa: B007 - it is the number of all
            file.write(formats.dumps(line) + b"\n")
    with cannot_write(path):
        failpoint("export.renamed")
    ledger.remember(run.folder, path)
    return count


def _left_out(format: Format, layout: Layout) -> tuple[str, ...]:
    if format != "alpaca":
        return ()
    return tuple(name for name in layout.fields if name not in ALPACA_FIELDS)


def is_earlier(run: RunReader, path: Path, format: Format) -> bool:
    """Whether ``path`` is what the run's first accepted records gave as ``format``, the one of its
    own dataset: that dataset as it was when it had fewer.
    """
    if format != dataset_of(run.manifest)[0] or path.is_symlink() or not path.is_file():
        return False
    layout = layout_of(run)
    layouts = [layout, *([replace(layout, similarity=True)] if format == "alpaca" else [])]
    try:
        return any(_begins_with(run, path, format, layout) for layout in layouts)
    except OSError:
        return False


def _begins_with(run: RunReader, path: Path, format: Format, layout: Layout) -> bool:
    """Whether the file is the beginning of a whole export, up to the end of one of its rows."""
    nothing, end = (b"[]", b"\n]") if format == "alpaca" else (b"", b"\n")
    with path.open("rb") as file, tempfile.TemporaryFile() as whole:
        if path.stat().st_size == len(nothing):
            return file.read() == nothing
        left = path.stat().st_size - len(end)
        with formats.writer(format, whole, layout) as write:
            for row in rows(run, provenance=format in formats.WITH_PROVENANCE):
                write(row)
                if whole.tell() > left:
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
