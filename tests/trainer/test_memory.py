"""The estimate of memory, beside what the same model takes on the processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer.conftest import make_config
from trainer.config import Settings, parse
from trainer.fsdp import blocks, local
from trainer.loss import LOGIT_BYTES
from trainer.memory import Need, available_bytes, estimate
from trainer.model import TokenLoss, empty_model
from trainer.opening import architecture
from trainer.optim import make_optimizer
from trainer.packing import collate
from trainer.proof import set_way
from trainer.tokens import Tokenised

pytestmark = pytest.mark.slow

TOKENS = 2 * 60


def settings(*more: str) -> Settings:
    return parse(
        ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o",
         "--per_device_train_batch_size", "2", "--model_max_length", "60", *more]
    )  # fmt: skip


def needed(family: str, *more: str, shards: int = 1) -> Need:
    chosen = settings(*more)
    model = empty_model(make_config(family), chosen.model)
    return estimate(
        model,
        blocks(model),
        chosen,
        shards=shards,
        compute=torch.float32,
        frozen=torch.float32,
        device=torch.device("cpu"),
    )


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("more", [(), ("--gradient_checkpointing", "True")])
@pytest.mark.parametrize("family", ["llama", "qwen", "gemma3", "opt"])
def test_the_estimate_is_near_what_a_step_takes(family: str, more: tuple[str, ...]) -> None:
    """Weights, gradients and moments to the byte; what is kept for the backward pass within a
    factor of two.
    """
    need = needed(family, *more)
    torch.manual_seed(0)
    hf = architecture(make_config(family), dtype=torch.float32, attn_implementation="eager")
    set_way(hf, "woolmill_segments")
    if more:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = TokenLoss(hf).train()
    optimizer = make_optimizer(model, settings().optim)
    learned = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in learned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    record = Tokenised(np.arange(60, dtype=np.int32), np.arange(60) > 5)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(collate([record, record], packing=True))
    loss.backward()
    optimizer.step()
    state = [t for entry in optimizer.state.values() for t in entry.values() if t.ndim]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    held = sum(t.numel() * 4 for t in [*model.parameters(), *grads, *state])
    assert need.states == held
    if not more:
        assert 0.5 < need.activations / sum(kept.values()) < 2
    else:
        assert need.activations < needed(family).activations


def test_what_lowers_the_need() -> None:
    """Shards divide the states, adapters have none but their own, and smaller rows need less."""
    whole = needed("llama")
    assert needed("llama", shards=4).states == pytest.approx(whole.states / 4, abs=1)
    assert needed("llama", "--lora_r", "1").states < whole.states / 2
    shorter = needed("llama", "--model_max_length", "30")
    assert shorter.activations == pytest.approx(whole.activations / 2)
    assert whole.logits >= LOGIT_BYTES["cpu"]


def test_the_line_says_what_there_is_and_what_to_lower() -> None:
    need = Need(20 * 10**9, 10**9, 30 * 10**9, 10**9, 32 * 10**9)
    line = need.line("on each GPU", 80 * 10**9, 100 * 10**9)
    assert line == (
        "needs about 52.0 of 80.0 GB on each GPU (states 20.0, gathered 1.0, activations 30.0,"
        " logits 1.0)"
    )
    line = need.line("on each GPU", 40 * 10**9, 16 * 10**9)
    assert "; lower --per_device_train_batch_size, or use --gradient_checkpointing" in line
    assert line.endswith("; loading needs 32.0 GB of the host's memory, which has 16.0")
    assert available_bytes(torch.device("cpu")) > 10**8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_frozen_weights_keep_the_type_that_they_came_in(tmp_path: Path, tokenizer: Any) -> None:
    """LoRA in bfloat16 on a bfloat16 base: its weights are held in half the memory, and the
    gradients of the adapters are, bit for bit, those of the same weights held in float32.
    """
    from trainer.config import ParallelSettings
    from trainer.fsdp import make_mesh
    from trainer.prepare import sharded_model
    from trainer.ranks import Ranks

    torch.manual_seed(0)
    hf = architecture(make_config("llama"), dtype=torch.bfloat16)
    hf.save_pretrained(tmp_path / "bfloat16")
    hf.float().save_pretrained(tmp_path / "float32")
    ranks = Ranks.start(ParallelSettings(device="cpu"))
    gradients, types = [], []
    try:
        for name in ("bfloat16", "float32"):
            chosen = settings("--lora_r", "2", "--model_name_or_path", str(tmp_path / name))
            model = sharded_model(chosen, ranks, make_mesh(1, ranks), torch.bfloat16, 400)
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    torch.nn.init.constant_(parameter, 0.05)
            types.append({p.dtype for p in model.parameters() if not p.requires_grad})
            record = Tokenised(np.arange(60, dtype=np.int32), np.arange(60) > 5)
            model(collate([record, record], packing=True)).backward()
            gradients.append([local(p.grad) for p in model.parameters() if p.grad is not None])
    finally:
        ranks.stop()
    assert types == [{torch.bfloat16}, {torch.float32}]
    assert gradients[0]
    assert all(g.dtype == torch.float32 for g in gradients[0])
    assert any(g.abs().max() > 0 for g in gradients[0])
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.equal(mine, theirs)
