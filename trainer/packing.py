"""Which records a step learns from, and how they are laid into micro-batches.

Everything here is a pure function of the seed and the step's number: a resumed run skips nothing
and repeats nothing, and no sampler state is saved. Records are packed *inside* each global batch,
so an optimizer step learns from exactly the records that it would see unpacked; the gradient is the
same up to rounding. The number of rows is a multiple of the processes that the run was planned for,
and rows are balanced by tokens, so that all processes work; process ``r`` of ``W`` takes numbers
``r, r + W, …``. A run keeps its plan when it goes on with another number of processes. The price:
rows that are less full, and therefore more of them, where the batch is small.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.cache import Dataset
from trainer.loss import IGNORE_INDEX
from trainer.tokens import Tokenised

__all__ = ["Batches", "MicroBatch", "Part", "balance", "collate", "epoch_order", "pack"]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What goes through the model at once: packed (B = 1, ``segments``) or padded rows."""

    input_ids: Tensor  # (B, T) int64
    position_ids: Tensor  # (B, T) int64, from 0 in each record
    positions: Tensor  # (N,) int64, into the flattened B x T: the states that predict a target
    targets: Tensor  # (N,) int64
    segments: tuple[int, ...] | None
    """Lengths of the records of a packed row; None: each row is one record."""

    def apart(self) -> MicroBatch:
        """The same records, each in a row of its own, padded at the right."""
        if self.segments is None:
            return self
        lengths = torch.tensor(self.segments, device=self.input_ids.device)
        starts = lengths.cumsum(0) - lengths
        rows = torch.nn.utils.rnn.pad_sequence
        ids, position = (
            rows(list(torch.split(tensor[0], list(self.segments))), batch_first=True)
            for tensor in (self.input_ids, self.position_ids)
        )
        row = torch.bucketize(self.positions, starts, right=True) - 1
        positions = row * ids.shape[1] + self.positions - starts[row]
        return MicroBatch(ids, position, positions, self.targets, None)

    def to(self, device: torch.device) -> MicroBatch:
        """The same on ``device``; not waited for, from page-locked memory to a GPU."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self, device: torch.device) -> MicroBatch:
        """The same in memory that ``device`` can read by itself."""
        return self._each(Tensor.pin_memory) if device.type == "cuda" else self

    def _each(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        return MicroBatch(
            change(self.input_ids),
            change(self.position_ids),
            change(self.positions),
            change(self.targets),
            self.segments,
        )


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indexes of ``lengths``, grouped so that no group is over ``capacity``.

    A length above the capacity gets a group of its own. O(n log n), and deterministic.
    """
    groups: list[list[int]] = []
    room: list[
        tuple[int, int]
    ] = []  # (free, group), sorted: the tightest fit is found by bisection
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        at = bisect.bisect_left(room, (length, -1))
        if at < len(room):
            free, group = room.pop(at)
        else:
            free, group = capacity, len(groups)
            groups.append([])
        groups[group].append(index)
        bisect.insort(room, (free - length, group))
    return groups


def balance(lengths: Sequence[int], capacity: int, processes: int) -> list[list[int]]:
    """As few groups as :func:`pack` makes, up to the next multiple of ``processes``, the longest
    first, so that little time is lost when ``processes`` take them in turn and wait for each other.

    Fewer than a multiple come back only where there are too few ``lengths``, or one of the last
    alone is longer than the others together.
    """
    groups: list[list[int]] = []
    left = list(range(len(lengths)))
    rounds = math.ceil(len(pack(lengths, capacity)) / processes)
    while left:
        own = [lengths[i] for i in left]
        found = [[left[i] for i in group] for group in _even(own, capacity, rounds * processes)]
        if rounds == 1 or len(found) == min(len(left), rounds * processes):
            sums = [sum(lengths[i] for i in group) for group in found]
            order = sorted(range(len(found)), key=lambda n: (-sums[n], found[n][0]))
            return groups + [found[n] for n in order]
        # One long record sets the pace of this round, so the longest go along with it: pack makes
        # their groups first.
        groups += found[:processes]
        left = sorted(i for group in found[processes:] for i in group)
        rounds -= 1
    return groups


