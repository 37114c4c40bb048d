"""Pools: what a recipe that shows accepted rows may see of them, so that the dataset still follows
from the answers alone.

    requests   0 ─ 63 │ 64 ─ 127 │ 128 ─ 255 │ 256 ─ 511 │ …          epochs
    see rows   none   │ none     │ of 0 ─ 63 │ of 0 ─ 127 │ …         two epochs behind
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import overload

from engine.records import Record
from engine.store import RunReader

__all__ = ["LARGEST_EPOCH", "Pooled", "epoch_starts"]

FIRST_EPOCH, LARGEST_EPOCH = 64, 4096
"""Requests. Epochs grow from few, so that the first rows are shown soon, to so many that the two by
which a pool lags are waited for by nobody while fewer than a tenth of one are in flight.
"""


def epoch_starts(beyond: int) -> list[int]:
    """The first request of each epoch, up to the first start beyond a number: 0, 64, 128, 256, …"""
    starts, size = [0, FIRST_EPOCH], FIRST_EPOCH
    while starts[-1] <= beyond:
        starts.append(starts[-1] + size)
        size = min(LARGEST_EPOCH, 2 * size)
    return starts


class Visible(Sequence[Record]):
    """The first rows of a growing list."""

    def __init__(self, rows: list[Record], count: int) -> None:
        self._rows = rows
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | Sequence[Record]:
        if isinstance(place, slice):
            return self._rows[: self._count][place]
        return self._rows[range(self._count)[place]]


class Pooled:
    """What a recipe that shows accepted rows may see of them: those of all epochs but the two last.

    So what a request shows depends on its number and the answers alone, and hardly ever on whether
    one slow answer has arrived: a request of epoch e sees rows from requests of epochs up to e - 2,
    and may be sent when these are decided.
    """

    def __init__(self, store: RunReader) -> None:
        self._store = store
        self._after = (-1, -1)
        self._rows: list[Record] = []
        self._requests: list[int] = []

    def take_in(self) -> None:
        """Take in what was committed since the last time."""
        for decision in self._store.decisions(accepted=True, after=self._after):
            if decision.record is not None:
                self._rows.append(decision.record)
                self._requests.append(decision.index)
            self._after = (decision.index, decision.position)

    def seen_by(self, request: int) -> Sequence[Record]:
        """The rows that a request may show."""
        starts = epoch_starts(request)
        epoch = bisect_right(starts, request) - 1
        visible = starts[epoch - 1] if epoch else 0
        return Visible(self._rows, bisect_left(self._requests, visible))

    def possible(self, undecided: int) -> int:
        """How many requests may be sent where all below ``undecided`` are decided."""
        starts = epoch_starts(undecided + 2 * LARGEST_EPOCH)
        decided = bisect_right(starts, undecided) - 1  # epochs that are, as a whole
        return starts[decided + 2]
