"""Woolmill in Python: rows as they are committed, a look before anything is paid, finished runs.

>>> import engine
>>> for row in engine.generate("alpaca", target=1000, out="runs/x", base_url="http://…/v1"):
...     print(row["instruction"])
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from engine.errors import InputError
from engine.recipes.base import Recipe
from engine.recipes.load import not_while_loading
from engine.recipes.named import spec_of
from engine.records import Decision, Prompt, Record
from engine.settings import RunConfig, config_of
from engine.store import Counts, Manifest, RunReader

if TYPE_CHECKING:
    from engine.run.background import BackgroundRun
    from engine.run.preview import Preview

__all__ = ["OpenRun", "agenerate", "generate", "open_run", "preview"]

AnyRecipe = str | Recipe | type[Recipe]
"""A name or file as ``--recipe`` takes it, a class, or an object."""
Rows = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""A file or folder, or the rows themselves: any iterable of mappings, or a data frame."""
URLs = str | Iterable[str] | None


@overload
def generate(
    recipe: AnyRecipe,
    *,
    out: str | os.PathLike[str],
    rows: Rows | None = ...,
    target: int | None = ...,
    base_url: URLs = ...,
    model: str | None = ...,
    backend: str | None = ...,
    decisions: Literal[False] = ...,
    progress: bool = ...,
    **settings: Any,
) -> Generator[Record]: ...


@overload
def generate(
    recipe: AnyRecipe,
    *,
    out: str | os.PathLike[str],
    rows: Rows | None = ...,
    target: int | None = ...,
    base_url: URLs = ...,
    model: str | None = ...,
    backend: str | None = ...,
    decisions: Literal[True],
    progress: bool = ...,
    **settings: Any,
) -> Generator[Decision]: ...


