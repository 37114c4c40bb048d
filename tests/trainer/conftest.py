"""Tiny models with random weights and a small real tokenizer, made once a session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from trainer.opening import architecture
from trainer.template import alpaca_prompt

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GATED = SIZES | {"intermediate_size": 24, "num_key_value_heads": 2}


def toy_records(count: int) -> list[dict[str, str]]:
    """Records of mixed length, some with an input, one with an empty output."""
    words = "river stone lamp green quick seven paper north cloud bread".split()
    rows = []
    for i in range(count):
        take = [words[(i * k + k) % len(words)] for k in range(1, 3 + i * 5 % 17)]
        rows.append(
            {
                "instruction": f"Say {take[0]} and {take[-1]} in {i} ways",
                "input": " ".join(take) if i % 3 == 0 else "",
                "output": " - ".join(take[::-1]) if i != 4 else "",
            }
        )
    return rows


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens that puts <s> first, as Llama's and OPT's do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [alpaca_prompt(r["instruction"], r["input"]) + r["output"] for r in toy_records(50)]
    # So that a prompt's last colon can merge with a response's first character.
    backend.train_from_iterator([*texts, ":- " * 40], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_config(family: str) -> Any:
    """A tiny architecture of ``family``; the odd vocabulary leaves uneven shards."""
    tokens: dict[str, Any] = {
        "vocab_size": 401,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    if family == "llama":
        return LlamaConfig(**GATED, **tokens, tie_word_embeddings=True)
    if family == "qwen":
        return Qwen2Config(**GATED, **tokens, tie_word_embeddings=False)
    if family == "gemma2":
        return Gemma2Config(
            **GATED, **tokens, head_dim=4, query_pre_attn_scalar=4, sliding_window=24
        )
    if family == "gemma3":
        return Gemma3TextConfig(
            **GATED, **tokens, head_dim=4, query_pre_attn_scalar=4, sliding_window=24
        )
    assert family == "opt"
    return OPTConfig(
        **SIZES, **tokens, ffn_dim=24, word_embed_proj_dim=16, do_layer_norm_before=True
    )


FAMILIES = ("llama", "qwen", "gemma2", "gemma3", "opt")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def make_model_folder(family: str, folder: Path, tokenizer: Any) -> Path:
    """A model folder as a person would download it, in float32."""
    torch.manual_seed(7)
    model = architecture(make_config(family))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_model_folder(family, root / family, tokenizer) for family in FAMILIES}


@pytest.fixture(scope="session")
def llama(model_folders: dict[str, Path]) -> Path:
    return model_folders["llama"]


def write_records(path: Path, rows: list[Any]) -> Path:
    """``rows`` as Alpaca's JSON."""
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="session")
def records_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "alpaca.json", toy_records(40))
