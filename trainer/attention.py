"""Causal attention inside each record of a packed row, for any transformers model.

Records that share a row must not see each other. On a CPU a masked row costs the square of its
length, so every record gets its own call of the fused kernel; on a GPU one call of the
variable-length kernel takes them all. The function is registered with transformers under a name of
ours, and the model's forward passes ``segments`` down to it untouched. The price: soft-capped
scores (Gemma 2) and attention sinks (gpt-oss) are computed in the open, and attention dropout takes
the slower of the two ways.

A padded row needs no mask either: padding stands at the right, where causal attention from a real
token never looks.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

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
    half = query.dtype in (torch.bfloat16, torch.float16)
    plain = softcap is None and s_aux is None and not dropout
    if query.is_cuda and half and query.shape[0] == 1 and plain:
        return _variable_length(query, key, value, lengths, scaling, sliding_window), None
    # split, not slices: the backward pass of a slice fills a tensor of the whole row with zeros.
    parts = (tensor.split(lengths, dim=2) for tensor in (query, key, value))  # type: ignore[no-untyped-call]
    out = [
        _one_segment(q, k, v, scaling, dropout, sliding_window, softcap, s_aux)
        for q, k, v in zip(*parts, strict=True)
    ]
    joined = out[0] if len(out) == 1 else torch.cat(out, dim=2)
    return joined.transpose(1, 2), None


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
    from torch.nn.attention.varlen import varlen_attn

    edges = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    edges = edges.to(query.device, non_blocking=True)
    longest = max(lengths)
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        edges,
        edges,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None]


for _name in (IMPLEMENTATION, ALONE):
    AttentionInterface.register(_name, segment_attention)