def _even(lengths: Sequence[int], capacity: int, most: int) -> list[list[int]]:
    """At most ``most`` groups, the longest of them about as short as can be.

    MULTIFIT (Coffman, Garey, Johnson 1978): the smallest capacity that still gives so few groups.
    """
    low, high = max(-(-sum(lengths) // most), *lengths), capacity
    while high - low > high // 256:
        middle = (low + high) // 2
        low, high = (low, middle) if len(pack(lengths, middle)) <= most else (middle + 1, high)
    return pack(lengths, high)


class Part(NamedTuple):
    """One source of a mixture: ``records`` of the plan's indexes, of which every epoch takes
    ``an_epoch`` (more than ``records``: some of them again).
    """

    records: int
    an_epoch: int


def epoch_order(records: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which epoch ``epoch`` visits ``records`` records."""
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    return generator.permutation(records)


def _mixed_order(parts: Sequence[Part], seed: int, epoch: int) -> np.ndarray:
    """The same for a mixture: numbers of all its records, the sources' one after the other."""
    chosen: list[np.ndarray] = []
    first = 0
    for number, part in enumerate(parts, start=1):
        # Each source is a stream of its own epochs, of which this epoch takes the next stretch.
        start = epoch * part.an_epoch
        own_epochs = range(start // part.records, -(-(start + part.an_epoch) // part.records))
        orders = [
            np.random.Generator(np.random.PCG64([seed, own, number])).permutation(part.records)
            for own in own_epochs
        ]
        at = start - own_epochs.start * part.records
        chosen.append(first + np.concatenate(orders)[at : at + part.an_epoch])
        first += part.records
    every: np.ndarray = np.concatenate(chosen)
    shuffled: np.ndarray = every[epoch_order(len(every), seed, epoch)]
    return shuffled


@functools.lru_cache(maxsize=2)
def _order(records: int, parts: tuple[Part, ...], seed: int, epoch: int) -> np.ndarray:
    """Kept for the steps of one epoch: drawing it takes as long as the dataset is large."""
    order = _mixed_order(parts, seed, epoch) if parts else epoch_order(records, seed, epoch)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class Batches:
    """The plan of a run over ``dataset``: for each step its micro-batches.

    Args:
        indexes: the records of ``dataset`` that are used.
        global_batch: records of a step.
        rows: records of a padded micro-batch; packed, a row holds ``rows * max_length`` tokens.
        processes: of which all should be busy; 8 serves 1, 2, 4 and 8.
        parts: the sources of a mixture, whose records ``indexes`` has one after the other.
    """

    dataset: Dataset
    indexes: np.ndarray
    global_batch: int
    rows: int
    max_length: int
    packing: bool
    seed: int
    processes: int = 8
    parts: tuple[Part, ...] = ()

    @property
    def records_per_epoch(self) -> int:
        """Records of an epoch; a mixture may take some of its records twice, and some not."""
        return sum(part.an_epoch for part in self.parts) or len(self.indexes)

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch takes what is left."""
        return math.ceil(self.records_per_epoch / self.global_batch)

    @property
    def capacity(self) -> int:
        """Tokens of a packed row at most."""
        return self.rows * self.max_length

    def records(self, step: int) -> list[int]:
        """Indexes into the dataset of the records of step ``step`` (from 0)."""
        epoch, at = divmod(step, self.steps_per_epoch)
        order = _order(len(self.indexes), self.parts, self.seed, epoch)
        chosen = order[at * self.global_batch : (at + 1) * self.global_batch]
        return [int(self.indexes[i]) for i in chosen]

    def in_order(self) -> list[list[int]]:
        """All records once, unshuffled, as micro-batches: for evaluation."""
        return self.group([int(i) for i in self.indexes])

    def micro_batches(self, step: int) -> list[list[int]]:
        """The records of step ``step``, grouped into micro-batches."""
        return self.group(self.records(step))

    def group(self, records: list[int]) -> list[list[int]]:
        """``records`` in micro-batches. Padded, neighbours in length share one: less padding, and
        processes with shorter records wait; packed rows are balanced.
        """
        lengths = [int(self.dataset.lengths[i]) for i in records]
        if self.packing:
            groups = balance(lengths, self.capacity, self.processes)
        else:
            by_length = sorted(range(len(records)), key=lambda i: (-lengths[i], i))
            rounds = math.ceil(len(records) / (self.rows * self.processes))
            count = min(len(records), rounds * self.processes)
            groups = [part.tolist() for part in np.array_split(by_length, count)]
        return [[records[i] for i in group] for group in groups]

    def busy(self, groups: list[list[int]], processes: int) -> float:
        """The share of the time of ``processes`` that is work, if time goes by positions: in each
        round all wait for the one with the longest micro-batch.
        """
        lengths = self.dataset.lengths
        work = [
            int(lengths[group].sum() if self.packing else lengths[group].max() * len(group))
            for group in groups
        ]
        longest = sum(max(work[i : i + processes]) for i in range(0, len(work), processes))
        return sum(work) / (longest * processes)

    def targets(self, records: list[int]) -> int:
        """How many tokens of ``records`` are learned."""
        return int(self.dataset.targets[records].sum())

    def collate(self, records: list[int]) -> MicroBatch:
        """The tensors of one micro-batch."""
        return collate([self.dataset[i] for i in records], packing=self.packing)


def collate(records: Sequence[Tokenised], *, packing: bool) -> MicroBatch:
    """Lay ``records`` into one packed row, or into padded rows.

    Padding is id 0 at the right: causal attention never looks there from a real token, and no
    target stands there, so its value does not matter and no attention mask is needed.
    """
    longest = max(len(record.ids) for record in records)
    ids = np.zeros((len(records), longest), np.int64)
    position = np.zeros((len(records), longest), np.int64)
    target = np.full((len(records), longest), IGNORE_INDEX, np.int64)
    for row, record in enumerate(records):
        length = len(record.ids)
        ids[row, :length] = record.ids
        position[row, :length] = np.arange(length)
        # The state at t predicts the token at t + 1.
        target[row, : length - 1] = np.where(record.learned[1:], record.ids[1:], IGNORE_INDEX)
    segments = None
    if packing:
        segments = tuple(len(record.ids) for record in records)
        real = np.arange(longest) < np.array(segments)[:, None]
        ids, position, target = (array[real][None] for array in (ids, position, target))
    positions = np.flatnonzero(target != IGNORE_INDEX)
    return MicroBatch(
        torch.from_numpy(ids),
        torch.from_numpy(position),
        torch.from_numpy(positions),
        torch.from_numpy(target.reshape(-1)[positions]),
        segments,
    )
