"""The model that learns: loaded once, by rank 0, as an empty shape by every other rank.

:class:`TokenLoss` puts the loss inside the module that FSDP shards, so that the output head's
weight is gathered where it is needed and logits exist a chunk at a time. The price: the head is
called by us and not by the architecture, so its way from states to logits must be known; the whole
is compared with the architecture's own before training starts (trainer/proof.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trainer.attention import IMPLEMENTATION
from trainer.chat_templates import set_chat_template
from trainer.config import ModelSettings
from trainer.errors import DataError
from trainer.loss import LogitShape, shaped, summed_cross_entropy
from trainer.opening import architecture, opened
from trainer.packing import MicroBatch
from trainer.proof import choose_way

__all__ = [
    "TokenLoss",
    "empty_model",
    "load_config",
    "load_tokenizer",
    "load_weights",
]


class TokenLoss(nn.Module):
    """A transformers causal model that returns the summed loss of a micro-batch's targets.

    ``hf`` is the model, with its own parameter names.
    """

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf
        self.shape = _logit_shape(hf.config)

    @property
    def packs(self) -> bool:
        """Whether several records may share a row; see trainer/proof.py."""
        return bool(self.hf.config._attn_implementation == IMPLEMENTATION)

    def states(self, batch: MicroBatch) -> Tensor:
        """(N, H): what the output head reads where a target is predicted."""
        if self.packs:
            how: dict[str, Any] = {"position_ids": batch.position_ids, "segments": batch.segments}
        else:
            batch, how = batch.apart(), {}
        out = _body(self.hf)(input_ids=batch.input_ids, use_cache=False, **how)
        states: Tensor = out.last_hidden_state  # (B, T, H)
        return states.flatten(0, 1)[batch.positions]

    def forward(self, batch: MicroBatch, *, logits: bool = False) -> Tensor:
        """The summed loss, or else all logits (N, V) at once, in float32: of a few, to compare."""
        head = self.hf.get_output_embeddings()
        states = self.states(batch)
        if logits:
            full = nn.functional.linear(states, head.weight, head.bias).float()
            shaped(full, self.shape)
            return full
        return summed_cross_entropy(states, head.weight, head.bias, batch.targets, self.shape)


def load_config(settings: ModelSettings) -> Any:
    """The architecture of ``model_name_or_path``."""
    name, cache = settings.model_name_or_path, settings.cache_dir
    return opened(AutoConfig, name, "model", cache_dir=cache)


def load_tokenizer(settings: ModelSettings) -> Any:
    """Its tokenizer, with the chat template that is asked for."""
    name, cache = settings.model_name_or_path, settings.cache_dir
    tokenizer = opened(AutoTokenizer, name, "tokenizer", cache_dir=cache)
    if settings.chat_template is not None:
        set_chat_template(tokenizer, settings.chat_template)
    return tokenizer


def empty_model(config: Any, settings: ModelSettings) -> TokenLoss:
    """The model without memory: every tensor on the meta device. Its attention is for
    :func:`trainer.proof.set_way` to set.
    """
    with torch.device("meta"):
        hf = architecture(config, dtype=torch.float32, attn_implementation="eager")
    return _prepared(hf, settings, seed=0)


def load_weights(settings: ModelSettings, seed: int) -> TokenLoss:
    """The model in host memory, in float32: an optimizer step at a learning rate of 2e-5 is lost in
    the rounding of bfloat16 weights.

    Raises:
        ConfigError, DataError, AuthError, UnavailableError: it cannot be loaded, or no way of
            calling it computes what it does by itself.
    """
    hf, found = opened(
        AutoModelForCausalLM,
        settings.model_name_or_path,
        "model",
        cache_dir=settings.cache_dir,
        dtype=torch.float32,
        attn_implementation="eager",
        use_safetensors=True,  # never the pickles of older models
        output_loading_info=True,
    )
    if missing := sorted(found["missing_keys"]):
        raise DataError(
            f"{settings.model_name_or_path}: its weights lack {len(missing)} tensor(s) of"
            f" {type(hf).__name__} ({', '.join(missing[:3])}); they would be random numbers"
        )
    _check_head(hf)
    return _prepared(hf, settings, seed)


def _prepared(hf: Any, settings: ModelSettings, seed: int) -> TokenLoss:
    if settings.lora_r:
        from trainer.lora import add_adapters

        add_adapters(hf, settings, seed)
    if settings.gradient_checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return TokenLoss(hf)


def _logit_shape(config: Any) -> LogitShape:
    """Cohere multiplies logits, Granite divides them, Gemma 2 and 3 squash them."""
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", 0) or 1)
    return LogitShape(float(scale), getattr(config, "final_logit_softcapping", None))


def _body(hf: Any) -> Any:
    """The model below the output head."""
    if hf.base_model is not hf:
        return hf.base_model
    # Llama 4's text model calls its body otherwise than its own attribute.
    return next(child for child in hf.children() if isinstance(child, PreTrainedModel))


def _check_head(hf: Any) -> None:
    """Give ``hf`` the attention that computes what the architecture does, or refuse it."""
    choose_way(TokenLoss(hf))
