"""Keys and values of the rows that are being generated, and attention over them.

The choice: one forward pass takes the new tokens of all rows laid end to end, N in all, as a batch
of one: rows that prefill and rows that decode ride together, and there is no padding in the linear
layers. Only attention tells rows apart; it is hung into the model through transformers'
AttentionInterface. Three things make it cheap where memory bandwidth is what counts:

* the prefix that prompts share is kept once, and read once a step for all rows;
* keys and values are written in place: nothing is copied a step, unlike with a cache that grows;
* rows live in lanes of a few, each padded to its own longest row, not to the longest of all.

The price: models that do not call the attention interface (state-space layers), and those with
attention sinks or capped scores, are refused at the start.

Shapes: N new tokens, H query heads, K key-value heads, G = H / K, D head size, R rows of a lane,
S rows of all lanes, P prefix length, L longest row of a lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

__all__ = ["ATTENTION", "Chunk", "Decode", "Lane", "Prefix", "Probe", "Slot"]

ATTENTION = "woolmill"
"""The name under which the attention is registered with transformers."""

_GROWTH = 128
"""Tokens by which a lane's capacity grows at a time."""


@dataclass(eq=False, slots=True)
class Prefix:
    """Tokens that several prompts begin with, computed once; the empty one for prompts alone."""

    ids: tuple[int, ...] = ()
    layers: dict[int, Tensor] = field(default_factory=dict)
    """Keys and values of each layer: (2, K, P, D)."""
    rows: int = 0
    """Rows that use it now."""

    def attend(self, layer: int, query: Tensor, kv: Tensor, options: dict[str, Any]) -> Tensor:
        """Keep ``kv`` (2, K, P, D) of the prefix itself; its causal attention, (H, P, D)."""
        self.layers[layer] = kv
        mask = _visible(torch.arange(len(self.ids), device=kv.device), 0, len(self.ids), options)
        return _sdpa(query, kv, mask, options)


