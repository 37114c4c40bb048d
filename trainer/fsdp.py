"""Spread the model over the processes: a mesh, ``fully_shard``, and rank 0's weights handed out.

Each transformer block is a group that is gathered and freed by itself; what is left (embedding,
final norm, output head, tied or not) is the root's group. A single process has nothing to gather:
in float32 its model stays whole, which saves three copies of the weights a pass; in bfloat16 it is
wrapped all the same, since FSDP is what keeps the float32 masters. The price is a second path: the
tests compare both, bit for bit.
"""

from __future__ import annotations

import difflib
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.config import ParallelSettings
from trainer.errors import ConfigError
from trainer.model import TokenLoss
from trainer.ranks import Ranks

__all__ = ["apply_fsdp", "blocks", "hand_out", "local", "make_mesh", "replica_count", "reshard"]


def replica_count(settings: ParallelSettings, ranks: Ranks) -> int:
    """How many copies of the sharded model there are.

    Raises:
        ConfigError: the processes cannot be divided into so many.
    """
    replicas = settings.replicas or 1
    if "no_shard" in settings.fsdp:
        replicas = ranks.size
    elif "hybrid_shard" in settings.fsdp:
        replicas = max(1, ranks.size // ranks.local_size)
    if ranks.size % replicas:
        raise ConfigError(f"--replicas {replicas} does not divide {ranks.size} processes")
    return replicas


def make_mesh(replicas: int, ranks: Ranks) -> DeviceMesh:
    """The mesh: ``shard``, or ``replicate`` x ``shard`` for hybrid sharding."""
    kind = ranks.device.type
    if replicas == 1:
        return init_device_mesh(kind, (ranks.size,), mesh_dim_names=("shard",))
    shape = (replicas, ranks.size // replicas)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def apply_fsdp(
    model: TokenLoss,
    groups: list[nn.Module],
    mesh: DeviceMesh,
    settings: ParallelSettings,
    compute: torch.dtype,
) -> None:
    """Shard ``model``, which is still on the meta device, in place: each of ``groups`` by itself.

    Gradients are summed in float32 whatever the compute type, and summed, not averaged: the loss is
    divided by the global count of targets already.
    """
    if mesh.size() == 1 and compute == torch.float32:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=compute if compute != torch.float32 else None, reduce_dtype=torch.float32
    )
    offload = (
        CPUOffloadPolicy()
        if "offload" in settings.fsdp and mesh.device_type != "cpu"
        else OffloadPolicy()
    )
    # False keeps a block's gathered weights from its forward to its backward pass (ZeRO-2).
    reshard = "shard_grad_op" not in settings.fsdp
    for block in groups:
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=reshard,
        )
    fully_shard(
        model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo knows no pre-multiplied sum.
            module.set_force_sum_reduction_for_comms(True)


def blocks(model: TokenLoss, names: tuple[str, ...] = ()) -> list[nn.Module]:
    """The transformer blocks: modules of the classes ``names``, or else those that the
    architecture itself says must stay in one piece.

    Raises:
        ConfigError: no module has that class; names those that occur.
    """
    wanted = set(names) or set(model.hf._no_split_modules or ())
    found = [module for module in model.hf.modules() if type(module).__name__ in wanted]
    missing = wanted & set(names) - {type(module).__name__ for module in found}
    if missing:
        counts = Counter(
            type(m).__name__ for m in model.hf.modules() if any(True for _ in m.children())
        )
        repeated = [name for name, count in counts.items() if count > 1]
        wrong = min(missing)
        near = difflib.get_close_matches(wrong, repeated, n=1, cutoff=0.0)
        raise ConfigError(
            f"--fsdp_transformer_layer_cls_to_wrap: {type(model.hf).__name__} has no {wrong!r};"
            f" did you mean {near[0] if near else 'to leave the flag out'!r}?"
        )
    if not found:
        lists = [m for m in model.hf.modules() if isinstance(m, nn.ModuleList)]
        found = list(max(lists, key=len, default=()))
    return found


@torch.no_grad()
def hand_out(model: TokenLoss, source: TokenLoss | None, ranks: Ranks, *, offload: bool) -> None:
    """Give the sharded ``model`` memory, and fill it from rank 0's ``source``.

    One tensor at a time crosses the wire, so no other rank ever holds the whole model.
    """
    model.to_empty(device="cpu" if offload else ranks.device)
    model.hf.tie_weights()  # to_empty gives tied tensors memory of their own
    weights = dict(source.hf.named_parameters()) if source is not None else {}
    for name, parameter in model.hf.named_parameters():
        full = weights[name] if weights else torch.empty(parameter.shape)
        full = full.to(parameter.dtype)
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            full = distribute_tensor(full.to(mesh.device_type), mesh, parameter.placements)
        parameter.copy_(full)
    buffers = dict(source.hf.named_buffers()) if source is not None else {}
    for name, buffer in model.hf.named_buffers():
        buffer.copy_(buffers[name]) if buffers else None
        dist.broadcast(buffer, src=0)


def reshard(model: nn.Module) -> None:
    """Free what forward passes without a backward pass have left gathered. Until then parameters
    are whole tensors in the compute type, which neither a checkpoint nor an export must take.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
