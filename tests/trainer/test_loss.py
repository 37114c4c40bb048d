"""The loss: equal to the reference on every architecture, packed or padded, however it is split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.trainer.conftest import FAMILIES, toy_records
from tests.trainer.reference import reference_loss
from trainer.config import DataSettings, ModelSettings
from trainer.errors import ConfigError
from trainer.loss import LOGIT_BYTES, LogitShape, chunk_length, summed_cross_entropy
from trainer.model import TokenLoss, load_weights
from trainer.packing import collate, pack
from trainer.records import Instruction
from trainer.tokens import Tokenised, tokenise

pytestmark = pytest.mark.slow


def tokenised(tokenizer: Any, rows: list[dict[str, str]], **more: Any) -> list[Tokenised]:
    data = DataSettings(data_path=Path("unused"), model_max_length=200, **more)
    examples = [Instruction(f"row#{i}", **row) for i, row in enumerate(rows)]
    results = list(tokenise(examples, tokenizer, data))
    return [row for row in results if isinstance(row, Tokenised)]


def loaded(folder: Path) -> TokenLoss:
    return load_weights(ModelSettings(model_name_or_path=str(folder)), seed=0).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("boundary", ["split", "alpaca"])
def test_loss_is_the_references_packed_and_padded(
    model_folders: dict[str, Path], tokenizer: Any, family: str, boundary: str
) -> None:
    """Same records, same weights: within 1e-6 of one record at a time through full logits."""
    rows = toy_records(9)
    records = tokenised(tokenizer, rows, boundary=boundary)
    assert len(records) == len(rows)
    model = loaded(model_folders[family])
    hf = AutoModelForCausalLM.from_pretrained(model_folders[family], attn_implementation="eager")
    expected, count = reference_loss(hf, tokenizer, rows, 200, boundary)
    for packing in (True, False):
        batch = collate(records, packing=packing)
        assert len(batch.targets) == count
        assert model(batch).item() / count == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_does_not_depend_on_the_split(
    model_folders: dict[str, Path], tokenizer: Any, family: str
) -> None:
    """One padded batch, one packed row, rows packed best-fit, one record at a time: the gradient of
    the summed loss is the same within 1e-6 of its length.
    """
    records = tokenised(tokenizer, toy_records(9))
    groups = pack([len(record.ids) for record in records], 200)
    assert 1 < len(groups) < len(records)
    splits: list[tuple[bool, list[list[int]]]] = [
        (False, [list(range(9))]),
        (True, [list(range(9))]),
        (True, groups),
        (False, [[i] for i in range(9)]),
    ]
    model = loaded(model_folders[family])
    gradients, losses = [], []
    for packing, split in splits:
        model.zero_grad()
        total = 0.0
        for group in split:
            loss = model(collate([records[i] for i in group], packing=packing))
            loss.backward()
            total += loss.item()
        losses.append(total)
        gradients.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))  # type: ignore[union-attr]
    assert losses[1:] == pytest.approx(losses[:1] * 3, rel=1e-6)
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() <= 1e-6 * gradients[0].norm()


@settings(max_examples=25, deadline=None)
@given(
    positions=st.integers(1, 300),
    scale=st.sampled_from([1.0, 0.5]),
    cap=st.sampled_from([None, 2.0]),
    bias=st.booleans(),
)
def test_summed_cross_entropy_and_its_gradients(
    positions: int, scale: float, cap: float | None, bias: bool
) -> None:
    """Value and all gradients are those of PyTorch's cross-entropy on full logits in float64, over
    chunk borders, with soft caps and biases.
    """
    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, 6, generator=generator, requires_grad=True)
    weight = torch.randn(11, 6, generator=generator, requires_grad=True)
    offset = torch.randn(11, generator=generator, requires_grad=True) if bias else None
    targets = torch.randint(0, 11, (positions,), generator=generator)
    inputs = [tensor for tensor in (hidden, weight, offset) if tensor is not None]
    with patch.dict(LOGIT_BYTES, cpu=4 * 11 * 128):  # 128 positions a chunk
        loss = summed_cross_entropy(hidden, weight, offset, targets, LogitShape(scale, cap))
    (loss * 3).backward()  # type: ignore[no-untyped-call]
    ours = [tensor.grad for tensor in inputs]

    double = [tensor.detach().double().requires_grad_() for tensor in inputs]
    logits = scale * torch.nn.functional.linear(double[0], double[1], *double[2:])
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (expected * 3).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for mine, theirs in zip(ours, double, strict=True):
        torch.testing.assert_close(mine.double(), theirs.grad, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("device", "vocabulary", "length"),
    [
        ("cpu", 49_152, 128),
        ("cpu", 262_144, 24),
        ("cpu", 400, 4096),
        ("cpu", 2_000_000, 16),
        ("cuda", 128_256, 1046),
        ("cuda", 49_152, 2730),
    ],
)
def test_chunks_follow_from_the_bytes_of_logits(device: str, vocabulary: int, length: int) -> None:
    """Few and large on a GPU, near the caches on a processor, whatever the vocabulary."""
    assert chunk_length(vocabulary, torch.device(device)) == length


def test_an_extreme_logit_does_not_overflow() -> None:
    """A target of probability 0 in float32 has a large loss, not an infinite one."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [400.0]])
    loss = summed_cross_entropy(hidden, weight, None, torch.tensor([0]))
    assert loss.item() == pytest.approx(400.0)


def test_bfloat16_keeps_the_sum_exact_enough() -> None:
    """Logits of bfloat16 states are normalised in float32."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 8, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(50, 8, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(0, 50, (200,), generator=generator)
    loss = summed_cross_entropy(hidden, weight, None, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    expected = torch.nn.functional.cross_entropy(
        hidden.double() @ weight.double().T, targets, reduction="sum"
    )
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16


def test_an_unknown_output_head_is_refused(llama: Path, tmp_path: Path) -> None:
    """An architecture that does more to its logits than is known stops before training."""
    from trainer import model as module

    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    # Granite divides its logits; as a Llama with the same key it does not, which must be noticed.
    config["logits_scaling"] = 8.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match="what is computed for training is not what the architecture computes"
    ):
        module.load_weights(ModelSettings(model_name_or_path=str(tmp_path)), seed=0)
