"""How much memory a run will need, from the shape of its model, before anything is loaded.

An estimate: what is counted is what grows with the model and the rows (weights, gradients, moments,
gathered blocks, activations, logits); what is not is the libraries' own few hundred megabytes and
what an allocator wastes. tests/trainer/test_memory.py compares it with what a run took.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.config import Settings
from trainer.loss import LOGIT_BYTES
from trainer.model import TokenLoss

__all__ = ["Need", "available_bytes", "estimate"]

_STATE = 16
"""Bytes of a parameter that learns: float32 weight, gradient and two moments."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of one device, and of the host while rank 0 loads."""

    states: int
    """Weights, gradients and moments: this rank's shard."""
    gathered: int
    """Blocks that FSDP holds whole at a time, and the embedding and head, in the compute type."""
    activations: int
    """Of one row, from its forward to its backward pass."""
    logits: int
    """One chunk of them, and the gradient of the head."""
    loading: int
    """The whole model in float32, in the memory of the host of rank 0."""

    @property
    def device(self) -> int:
        """All of it that is there at once on a device."""
        return self.states + self.gathered + self.activations + self.logits

    def line(self, device: str, room: int, host_room: int) -> str:
        """For the person, with how much there is."""
        parts = ", ".join(
            f"{name} {getattr(self, name) / 1e9:.1f}"
            for name in ("states", "gathered", "activations", "logits")
        )
        advice = (
            "; lower --per_device_train_batch_size, or use --gradient_checkpointing, --lora_r or"
            " more processes"
            if self.device > room
            else ""
        )
        host = ""
        if self.loading > host_room:
            host = (
                f"; loading needs {self.loading / 1e9:.1f} GB of the host's memory, which has"
                f" {host_room / 1e9:.1f}"
            )
        return (
            f"needs about {self.device / 1e9:.1f} of {room / 1e9:.1f} GB {device} ({parts})"
            f"{advice}{host}"
        )


def estimate(
    model: TokenLoss,
    blocks: list[nn.Module],
    settings: Settings,
    *,
    shards: int,
    compute: torch.dtype,
    frozen: torch.dtype,
    device: torch.device,
) -> Need:
    """What a rank will need for ``model``, which may be on the meta device.

    Args:
        blocks: the groups that FSDP gathers one by one.
        shards: processes that share one copy of the model.
        frozen: the type that parameters which do not learn are kept in.
    """
    parameters = list(model.parameters())
    learned = sum(p.numel() for p in parameters if p.requires_grad)
    still = sum(p.numel() for p in parameters) - learned
    states = (learned * _STATE + still * frozen.itemsize) // shards
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks]
    root = learned + still - sum(in_blocks)
    wrapped = shards > 1 or compute != torch.float32
    gathered = (2 * max(in_blocks, default=0) + root) * compute.itemsize if wrapped else 0
    head = model.hf.get_output_embeddings().weight
    logits = LOGIT_BYTES.get(device.type, LOGIT_BYTES["cuda"])
    logits += 4 * head.numel() if head.requires_grad else 0
    return Need(
        states,
        gathered,
        _activations(model.hf, settings, compute, len(blocks)),
        logits,
        4 * (learned + still),
    )


def _activations(hf: Any, settings: Settings, compute: torch.dtype, layers: int) -> int:
    config = hf.config.get_text_config()
    tokens = settings.optim.per_device_train_batch_size * settings.data.model_max_length
    hidden: int = config.hidden_size
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or hidden // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    if experts := getattr(config, "num_experts_per_tok", None):
        inner = experts * (getattr(config, "moe_intermediate_size", None) or inner)
    # Kept for the backward pass: both norms' input and output and the residual stream; query, key,
    # value, rotated ones and the attention's result; what goes into the activation and comes out,
    # and with a gate the other half and their product.
    gated = any("gate" in name for name, _ in hf.named_parameters())
    layer = 6 * hidden + (3 * heads + 3 * shared) * width + (4 if gated else 2) * inner
    kept = hidden * layers + layer if settings.model.gradient_checkpointing else layer * layers
    return tokens * (kept + 4 * hidden) * compute.itemsize


def available_bytes(device: torch.device) -> int:
    """Memory that is free: of the GPU, or of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            facts = dict(line.split(":", 1) for line in file)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
