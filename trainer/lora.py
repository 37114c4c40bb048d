"""LoRA adapters by peft, inside the same loop: the model keeps its names, and adapters are learned.

peft places them; this file says where, and folds them into the weights for export. The price of
using peft's in-place injection: adapter tensors carry its names, ``….lora_A.default.weight``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.config import ModelSettings
from trainer.errors import ConfigError

__all__ = ["ADAPTER_NAME", "add_adapters", "lora_config", "merged"]

ADAPTER_NAME = "default"


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


def merged(tensors: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Full weights under the model's own names: ``W + scaling x B A`` where there is an adapter."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if name != plain and name.endswith(".weight"):
            layer = plain.removesuffix(".weight")
            a = tensors[f"{layer}.lora_A.{ADAPTER_NAME}.weight"]
            b = tensors[f"{layer}.lora_B.{ADAPTER_NAME}.weight"]
            tensor = tensor + scaling * (b @ a)
        out[plain] = tensor
    return out