def generate(
    recipe: AnyRecipe,
    *,
    out: str | os.PathLike[str],
    rows: Rows | None = None,
    target: int | None = None,
    base_url: URLs = None,
    model: str | None = None,
    backend: str | None = None,
    decisions: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Generator[Record] | Generator[Decision]:
    """Generate rows into the folder ``out`` and yield each, in plan order, once it is on the disk.

    The same call again first yields the rows that are there, which cost nothing, and goes on. The
    run begins with the first row that is asked for, in a thread of its own, and does not wait for
    the caller. Leaving the loop (``break``, an exception, Ctrl-C, ``close()``) sends nothing more
    and keeps what is in flight, for at most ``drain_timeout_s``; Ctrl-C again leaves at once.

    Args:
        recipe: ``"alpaca"`` or another built-in name, ``"FILE.toml"``, ``"FILE.py:NAME"``,
            ``"package.module:NAME"``, or a class or object that other processes can import.
        out: the run's folder.
        rows: input rows. What is no file is written to ``rows.jsonl`` in ``out`` first, to its end;
            on the next call it must have the same rows, perhaps with others behind them.
        target: accepted rows wanted; None: with input rows a decision on each of them, else 100.
        base_url: of one or several OpenAI-compatible servers.
        decisions: yield a ``Decision`` for each piece of each answer, refused ones included.
        progress: show plain lines of progress on standard error.
        settings: any other of ``RunConfig``, by the names of ``woolmill generate``'s flags with
            underscores. A key is read from ``key_env`` or ``key_file``.

    Raises:
        ConfigError: at once, for a setting or a recipe that cannot be right.
        WoolmillError: from the generator, behind the last row, what ended the run early.
    """
    run = _prepared(
        recipe, out, rows, progress, target=target, base_url=base_url, model=model,
        backend=backend, **settings,
    )  # fmt: skip
    return _decisions(run) if decisions else _records(run)


def agenerate(
    recipe: AnyRecipe,
    *,
    out: str | os.PathLike[str],
    rows: Rows | None = None,
    target: int | None = None,
    base_url: URLs = None,
    model: str | None = None,
    backend: str | None = None,
    decisions: bool = False,
    progress: bool = False,
    **settings: Any,
) -> AsyncGenerator[Any]:
    """``generate`` for asynchronous callers: an asynchronous generator of the same rows.

    Cancelling whoever iterates drains and keeps, too; cancelled again it leaves at once. After a
    ``break`` that happens when the generator is closed: put it into ``contextlib.aclosing`` to have
    it there and then.
    """
    run = _prepared(
        recipe, out, rows, progress, target=target, base_url=base_url, model=model,
        backend=backend, **settings,
    )  # fmt: skip
    return _asynchronous(run, decisions)


def _prepared(
    recipe: AnyRecipe,
    out: str | os.PathLike[str],
    rows: Rows | None,
    progress: bool,
    **settings: Any,
) -> BackgroundRun:
    """A run that has not begun. ``settings`` that are None were not given."""
    from engine.run.background import BackgroundRun

    config, rows = _settled(recipe, out, rows, settings)
    return BackgroundRun(config, rows, progress=progress)


def _settled(
    recipe: AnyRecipe, out: str | os.PathLike[str], rows: Rows | None, settings: Mapping[str, Any]
) -> tuple[RunConfig, Iterable[Mapping[str, Any]] | None]:
    """The settings, and the rows that are to be written where they name them."""
    not_while_loading()
    given = {name: value for name, value in settings.items() if value is not None}
    given |= {"recipe": spec_of(recipe), "out": Path(out).absolute()}
    if isinstance(rows, str | os.PathLike):
        given["rows"], rows = Path(rows).absolute(), None
    return config_of(given), rows


def preview(
    recipe: AnyRecipe,
    *,
    rows: Rows | None = None,
    n: int = 3,
    answer: str | Callable[[Prompt], str] | None = None,
    **settings: Any,
) -> list[Preview]:
    """The first ``n`` prompts of a run, as they would be sent, before anything large is paid.

    Where a ``base_url``, ``model`` or ``backend`` is given, each is asked once. ``answer`` is taken
    instead: a text, or a function of the prompt. Either way the ``decisions`` on the answer come
    with it. Nothing is kept. Arguments and errors are those of ``generate``.
    """
    import anyio

    from engine.run.preview import preview as run_preview
    from engine.run.spool import each_row, spool

    with tempfile.TemporaryDirectory(prefix="woolmill-") as folder:
        config, given = _settled(recipe, folder, rows, settings)
        if given is not None:
            path = spool(islice(each_row(given), n), config.out)
            config = config.model_copy(update={"rows": path})
        show = partial(anyio.run, partial(run_preview, config, n, answer=answer))
        if not _in_a_loop():
            return show()
        with ThreadPoolExecutor(1) as other:  # as in a notebook, whose loop goes on
            return other.submit(show).result()


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _decisions(run: BackgroundRun) -> Generator[Decision]:
    with run:
        for chunk in run.chunks(refused=True):
            yield from chunk


def _records(run: BackgroundRun) -> Generator[Record]:
    with run:
        for chunk in run.chunks(refused=False):
            yield from map(_record, chunk)


async def _asynchronous(run: BackgroundRun, decisions: bool) -> AsyncGenerator[Any]:
    import anyio
    from anyio import to_thread

    # Its own threads: those that others share may all be taken by others that wait.
    in_thread = partial(to_thread.run_sync, limiter=anyio.CapacityLimiter(3))
    chunks = run.chunks(refused=decisions)
    cancels = 0
    try:
        await in_thread(run.start)
        # A thread that is left alone when this is cancelled ends with the run.
        while chunk := await in_thread(next, chunks, None, abandon_on_cancel=True):
            for decision in chunk:
                yield decision if decisions else _record(decision)
    except anyio.get_cancelled_exc_class():
        cancels += 1
        raise
    finally:
        again = None
        while True:
            try:
                with anyio.CancelScope(shield=True):
                    await in_thread(run.close, abandon_on_cancel=True)
                break
            except anyio.get_cancelled_exc_class() as cancelled:  # asyncio's own, through a shield
                again, cancels = cancelled, cancels + 1
                if cancels > 1:
                    run.stop()
        if again is not None:
            raise again


def _record(decision: Decision) -> Record:
    assert decision.record is not None
    return decision.record


class OpenRun:
    """A run as it was when it was opened; read-only, also while another process writes to it."""

    def __init__(self, folder: Path) -> None:
        self._reader = RunReader(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()

    def __len__(self) -> int:
        """How many records are accepted."""
        return self.counts.accepted

    def __iter__(self) -> Iterator[Record]:
        """The accepted records in plan order; streamed, so a large run needs no memory."""
        for decision in self._reader.decisions(accepted=True):
            if decision.record is None:
                raise InputError(f"{self._reader.path}: an accepted row has no record")
            yield decision.record

    def decisions(self, *, accepted: bool | None = None) -> Iterator[Decision]:
        """What became of every piece of every answer, with reasons and nearest neighbours."""
        return self._reader.decisions(accepted=accepted)

    @property
    def counts(self) -> Counts:
        return self._reader.counts()

    @property
    def settings(self) -> Manifest:
        return self._reader.manifest


def open_run(folder: str | os.PathLike[str]) -> OpenRun:
    """The run in ``folder``. Raises InputError where there is none, or it is damaged."""
    return OpenRun(Path(folder))
