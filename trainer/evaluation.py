"""The loss on records that are not learned from: how ranks share them, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trainer.fsdp import reshard
from trainer.model import TokenLoss
from trainer.packing import Batches, MicroBatch, collate
from trainer.ranks import Ranks
from trainer.tokens import Tokenised

__all__ = ["mean_loss", "own", "read"]


@torch.no_grad()
def mean_loss(model: TokenLoss, batches: Batches, ranks: Ranks) -> tuple[float, int]:
    """The mean loss over the target tokens of all records of ``batches``, in nats, and how many
    such tokens there are. Collective.
    """
    model.eval()
    groups = batches.in_order()
    losses, summed = [0.0] * len(groups), {}
    for number, batch in own(groups, batches, ranks):
        summed[number] = model(batch.to(ranks.device))
    for number, value in zip(summed, read(list(summed.values())), strict=True):
        if number < len(groups):
            losses[number] = value
    reshard(model)
    model.train()
    losses = ranks.sum(losses)
    targets = sum(batches.targets(group) for group in groups)
    return math.fsum(losses) / targets, targets


def own(
    groups: list[list[int]], batches: Batches, ranks: Ranks
) -> Iterator[tuple[int, MicroBatch]]:
    """This rank's micro-batches with their numbers. All ranks get the same count of them, the last
    of some being one token that is not learned from, since FSDP's collectives need everyone.
    """
    for number in range(ranks.rank, math.ceil(len(groups) / ranks.size) * ranks.size, ranks.size):
        if number < len(groups):
            batch = batches.collate(groups[number])
        else:
            nothing = Tokenised(np.zeros(1, np.int32), np.zeros(1, np.bool_))
            batch = collate([nothing], packing=batches.packing)
        yield number, batch


def read(values: list[Tensor]) -> list[float]:
    """``values`` (scalars) from the device, all at once."""
    return torch.stack(values).tolist() if values else []
