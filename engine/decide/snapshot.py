"""The index of near-duplicates in a file beside the store, so that a large run decides again soon
after its start, and not after minutes that all its rows take to be compared with.

The file stands for one place in the run: all that was accepted up to some decision. It is nobody's
truth. One that is not whole, or was made by other code, under other settings or in another history
of the run, or that is ahead of the store, is left aside with a word in the log, and the index is
made from the store as without it. Rows beyond its place are added from the store too. So it changes
when a run decides, and never what.

It is written while decisions go on, by a thread of its own: most arrays are only added to, and
those that change in places are copied before (30 bytes an item).
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

import engine
from engine.decide.decider import Restored, restore_cascade, row_source
from engine.dedup.array_file import read_arrays, read_head, write_arrays
from engine.dedup.cascade import Cascade
from engine.errors import UnavailableError, WoolmillError
from engine.recipes.base import Recipe
from engine.store import SNAPSHOT, Counts, RunReader

__all__ = ["Snapshots"]

FORMAT = 1
EVERY, SHARE = 20_000, 40
"""A snapshot is written when as many items came since the last one, and at least this share of all:
so what a start has to add takes about a second with a million, and ten with ten million, and a run
writes some 8 kB an accepted row, about what its store takes. A run of fewer items has none."""
COMMITTED_S = 60.0
"""How long a snapshot waits for its last decision to be in the store."""
TOLD_S = 10.0
"""Between two words on how far the index is."""

Place = tuple[int, int]
"""(index, position) of a decision."""


class _Unfit(Exception):
    """A snapshot cannot be used; says why."""


class Snapshots:
    """The snapshot of one run: read once, then written now and then.

    Args:
        store: the run's, read as it grows.
        log: takes what is said of it, from any thread.
    """

    def __init__(self, store: RunReader, log: Callable[[str], None]) -> None:
        self._store = store
        self._path = store.folder / SNAPSHOT
        self._log = log
        self._thread: threading.Thread | None = None
        self._held = 0
        """Items of the last snapshot."""

    def restore(
        self, cascade: Cascade, again: Callable[[], Cascade], recipe: Recipe, counts: Counts
    ) -> tuple[Cascade, Restored]:
        """Add to ``cascade`` what the run accepted, with the help of the snapshot where there is a
        good one; ``again`` makes another like it, where that one turns out to be none.
        """
        is_used = False
        try:
            about = self._head()
            if about is not None:
                place, accepted = self._place(about, counts)
                is_used = True
                self._take(cascade, about, place, counts)
                restored = self._add_rest(cascade, recipe, counts, place, accepted)
                self._log(f"{self._path} is used: {accepted:,} rows, and {restored.rows:,} since")
                return cascade, restored
        except _Unfit as why:
            self._log(f"{self._path} is not used: {why}; the index is made from the store")
            self._held = 0
            if is_used:
                cascade = again()
        return cascade, restore_cascade(cascade, self._store, recipe, on_rows=self._told(counts))

    def _head(self) -> dict[str, Any] | None:
        try:
            return read_head(self._path)
        except (OSError, ValueError) as exc:
            raise _Unfit(str(exc)) from exc

    def _place(self, about: dict[str, Any], counts: Counts) -> tuple[Place, int]:
        """The place that a snapshot stands for, and how many rows were accepted up to it, as far as
        its head tells.
        """
        for name, mine in self._about().items():
            if about.get(name) != mine:
                raise _Unfit(f"it is of another {name}")
        try:
            index, position = map(int, about["last"])
            accepted, sum_ = int(about["accepted"]), int(about["sum"])
            session, pid, started_s = about["session"]
        except (ArithmeticError, KeyError, TypeError, ValueError) as exc:
            raise _Unfit("its place cannot be read") from exc
        last = (index, position)
        if counts.last_decided is None or last > counts.last_decided:
            raise _Unfit("it is ahead of the store")
        if max(map(abs, last)) >> 62 or self._store.decision_sum(*last) != sum_:
            raise _Unfit("the store has another decision there")
        # An older copy of the store that went on has other answers. Those that a snapshot follows
        # from were all there in its session, so that no later one has asked for them.
        if (session, pid, started_s) not in self._sessions():
            raise _Unfit("it is of a session that the store knows nothing of")
        if self._store.is_sent_after(session, index):
            raise _Unfit("what it follows from was asked for anew")
        return last, accepted

    def _sessions(self) -> list[tuple[int, int, float]]:
        return [(one.number, one.pid, one.started_s) for one in self._store.sessions()]

    def _take(self, cascade: Cascade, about: dict[str, Any], place: Place, counts: Counts) -> None:
        try:
            whole, arrays = read_arrays(self._path)
            if whole != about:
                raise _Unfit("another took its place")
            cascade.take(arrays, self._vectors(place, self._told(counts)))
        except (OSError, UnavailableError, ValueError) as exc:
            raise _Unfit(str(exc)) from exc
        self._held = len(cascade)

    def _vectors(
        self, last: Place, tell: Callable[[int], None]
    ) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Those of the rows up to a place, by what the rows are called."""
        for number, (place, vector) in enumerate(self._store.vectors()):
            if place > last:
                return
            tell(number)
            yield row_source(*place), vector

    def _add_rest(
        self, cascade: Cascade, recipe: Recipe, counts: Counts, last: Place, accepted: int
    ) -> Restored:
        """Add the rows beyond the snapshot."""
        told = self._told(counts, accepted)
        restored = restore_cascade(cascade, self._store, recipe, after=last, on_rows=told)
        if accepted + restored.rows != counts.accepted:
            raise _Unfit("the store has another number of rows")
        return restored

    def _told(self, counts: Counts, before: int = 0) -> Callable[[int], None]:
        """Says now and then how far it is: whoever waits knows that something goes on."""
        latest = time.monotonic()

        def tell(rows: int) -> None:
            nonlocal latest
            if time.monotonic() - latest > TOLD_S:
                latest = time.monotonic()
                self._log(f"the index has {before + rows:,} of {counts.accepted:,} rows")

        return tell

    def _about(self) -> dict[str, Any]:
        """What must be the same where a snapshot is read."""
        manifest = self._store.manifest
        settings = orjson.dumps(
            [dict(manifest.fixed), dict(manifest.decision)], option=orjson.OPT_SORT_KEYS
        )
        return {
            "format": FORMAT,
            "code": _code(),
            "run": self._store.run_id,
            "settings": hashlib.sha256(settings).hexdigest(),
        }

    def keep(self, cascade: Cascade, last: Place, accepted: int) -> None:
        """Begin to write a snapshot where one is due. ``cascade`` stands at the decision ``last``,
        with ``accepted`` rows.
        """
        if len(cascade) - self._held < max(EVERY, len(cascade) // SHARE):
            return
        if self._thread is not None and self._thread.is_alive():
            return
        self._held = len(cascade)  # where it fails too, the next is tried with as many more
        work = (cascade.arrays(), last, accepted)
        self._thread = threading.Thread(target=self._write, args=work, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until what is being written is there."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, arrays: dict[str, NDArray[Any]], last: Place, accepted: int) -> None:
        began = time.monotonic()
        try:
            sum_ = self._committed(last)
            if sum_ is None:
                return
            about = self._about() | {
                "session": self._sessions()[-1],
                "last": last,
                "accepted": accepted,
                "sum": sum_,
            }
            nbytes = sum(array.nbytes for array in arrays.values())
            status = os.statvfs(self._path.parent)
            if status.f_bavail * status.f_frsize < 2 * nbytes:
                self._log(f"{self._path}: not written, as the disk has little room left")
                return
            size = write_arrays(self._path, about, arrays)
        except (OSError, WoolmillError) as exc:
            self._log(f"{self._path}: not written: {exc}")
            return
        seconds = time.monotonic() - began
        self._log(f"{self._path}: {accepted:,} rows, {size / 1e6:,.0f} MB in {seconds:.1f} s")

    def _committed(self, last: Place) -> int | None:
        """The checksum of a decision, as soon as the store has it: until then a snapshot would be
        ahead. None where it does not come.
        """
        given_up = time.monotonic() + COMMITTED_S
        while (sum_ := self._store.decision_sum(*last)) is None and time.monotonic() < given_up:
            time.sleep(0.05)
        return sum_


@cache
def _code() -> str:
    """A hash of all that an index follows from besides settings and answers: this package's code,
    Unicode's tables, the order of bytes.
    """
    sum_ = hashlib.sha256(f"{sys.byteorder} {unicodedata.unidata_version}".encode())
    root = Path(engine.__file__).parent
    for source in sorted(root.rglob("*.py")):
        sum_.update(f"\0{source.relative_to(root)}\0".encode() + source.read_bytes())
    return sum_.hexdigest()