class Lane:
    """``R`` places for rows of like length, in one tensor a layer."""

    def __init__(self, rows: int) -> None:
        self.slots = [Slot(self, place) for place in range(rows)]
        self._layers: dict[int, Tensor] = {}  # (2, K, R, capacity, D)
        self._capacity = 0

    def layer(self, layer: int, like: Tensor) -> Tensor:
        """Storage of one layer with room for the longest row, (2, K, R, capacity, D)."""
        need = max(slot.length + slot.growth for slot in self.slots)
        if need > self._capacity:
            self._capacity = -(-need // _GROWTH) * _GROWTH
        old = self._layers.get(layer)
        if old is None or old.shape[3] < self._capacity:
            shape = (2, like.shape[1], len(self.slots), self._capacity, like.shape[3])
            # Zeros, because masked places are still multiplied, and zero times NaN is NaN.
            new = like.new_zeros(shape)
            if old is not None:
                new[:, :, :, : old.shape[3]] = old
            self._layers[layer] = old = new
        return old

    def clear(self) -> None:
        """Give the memory back; for a lane without rows."""
        self._layers.clear()
        self._capacity = 0


@dataclass(eq=False, slots=True)
class Slot:
    """One place of a lane, and how far it is filled."""

    lane: Lane
    place: int
    length: int = 0
    """Tokens after the prefix whose keys and values are kept."""
    growth: int = 0
    """Tokens that the step now running adds."""
    prefix: Prefix = field(default_factory=Prefix)

    @property
    def position(self) -> int:
        """Position of the row's next token in its sequence."""
        return len(self.prefix.ids) + self.length


class Chunk:
    """``T`` consecutive tokens of one row's prompt, seeing prefix, row so far and themselves."""

    def __init__(self, slot: Slot, tokens: int) -> None:
        self.slot, self.tokens = slot, tokens
        self._masks: dict[Any, Tensor | None] = {}

    def attend(self, layer: int, query: Tensor, kv: Tensor, options: dict[str, Any]) -> Tensor:
        """``query`` (H, T, D), ``kv`` (2, K, T, D); gives (H, T, D)."""
        slot, end = self.slot, self.slot.length + self.tokens
        row = slot.lane.layer(layer, kv)[:, :, slot.place]
        row[:, :, slot.length : end] = kv
        known = row[:, :, :end]
        if slot.prefix.ids:
            known = torch.cat([slot.prefix.layers[layer], known], dim=2)
        window = options.get("sliding_window")
        if window not in self._masks:
            at = torch.arange(slot.position, slot.position + self.tokens, device=kv.device)
            self._masks[window] = _visible(at, 0, known.shape[2], options)
        return _sdpa(query, known, self._masks[window], options)


class Decode:
    """One new token for each of ``B`` rows; what does not change from layer to layer.

    Rows are computed on the grid of all places of their lanes; places that hold no decoding row are
    computed too and thrown away, which is cheaper than gathering the others.
    """

    def __init__(self, slots: Sequence[Slot], device: torch.device) -> None:
        self.slots = slots
        self.lanes: list[tuple[Lane, int, Tensor, Tensor, Tensor, int]] = []
        by_lane: dict[Lane, list[int]] = {}
        for index, slot in enumerate(slots):
            by_lane.setdefault(slot.lane, []).append(index)
        cells = [0] * len(slots)
        self.grid = 0
        for lane, members in by_lane.items():
            for index in members:
                cells[index] = self.grid + slots[index].place
            longest = max(slots[index].length for index in members) + 1
            places = torch.tensor([slots[index].place for index in members], device=device)
            lengths = torch.tensor([slots[index].length for index in members], device=device)
            of_batch = torch.tensor(members, device=device)
            self.lanes.append((lane, self.grid, of_batch, places, lengths, longest))
            self.grid += len(lane.slots)
        self.cells = torch.tensor(cells, device=device)  # (B,) place of each row on the grid
        by_prefix: dict[Prefix, list[int]] = {}
        for index, slot in enumerate(slots):
            if slot.prefix.ids:
                by_prefix.setdefault(slot.prefix, []).append(cells[index])
        self.prefixes = [
            (prefix, torch.tensor(members, device=device)) for prefix, members in by_prefix.items()
        ]
        self.prefix_length = max((len(prefix.ids) for prefix in by_prefix), default=0)
        self.row_length = max(longest for *_, longest in self.lanes)
        self._masks: dict[Any, Tensor] = {}

    def attend(self, layer: int, query: Tensor, kv: Tensor, options: dict[str, Any]) -> Tensor:
        """``query`` (H, B, D), ``kv`` (2, K, B, D); gives (H, B, D)."""
        heads, batch, size = query.shape
        kv_heads = kv.shape[1]
        group = heads // kv_heads
        shared = self.prefix_length
        q = query.new_zeros(kv_heads, self.grid, group, size)
        by_row = query.view(kv_heads, group, batch, size).transpose(1, 2)
        q[:, self.cells] = by_row * options["scaling"]

        # Scores of both parts stand side by side, so that one softmax is exact over the whole row.
        scores = query.new_zeros(kv_heads, self.grid, group, shared + self.row_length)
        for prefix, cells in self.prefixes:
            keys = prefix.layers[layer][0]
            part = q[:, cells].flatten(1, 2) @ keys.transpose(1, 2)
            scores[:, cells, :, : len(prefix.ids)] = part.view(kv_heads, len(cells), group, -1)
        stored = []
        for lane, start, of_batch, places, lengths, longest in self.lanes:
            rows = lane.layer(layer, kv)
            rows[:, :, places, lengths] = kv[:, :, of_batch]
            keys, values = rows[:, :, :, :longest]
            stored.append(values)
            part = q[:, start : start + len(lane.slots)] @ keys.transpose(2, 3)
            scores[:, start : start + len(lane.slots), :, shared : shared + longest] = part
        weights = (scores + self._mask(query, options)).softmax(-1, dtype=torch.float32)
        weights = weights.to(query.dtype)

        out = torch.empty_like(q)
        for values, (lane, start, *_, longest) in zip(stored, self.lanes, strict=True):
            part = weights[:, start : start + len(lane.slots), :, shared : shared + longest]
            out[:, start : start + len(lane.slots)] = part @ values
        for prefix, cells in self.prefixes:
            part = weights[:, cells, :, : len(prefix.ids)].flatten(1, 2) @ prefix.layers[layer][1]
            out[:, cells] += part.view(kv_heads, len(cells), group, size)
        return out[:, self.cells].transpose(1, 2).reshape(heads, batch, size)

    def _mask(self, query: Tensor, options: dict[str, Any]) -> Tensor:
        """0 where a row may look, else minus infinity: (S, 1, P + L), made once a step."""
        window = options.get("sliding_window")
        if window not in self._masks:
            # Places without a row see everything: softmax over nothing would give NaN.
            hidden = torch.zeros(self.grid, self.prefix_length + self.row_length, dtype=torch.bool)
            for slot, cell in zip(self.slots, self.cells.tolist(), strict=True):
                prefix, start = len(slot.prefix.ids), self.prefix_length
                first = 0 if window is None else max(0, slot.position + 1 - window)
                hidden[cell] = True
                hidden[cell, min(first, prefix) : prefix] = False
                hidden[cell, start + max(0, first - prefix) : start + slot.length + 1] = False
            mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill(hidden, -torch.inf)
            self._masks[window] = mask.to(query.device)[:, None]
        return self._masks[window]


@dataclass(slots=True)
class Probe:
    """Notes what the model's layers ask of attention, for one pass over one token."""

    layers: set[int] = field(default_factory=set)
    bytes_per_token: int = 0
    unsupported: set[str] = field(default_factory=set)

    def attend(self, layer: int, query: Tensor, kv: Tensor, options: dict[str, Any]) -> Tensor:
        """``query`` (H, 1, D), ``kv`` (2, K, 1, D): a token that sees itself alone."""
        self.layers.add(layer)
        self.bytes_per_token += kv.numel() * kv.element_size()
        asked = {"softcap": "capped scores", "s_aux": "attention sinks"}
        self.unsupported |= {what for key, what in asked.items() if options.get(key) is not None}
        return kv[1].repeat_interleave(query.shape[0] // kv.shape[1], dim=0)


def _visible(at: Tensor, start: int, end: int, options: dict[str, Any]) -> Tensor:
    """Which of the positions ``start`` to ``end`` the tokens ``at`` (T,) see: (T, end - start)."""
    keys = torch.arange(start, end, device=at.device)
    visible = keys <= at[:, None]
    if (window := options.get("sliding_window")) is not None:
        visible &= keys > at[:, None] - window
    return visible


def _sdpa(query: Tensor, kv: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    """Torch's own attention for one row: ``query`` (H, T, D), ``kv`` (2, K, M, D); (H, T, D)."""
    out = functional.scaled_dot_product_attention(
        query[None], kv[0][None], kv[1][None], mask, scale=options["scaling"], enable_gqa=True
    )
    return out[0]


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    parts: Sequence[tuple[int, Prefix | Chunk | Decode | Probe]],
    **options: Any,
) -> tuple[Tensor, None]:
    """What every attention layer of the model calls.

    ``query`` (1, H, N, D), ``key`` and ``value`` (1, K, N, D); ``parts`` says which of the N tokens
    belong together, as (count, part). Gives (1, N, H, D), as the interface wants it.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    options.setdefault("scaling", query.shape[-1] ** -0.5)
    kv = torch.cat([key, value])
    outs, start = [], 0
    for count, part in parts:
        here = slice(start, start + count)
        outs.append(part.attend(layer, query[0, :, here], kv[:, :, here], options))
        start += count
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
    return out.transpose(0, 1)[None], None


AttentionInterface.register(ATTENTION, _attention)
