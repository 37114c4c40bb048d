"""The model that learns: loaded once, by rank 0, as an empty shape by every other rank.

:class:`TokenLoss` puts the loss inside the module that FSDP shards, so that the output head's
weight is gathered where it is needed and logits exist a chunk at a time. The price: the head is
called by us and not by the architecture, so its way from states to logits must be known; it is
compared with the architecture's own before training starts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.errors as hub
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from trainer.attention import IMPLEMENTATION
from trainer.config import ModelSettings
from trainer.errors import AuthError, ConfigError, DataError, TrainerError, UnavailableError
from trainer.loss import LogitShape, summed_cross_entropy
from trainer.packing import MicroBatch

disable_progress_bar()  # type: ignore[no-untyped-call]

__all__ = [
    "TokenLoss",
    "architecture",
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

    def states(
        self, input_ids: Tensor, position_ids: Tensor, segments: tuple[int, ...] | None
    ) -> Tensor:
        """(B, T, H): what the output head reads."""
        out = self.hf.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, segments=segments
        )
        states: Tensor = out.last_hidden_state
        return states

    def forward(self, batch: MicroBatch) -> Tensor:
        states = self.states(batch.input_ids, batch.position_ids, batch.segments)
        head = self.hf.get_output_embeddings()
        return summed_cross_entropy(
            states.flatten(0, 1)[batch.positions],  # (N, H)
            head.weight,
            head.bias,
            batch.targets,
            self.shape,
        )


def load_config(settings: ModelSettings) -> Any:
    """The architecture of ``model_name_or_path``."""
    name = settings.model_name_or_path
    try:
        return AutoConfig.from_pretrained(name, cache_dir=settings.cache_dir)
    except (OSError, ValueError) as exc:
        raise _explained(exc, name, "model") from exc


def load_tokenizer(settings: ModelSettings) -> Any:
    """Its tokenizer."""
    name = settings.model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(name, cache_dir=settings.cache_dir)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise _explained(exc, name, "tokenizer") from exc


def architecture(config: Any, **options: Any) -> Any:
    """The model that ``config`` describes, with random weights."""
    return AutoModelForCausalLM.from_config(config, **options)  # type: ignore[no-untyped-call]


def empty_model(config: Any, settings: ModelSettings) -> TokenLoss:
    """The model without memory: every tensor on the meta device."""
    with torch.device("meta"):
        hf = architecture(config, dtype=torch.float32, attn_implementation=IMPLEMENTATION)
    return _prepared(hf, settings, seed=0)


def load_weights(settings: ModelSettings, seed: int) -> TokenLoss:
    """The model in host memory, in float32: an optimizer step at a learning rate of 2e-5 is lost in
    the rounding of bfloat16 weights.

    Raises:
        ConfigError, DataError, AuthError, UnavailableError: it cannot be loaded, or its output head
            does something that :class:`TokenLoss` does not.
    """
    name = settings.model_name_or_path
    try:
        hf = AutoModelForCausalLM.from_pretrained(
            name,
            cache_dir=settings.cache_dir,
            dtype=torch.float32,
            attn_implementation=IMPLEMENTATION,
            use_safetensors=True,  # never the pickles of older models
        )
    except SafetensorError as exc:
        raise DataError(f"{name}: its weights are damaged: {exc}") from exc
    except (OSError, ValueError) as exc:
        raise _explained(exc, name, "model") from exc
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


@torch.no_grad()
def _check_head(hf: Any) -> None:
    """Compare our way to the logits with the architecture's, on four tokens."""
    model = TokenLoss(hf).eval()
    ids = torch.arange(4)[None] % hf.config.get_text_config().vocab_size
    theirs = hf(input_ids=ids, use_cache=False).logits[0]
    states = model.states(ids, torch.arange(4)[None], None)[0]
    head, targets = hf.get_output_embeddings(), ids[0].flip(0)
    ours = summed_cross_entropy(states, head.weight, head.bias, targets, model.shape)
    expected = nn.functional.cross_entropy(theirs.double(), targets, reduction="sum")
    if not torch.allclose(ours, expected, rtol=1e-4):
        raise ConfigError(
            f"{type(hf).__name__}: its logits are not a linear layer of its states (loss"
            f" {ours.item():.4f}, should be {expected.item():.4f}); this architecture cannot be"
            " trained here"
        )


def _explained(exc: Exception, name: str, what: str) -> TrainerError:
    causes: list[BaseException] = []
    cause: BaseException | None = exc
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(c, hub.GatedRepoError) for c in causes):
        return AuthError(f"{name}: the hub wants an access token for it; set HF_TOKEN")
    if Path(name).is_dir():
        return ConfigError(f"{name}: holds no {what} that transformers can load: {_short(exc)}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return ConfigError(f"{name}: there is no such folder; check --model_name_or_path")
    if any(isinstance(c, hub.RepositoryNotFoundError) for c in causes):
        return ConfigError(f"{name}: is neither a folder nor a model on the hub")
    if any(isinstance(c, hub.LocalEntryNotFoundError | ConnectionError) for c in causes):
        return UnavailableError(f"{name}: is no folder, and the model hub cannot be reached")
    return ConfigError(f"{name}: no {what} could be loaded: {_short(exc)}")


def _short(exc: Exception) -> str:
    return json.dumps(str(exc).strip().partition("\n")[0][:200], ensure_ascii=False)
