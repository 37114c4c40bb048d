"""Causal models of few weights, random but the same each time, for tests of machinery."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 49_152,
    "max_position_embeddings": 512,
    # Wide weights, so that scores lie far apart and greedy choices are no matter of rounding.
    "initializer_range": 0.3,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def save_llama(folder: Path, tokenizer: Path, **changed: Any) -> Path:
    """A Llama under the tokenizer of the embedded model."""
    return _save(LlamaConfig(**SIZES | changed), folder, tokenizer)


def save_sliding(folder: Path, tokenizer: Path, window: int) -> Path:
    """A Mistral whose tokens look back ``window`` tokens."""
    return _save(MistralConfig(**SIZES, sliding_window=window), folder, tokenizer)


def _save(config: Any, folder: Path, tokenizer: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build: Any = AutoModelForCausalLM.from_config
        model = build(config, dtype=torch.float32)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder)
    return folder
