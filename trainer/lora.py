"""LoRA adapters by peft, inside the same loop: the model keeps its names, and adapters are learned.

peft places them and folds them into the weights for export, so that a layer of any kind (a
transposed one, a stack of experts) is folded as it was computed. The price of its in-place
injection: adapter tensors carry its names, ``….lora_A.default.weight``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.config import ModelSettings
from trainer.errors import ConfigError
from trainer.opening import architecture

__all__ = ["ADAPTER_NAME", "add_adapters", "lora_config", "merged"]

ADAPTER_NAME = "default"
"""peft's own default. It stands in the names of the adapter's tensors, and export takes it out."""


def lora_config(settings: ModelSettings) -> Any:
    """peft's own description of the adapters."""
    try:
        from peft import LoraConfig
    except ImportError as exc:
        raise ConfigError("--lora_r needs peft; pip install peft") from exc
    targets = settings.lora_target_modules
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        task_type="CAUSAL_LM",
    )


def add_adapters(hf: Any, settings: ModelSettings, seed: int) -> None:
    """Give ``hf`` adapters, drawn from ``seed``, and freeze everything else."""
    config = lora_config(settings)
    from peft import inject_adapter_in_model

    torch.manual_seed(seed)
    try:
        inject_adapter_in_model(config, hf, adapter_name=ADAPTER_NAME)
    except ValueError as exc:
        raise ConfigError(f"--lora_target_modules: {str(exc).partition(chr(10))[0]}") from exc


def merged(tensors: dict[str, Tensor], config: Any, settings: ModelSettings) -> dict[str, Tensor]:
    """Full weights under the model's own names: base and adapter folded by peft, in float32.

    Args:
        tensors: every tensor of the model with adapters, by name; emptied.
        config: of the architecture.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    with torch.device("meta"):
        hf = architecture(config, dtype=torch.float32, attn_implementation="eager")
    add_adapters(hf, settings, seed=0)
    names = [name for name in tensors if ".lora_" not in name]
    hf.load_state_dict(tensors, strict=False, assign=True)
    tensors.clear()
    for module in hf.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    whole = hf.state_dict()
    return {name.replace(".base_layer", ""): whole[name].detach() for name in names}
