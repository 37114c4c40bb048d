"""Which records a step learns from, and how they are laid into micro-batches.

Everything here is a pure function of the seed and the step's number: a resumed run skips nothing
and repeats nothing, and no sampler state is saved. Records are packed *inside* each global batch,
so an optimizer step learns from exactly the records that it would see unpacked; the gradient is the
same up to rounding. And micro-batches do not depend on how many processes there are: process ``r``
of ``W`` takes numbers ``r, r + W, …``. The price: rows are as full as one batch allows (0.97 with
16 short records, more with more), and when their number is no multiple of ``W`` some processes sit
out the last round.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.cache import TokenDataset
from trainer.loss import IGNORE_INDEX
from trainer.tokens import Tokenised

__all__ = ["Batches", "MicroBatch", "collate", "epoch_order", "pack"]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What goes through the model at once: packed (B = 1, ``segments``) or padded rows."""

    input_ids: Tensor  # (B, T) int64
    position_ids: Tensor  # (B, T) int64, from 0 in each record
    positions: Tensor  # (N,) int64, into the flattened B x T: the states that predict a target
    targets: Tensor  # (N,) int64
    segments: tuple[int, ...] | None
    """Lengths of the records of a packed row; None: each row is one record."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on ``device``."""
        return MicroBatch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.positions.to(device),
            self.targets.to(device),
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


def epoch_order(records: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which epoch ``epoch`` visits ``records`` records."""
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    return generator.permutation(records)


@dataclass(frozen=True)
class Batches:
    """The plan of a run over ``dataset``: for each step its micro-batches.

    Args:
        indexes: the records of ``dataset`` that are used.
        global_batch: records of a step.
        rows: records of a padded micro-batch; packed, a row holds ``rows * max_length`` tokens.
    """

    dataset: TokenDataset
    indexes: np.ndarray
    global_batch: int
    rows: int
    max_length: int
    packing: bool
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch takes what is left."""
        return math.ceil(len(self.indexes) / self.global_batch)

    @property
    def capacity(self) -> int:
        """Tokens of a packed row at most."""
        return self.rows * self.max_length

    def records(self, step: int) -> list[int]:
        """Indexes into the dataset of the records of step ``step`` (from 0)."""
        epoch, at = divmod(step, self.steps_per_epoch)
        order = epoch_order(len(self.indexes), self.seed, epoch)
        chosen = order[at * self.global_batch : (at + 1) * self.global_batch]
        return [int(self.indexes[i]) for i in chosen]

    def in_order(self) -> list[list[int]]:
        """All records once, unshuffled, as micro-batches: for evaluation."""
        return self.group([int(i) for i in self.indexes])

    def micro_batches(self, step: int) -> list[list[int]]:
        """The records of step ``step``, grouped into micro-batches."""
        return self.group(self.records(step))

    def group(self, records: list[int]) -> list[list[int]]:
        """``records`` in micro-batches. Padded, neighbours in length share one: less padding."""
        lengths = [int(self.dataset.lengths[i]) for i in records]
        if self.packing:
            groups = pack(lengths, self.capacity)
        else:
            by_length = sorted(range(len(records)), key=lambda i: (-lengths[i], i))
            groups = [by_length[i : i + self.rows] for i in range(0, len(records), self.rows)]
        return [[records[i] for i in group] for group in groups]

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
