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

__all__ = [
    "IGNORE_INDEX",
    "LOGIT_BYTES",
    "LogitShape",
    "chunk_length",
    "shaped",
    "summed_cross_entropy",
]

IGNORE_INDEX = -100
"""The label of a position that is not learned from; PyTorch's and Alpaca's number."""

LOGIT_BYTES = {"cpu": 24 * 2**20, "cuda": 512 * 2**20}
"""Of logits that exist at once. On a processor they should stay near its caches: 128 positions of
49k words. On a GPU each chunk reads the head twice and its gradient once, so that they should be
few: 1,024 positions of 128k words."""


def chunk_length(vocabulary: int, device: torch.device) -> int:
    """Positions that go through the head together."""
    fitting = LOGIT_BYTES.get(device.type, LOGIT_BYTES["cuda"]) // (4 * vocabulary)
    return min(max(fitting, 16), 4096)


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
        # One buffer for the logits of all chunks: fresh pages cost as much as the exponentials.
        chunk = chunk_length(len(weight), hidden.device)
        rows = min(chunk, len(targets))
        buffer = torch.empty(rows, len(weight), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), chunk):
            h, t = hidden[start : start + chunk], targets[start : start + chunk]
            logits = buffer[: len(t)]  # (n, V)
            if weight.dtype == torch.float32:
                torch.mm(h, weight.T, out=logits)
            else:
                logits.copy_(h @ weight.T)
            if bias is not None:
                logits += bias
            slope = shaped(logits, shape)
            target_logit = logits.gather(1, t[:, None])
            top = logits.max(dim=1, keepdim=True)
            # The fused softmax is ten times as fast as a logsumexp and an exponential, and the
            # logsumexp can be read off it where it is largest: log p = logit - logsumexp.
            p = torch.softmax(logits, dim=1, out=logits)
            logsumexp = top.values - p.gather(1, top.indices).log()
            total += (logsumexp - target_logit).sum(dtype=torch.float64)
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            # d loss / d logits = softmax - one-hot, written over the logits.
            grad = p
            grad[torch.arange(len(t), device=t.device), t] -= 1.0
            if slope is not None:
                grad *= slope
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + chunk])
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


def shaped(logits: Tensor, shape: LogitShape) -> Tensor | None:
    """Apply ``shape`` in place and return its derivative; None for the identity."""
    if shape.scale == 1.0 and shape.cap is None:
        return None
    logits *= shape.scale
    if shape.cap is None:
        return torch.tensor(shape.scale, device=logits.device)
    logits.div_(shape.cap).tanh_()
    slope = logits.square().neg_().add_(1.0).mul_(shape.scale)
    logits *= shape.cap
    return slope
