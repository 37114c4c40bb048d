"""Causal attention inside each record of a packed row, for any transformers model.

Records that share a row must not see each other. On a CPU a masked row costs the square of its
length, so every record gets its own call of the fused kernel; on a GPU one call of the
variable-length kernel takes them all, if it takes such heads at all, which is tried. The function
is registered with transformers under a name of ours, and the model's forward passes ``segments``
down to it untouched. The price: soft-capped scores (Gemma 2) and attention sinks (gpt-oss) are
computed in the open, and attention dropout takes the slower of the two ways.

A padded row needs no mask either: padding stands at the right, where causal attention from a real
token never looks.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from trainer.metrics import say_once

__all__ = ["ALONE", "IMPLEMENTATION", "segment_attention"]

IMPLEMENTATION = "woolmill_segments"
"""What ``attn_implementation`` must be for a model to use this file."""

ALONE = "woolmill_alone"
"""The same attention under another name, for models whose records cannot share a row."""


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (B, heads, T, D) in, (B, T, heads, D) out.

    ``segments`` are the lengths of a row's records, and sum to T; None: each row is one record.
    ``sliding_window`` counts the positions a query sees, itself included. ``s_aux`` (heads,) are
    attention sinks: a score more in every softmax, of a position that has no value.
    """
    lengths = segments or (query.shape[2],)
    plain = softcap is None and s_aux is None and not dropout
    if (
        plain
        and query.shape[0] == 1
        and _on_gpu(query)
        and _kernel_fits(query, key, value, sliding_window)
    ):
        return _variable_length(query, key, value, lengths, scaling, sliding_window), None
    out = _each_segment(
        query, key, value, lengths, scaling, sliding_window, softcap, dropout, s_aux
    )
    return out, None


def _on_gpu(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def _one_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    length = query.shape[2]
    mask = None
    in_the_open = softcap is not None or sinks is not None
    if in_the_open or (window is not None and window < length):
        distance = torch.arange(length, device=query.device)
        distance = distance[:, None] - distance[None, :]  # (T, T), query minus key position
        mask = (distance >= 0) & (distance < (window or length))
    if not in_the_open:
        return scaled_dot_product_attention(
            query, key, value, mask, dropout, mask is None, scale=scaling, enable_gqa=True
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[3] ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # type: ignore[operator]
    if sinks is not None:
        sink = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = weights[..., :length]
    return torch.dropout(weights, dropout, train=True) @ value


def _variable_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """All records at once: (1, heads, T, D) in, (1, T, heads, D) out."""
    from torch.nn.attention import varlen

    edges, longest = _edges(lengths, query.device), max(lengths)
    # PyTorch 2.10 has this function without a scale, a window and shared heads.
    takes = inspect.signature(varlen.varlen_attn).parameters
    options: dict[str, Any] = {}
    if "scale" in takes:
        options["scale"] = scaling
    elif scaling is not None:
        query = query * (scaling * query.shape[3] ** 0.5)
    if "window_size" in takes:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None or window >= longest:
        options["is_causal"] = True
    else:
        raise NotImplementedError("this PyTorch has no sliding window")
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in takes:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, D)
    out = varlen.varlen_attn(q, k, v, edges, edges, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out[None]


@functools.lru_cache(maxsize=16)
def _edges(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where records begin, and the end: made once for all layers."""
    edges = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return edges.to(device, non_blocking=True)


def _kernel_fits(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> bool:
    """Whether the variable-length kernel takes heads like these, forward and backward, and computes
    what the other way does. Tried once for each kind of head, on 14 positions.
    """
    shapes = tuple((t.shape[1], t.shape[3]) for t in (query, key, value))
    return _tried(shapes, query.dtype, query.device, window is not None)


@functools.lru_cache(maxsize=64)
def _tried(
    shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device, windowed: bool
) -> bool:
    lengths, window = (5, 9), 3 if windowed else None
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, heads, sum(lengths), width, generator=generator).to(device, dtype)
        for heads, width in shapes
    ]
    results = []
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for way in (_variable_length, _each_segment):
                q, k, v = (tensor.clone().requires_grad_() for tensor in tensors)
                out = way(q, k, v, lengths, None, window)
                gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
                results.append([out.detach(), *gradients])
    except (RuntimeError, TypeError, NotImplementedError, ImportError, AssertionError) as exc:
        why = str(exc).partition("\n")[0]
    else:
        worst = max(
            float((a - b).float().norm() / b.float().norm()) for a, b in zip(*results, strict=True)
        )
        if worst < 0.05:
            return True
        why = f"its result differs by {worst:.1e}"
    heads = " and ".join(str(width) for width in sorted({width for _, width in shapes}))
    say_once(f"attention: one record at a time, which is slower, for heads of {heads}: {why}")
    return False


def _each_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scaling: float | None,
    window: int | None,
    softcap: float | None = None,
    dropout: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """One record at a time: (B, heads, T, D) in, (B, T, heads, D) out."""
    # split, not slices: the backward pass of a slice fills a tensor of the whole row with zeros.
    parts = (tensor.split(lengths, dim=2) for tensor in (query, key, value))  # type: ignore[no-untyped-call]
    out = [
        _one_segment(q, k, v, scaling, dropout, window, softcap, sinks)
        for q, k, v in zip(*parts, strict=True)
    ]
    joined = out[0] if len(out) == 1 else torch.cat(out, dim=2)
    return joined.transpose(1, 2)


for _name in (IMPLEMENTATION, ALONE):
    AttentionInterface.register(_name, segment_attention)
