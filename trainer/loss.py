"""The summed cross-entropy of the labelled positions, without ever holding their logits at once.

Full logits of one row of 2,048 tokens and 49k words are 400 MB, and a straightforward backward pass
holds them three times; most of them belong to the prompt and are thrown away. Here only labelled
positions reach the output head, some at a time, and their gradient is worked out while their logits
exist (Liger Kernel's idea, https://arxiv.org/abs/2410.10989). The price: the gradient of the head's
weight is kept from the forward to the backward pass, and a second derivative does not exist.

The sum, not the mean: the caller divides by the number of target tokens of the whole global batch,
so that the loss does not depend on how the batch was split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["IGNORE_INDEX", "LogitShape", "summed_cross_entropy"]

IGNORE_INDEX = -100
"""The label of a position that is not learned from; PyTorch's and Alpaca's number."""

CHUNK = 128
"""Positions that go through the head together: 128 x 49k x 4 bytes are 24 MiB of logits."""


@dataclass(frozen=True, slots=True)
class LogitShape:
    """What an architecture does to the head's output: ``cap x tanh(scale x logits / cap)``."""

    scale: float = 1.0
    cap: float | None = None


def summed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    shape: LogitShape | None = None,
) -> Tensor:
    """Sum of ``-log p(target)`` over ``N`` positions, a scalar in float64.

    Args:
        hidden: (N, H), the states that predict the targets.
        weight: (V, H) of the output head.
        bias: (V,) or None.
        targets: (N,) token ids; no IGNORE_INDEX among them.
        shape: what follows the head, when it is not the identity.
    """
    arguments = (hidden, weight, bias, targets, shape or LogitShape())
    loss: Tensor = _SummedCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shape: LogitShape,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None  # type: ignore[arg-type]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(targets), CHUNK):
            h, t = hidden[start : start + CHUNK], targets[start : start + CHUNK]
            logits = torch.nn.functional.linear(h, weight, bias).float()  # (n, V)
            logits, slope = _shaped(logits, shape)
            lse = logits.logsumexp(dim=1)
            total += (lse - logits.gather(1, t[:, None])[:, 0]).sum(dtype=torch.float64)
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            # d loss / d logits = softmax - one-hot, written over the logits.
            grad = logits.sub_(lse[:, None]).exp_()
            grad[torch.arange(len(t), device=t.device), t] -= 1.0
            if slope is not None:
                grad.mul_(slope)
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + CHUNK])
            if grad_weight is not None:
                if grad.dtype == torch.float32:
                    grad_weight.addmm_(grad.T, h)
                else:
                    grad_weight += grad.T @ h
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (upstream,) = outputs
        scaled = tuple(
            None if gradient is None else gradient.mul_(upstream.to(gradient.dtype)).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        ctx.gradients = (None, None, None)
        return *scaled, None, None


def _shaped(logits: Tensor, shape: LogitShape) -> tuple[Tensor, Tensor | None]:
    """Apply ``shape`` in place; the second value is its derivative, None for the identity."""
    if shape.scale == 1.0 and shape.cap is None:
        return logits, None
    logits.mul_(shape.scale)
    if shape.cap is None:
        return logits, torch.full((), shape.scale, device=logits.device)
    squashed = logits.div_(shape.cap).tanh_()
    slope = squashed.square().neg_().add_(1.0).mul_(shape.scale)
    return squashed.mul_(shape.cap), slope
