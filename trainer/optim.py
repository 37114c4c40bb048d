"""The optimizer, the learning rate as a function of the step, and their place in a checkpoint."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.config import OptimSettings
from trainer.model import TokenLoss

__all__ = ["learning_rate", "make_optimizer", "training_state"]

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, in torch's names; a checkpoint holds both beside it."""


def make_optimizer(model: TokenLoss, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over what is learned; vectors do not decay, as in transformers' Trainer."""
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=settings.optim == "adamw_torch_fused",
    )


def learning_rate(settings: OptimSettings, step: int, total: int) -> float:
    """The rate of step ``step`` (from 0) of ``total``, as transformers' schedules have it."""
    warmup = settings.warmup(total)
    if step < warmup:
        return settings.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if settings.lr_scheduler_type == "cosine":
        return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    if settings.lr_scheduler_type == "linear":
        return settings.learning_rate * (1 - progress)
    return settings.learning_rate


def training_state(
    model: TokenLoss, optimizer: torch.optim.Optimizer, *, updates: int | None = None
) -> dict[str, Tensor]:
    """Every tensor that must survive: what is learned, and the optimizer's two moments of it.

    The tensors are the live ones: saving copies them, and loading writes into them. ``updates``
    gives a new optimizer its moments first, to be loaded into.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in model.hf.named_parameters():
        if not parameter.requires_grad:
            continue
        state[f"model/{name}"] = parameter.detach()
        if updates is not None:
            # AdamW counts its own updates, for the bias correction.
            step = torch.tensor(float(updates), device=parameter.device)
            optimizer.state[parameter] = {"step": step} | {
                moment: torch.zeros_like(parameter) for moment in _MOMENTS
            }
        for moment in _MOMENTS:
            # Missing before the first update: a run whose first losses were not finite.
            known = optimizer.state[parameter].get(moment)
            state[f"{moment}/{name}"] = torch.zeros_like(parameter) if known is None else known
    return state
