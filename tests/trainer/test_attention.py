"""The GPU's way through attention, with a double of its kernel on the processor: what the kernel is
asked for, by version of PyTorch, and the way back where it does not take a model's heads. That the
kernel itself computes what it should can only be seen on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from trainer import attention
from trainer.attention import segment_attention
from trainer.metrics import say_once

pytestmark = pytest.mark.slow

LENGTHS = (5, 1, 9)


def exact(q: Tensor, k: Tensor, v: Tensor, edges: Tensor, scale: float | None,
          window: tuple[int, int], heads: int) -> Tensor:  # fmt: skip
    """(T, heads, D): attention inside each record, written out."""
    out = []
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        mine, keys, values = (t[start:end].transpose(0, 1) for t in (q, k, v))
        keys, values = (t.repeat_interleave(heads, 0) for t in (keys, values))
        scores = mine @ keys.transpose(1, 2) * (scale or q.shape[2] ** -0.5)
        place = torch.arange(end - start)
        distance = place[:, None] - place[None, :]
        visible = (distance >= 0) & ((window[0] < 0) | (distance <= window[0]))
        weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
        out.append((weights @ values).transpose(0, 1))
    return torch.cat(out)


def today(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int,
    max_k: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The kernel as PyTorch 2.12 has it."""
    assert cu_seq_q.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert window_size[1] == 0  # causal
    groups = query.shape[1] // key.shape[1]
    assert groups == 1 or enable_gqa
    return exact(query, key, value, cu_seq_q, scale, window_size, groups)


def yesterday(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int,
    max_k: int, is_causal: bool = False,
) -> Tensor:  # fmt: skip
    """The kernel as PyTorch 2.10 has it."""
    assert is_causal
    assert query.shape[1] == key.shape[1]
    return exact(query, key, value, cu_seq_q, None, (-1, 0), 1)


def narrow(*arguments: Any, **options: Any) -> Tensor:
    raise RuntimeError("head dimension is over 256")


def wrong(query: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return query * 1.0


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "_on_gpu", lambda query: True)
    attention._tried.cache_clear()
    say_once.cache_clear()
    yield
    attention._tried.cache_clear()


def both_ways(
    kernel: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients with ``kernel``, and without a GPU."""
    results = []
    for on_gpu in (True, False):
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        monkeypatch.setattr(attention, "_on_gpu", lambda query, on_gpu=on_gpu: on_gpu)
        generator = torch.Generator().manual_seed(1)
        q, k, v = (
            torch.randn(1, heads, sum(LENGTHS), 8, generator=generator).requires_grad_()
            for heads in (4, 2, 2)
        )
        out, _ = segment_attention(torch.nn.Identity(), q, k, v, None, segments=LENGTHS, **options)
        out.square().sum().backward()  # type: ignore[no-untyped-call]
        results.append([out, *(tensor.grad for tensor in (q, k, v))])
    return results[0], results[1]  # type: ignore[return-value]


@pytest.mark.parametrize("kernel", [today, yesterday, narrow, wrong])
@pytest.mark.parametrize("options", [{}, {"scaling": 0.3}, {"sliding_window": 3}])
def test_the_kernels_way_is_the_other_way(
    kernel: Callable[..., Tensor],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Output and gradients are equal with either signature of the kernel, with a scale and with a
    window; where the kernel takes no such heads, has no window or computes something else, records
    go one by one, said once in a line.
    """
    mine, theirs = both_ways(kernel, monkeypatch, **options)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    told = capsys.readouterr().out
    falls_back = kernel in (narrow, wrong) or (kernel is yesterday and "sliding_window" in options)
    assert told.count("one record at a time, which is slower, for heads of 8: ") == falls_back


def test_the_kernel_is_tried_once_for_each_kind_of_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second layer with the same heads asks for nothing more, and edges are made once a row."""
    calls: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Tensor:
        calls.append(arguments[5])
        return today(*arguments, **options)

    counted.__signature__ = __import__("inspect").signature(today)  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen, "varlen_attn", counted)
    attention._edges.cache_clear()
    q, k, v = (torch.randn(1, 4, sum(LENGTHS), 8) for _ in range(3))
    for _ in range(3):
        segment_attention(torch.nn.Identity(), q, k, v, None, segments=LENGTHS)
    assert calls == [9, 9, 9, 9]  # the trial, whose longest record has 9 positions too, and three
    assert attention._edges.cache_info().misses == 2


def test_the_kernel_of_this_pytorch_takes_what_it_is_asked_for() -> None:
    """Every argument that is given to the double exists in the function that is installed."""
    import inspect

    known = inspect.signature(varlen.varlen_attn).parameters
    assert set(inspect.signature(today).parameters) <= set(known)
