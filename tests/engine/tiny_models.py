"""Causal models of few weights, random but the same each time, for tests of machinery."""

from __future__ import annotations

import json
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


def save_gguf(file: Path, tokenizer: Path) -> Path:
    """A Llama of one layer as a GGUF file, with the tokenizer's first thousand tokens in it."""
    import gguf
    import numpy as np

    described = json.loads((tokenizer / "tokenizer.json").read_text())
    vocabulary = sorted(described["model"]["vocab"], key=described["model"]["vocab"].get)[:1000]
    pairs = [m.split() if isinstance(m, str) else m for m in described["model"]["merges"]]
    known = set(vocabulary)
    merges = [" ".join(pair) for pair in pairs if {*pair, "".join(pair)} <= known]
    hidden, inner, heads, kv_heads, tokens = 64, 96, 4, 2, len(vocabulary)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (tokens, hidden),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden * kv_heads // heads, hidden),
        "blk.0.attn_v": (hidden * kv_heads // heads, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (inner, hidden),
        "blk.0.ffn_up": (inner, hidden),
        "blk.0.ffn_down": (hidden, inner),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
        "output_norm": (hidden,),
    }
    for name, shape in shapes.items():
        weights = random.normal(1 if "norm" in name else 0, 0.3, shape)
        writer.add_tensor(f"{name}.weight", weights.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
