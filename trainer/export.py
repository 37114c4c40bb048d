"""The finished model: one folder of safetensors that transformers and vLLM open.

Weights are gathered one tensor at a time; rank 0 alone keeps them, in the export's type, so a host
holds the model once beside its shards. What was written is opened again, as anybody would, and must
answer as the live model does. The folder is complete or absent: config.json, without which nothing
opens it, is moved in last.

What the model was trained to read is exported too: a model trained on Alpaca's layout gets it as
its chat template, so that a chat server asks it the way it has learned.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationConfig

from trainer.config import Settings
from trainer.errors import DataError, DiskError, TrainerError
from trainer.examples import Conversation, Message
from trainer.failpoints import failpoint
from trainer.fsdp import reshard
from trainer.lora import ADAPTER_NAME, lora_config, merged
from trainer.model import TokenLoss, load_config
from trainer.opening import architecture, opened
from trainer.proof import export_difference, live_answer
from trainer.ranks import Ranks
from trainer.template import alpaca_prompt
from trainer.tokens import Tokenised, opening_ids, tokenise

__all__ = ["alpaca_chat_template", "export", "gathered"]


_EXACT, _ROUNDED = 1e-3, 0.2
"""How far the export's log-probabilities may be from the live model's, as a share of their spread:
both in float32, or one of them in a type of 16 bits."""


def export(
    model: TokenLoss,
    tokenizer: Any,
    settings: Settings,
    ranks: Ranks,
    *,
    alpaca: bool,
    compute: torch.dtype,
) -> None:
    """Write the model, its tokenizer and its chat template to ``output_dir``. Collective.

    Args:
        alpaca: every record was laid out as Alpaca does, so the chat template becomes that.
        compute: the type that ``model`` computes in.

    Raises:
        DiskError: it cannot be written; what was there before is untouched.
        DataError: opened again, it is not the model that was trained; it is kept in ``unproved``.
    """
    live = live_answer(model, ranks.device)
    reshard(model)
    config = ranks.together(lambda: load_config(settings.model))
    name = settings.save.export_dtype
    dtype = (config.dtype or torch.float32) if name == "auto" else getattr(torch, name)
    tensors = gathered(model.hf, dtype, keep=ranks.rank == 0)

    def write() -> None:
        folder = settings.save.output_dir
        try:
            written = _write(folder, tensors, config, tokenizer, settings, alpaca=alpaca)
            tensors.clear()  # what was written is loaded next
            exact = compute == config.dtype == torch.float32 and ranks.device.type == "cpu"
            _prove(written, live, config.dtype, _EXACT if exact else _ROUNDED)
            _move(written, folder)
        except OSError as exc:
            raise DiskError(
                f"{folder}: the model could not be written: {exc.strerror}; free space and start"
                " again with --resume"
            ) from exc

    ranks.together(lambda: write() if ranks.rank == 0 else None)


@torch.no_grad()
def gathered(hf: nn.Module, dtype: torch.dtype, *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors by name, in host memory, on the rank that keeps them; {} elsewhere.
    Collective.
    """
    whole: dict[str, Tensor] = {}
    saved = set(hf.state_dict())
    if keep:
        # What is neither learned nor derived, such as the bias of DeepSeek's router: as it came.
        whole |= {n: b.to("cpu", copy=True) for n, b in hf.named_buffers() if n in saved}
    for name, tensor in hf.named_parameters():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            # Adapters are folded in before anything is rounded.
            final = dtype if ".lora_" not in name and ".base_layer." not in name else torch.float32
            whole[name] = full.detach().to("cpu", final, copy=True)
    return whole


def _write(
    folder: Path,
    tensors: dict[str, Tensor],
    config: Any,
    tokenizer: Any,
    settings: Settings,
    *,
    alpaca: bool,
) -> Path:
    """The whole export, in a folder beside its place."""
    temporary = folder / ".export"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    if settings.model.lora_r:
        _adapters(tensors, settings, temporary)
        tensors = merged(tensors, config, settings.model)
    name = settings.save.export_dtype
    config.dtype = (config.dtype or torch.float32) if name == "auto" else getattr(torch, name)
    with torch.device("meta"):
        shape = architecture(config, dtype=config.dtype)
    with contextlib.suppress(TrainerError):  # few models have none; transformers' defaults do
        shape.generation_config = opened(
            GenerationConfig,
            settings.model.model_name_or_path,
            "generation_config.json",
            cache_dir=settings.model.cache_dir,
        )
    shape.generation_config.eos_token_id = _ends(
        shape.generation_config.eos_token_id, tokenizer, settings, alpaca=alpaca
    )
    learned = {name for name, _ in shape.named_parameters()}
    weights = {
        name: tensor.to(config.dtype) if name in learned else tensor
        for name, tensor in tensors.items()
    }
    shape.save_pretrained(temporary, state_dict=weights)
    if alpaca:
        tokenizer.chat_template = alpaca_chat_template(tokenizer)
    tokenizer.save_pretrained(temporary)
    for path in temporary.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors lets only its owner read what it writes
    failpoint("export.weights")
    return temporary


def _ends(
    known: int | list[int] | None, tokenizer: Any, settings: Settings, *, alpaca: bool
) -> int | list[int]:
    """The tokens that generation stops at: those that are known, and what answers were learned to
    end in, which for a base model is another one than its own.
    """
    ends = list(known) if isinstance(known, list) else [known] if known is not None else []
    ends += [tokenizer.eos_token_id] if alpaca or not ends else []
    if not alpaca and tokenizer.chat_template:
        chat = Conversation("", (Message("user", "x"), Message("assistant", "y")))
        data = settings.data.model_copy(update={"template": "chat", "model_max_length": 2**20})
        with contextlib.suppress(TrainerError):  # a template that takes no such plain chat
            for row in tokenise([chat], tokenizer, data, Counter()):
                assert isinstance(row, Tokenised)
                special = [i for i in row.ids[row.learned] if i in tokenizer.all_special_ids]
                ends += [int(special[-1])] if special else []
    ends = list(dict.fromkeys(ends))
    return ends if len(ends) > 1 else ends[0]


def _prove(folder: Path, live: Tensor, dtype: torch.dtype, limit: float) -> None:
    """Open what was written as anybody would, and ask it what the live model was asked."""
    hf, found = opened(
        AutoModelForCausalLM,
        str(folder),
        "exported model",
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
    )
    wrong = ""
    if lost := sorted(found["missing_keys"]):
        wrong = f"it has lost {len(lost)} tensor(s): {', '.join(lost[:3])}"
    elif strange := sorted(found["unexpected_keys"]):
        wrong = f"it holds {len(strange)} tensor(s) of other names: {', '.join(strange[:3])}"
    elif (difference := export_difference(hf, live)) > limit:
        wrong = f"log-probabilities differ by {difference:.1e} of their spread"
    if not wrong:
        return
    kept = folder.with_name("unproved")
    shutil.rmtree(kept, ignore_errors=True)
    folder.rename(kept)
    raise DataError(
        f"{kept}: the exported model is not the one that was trained ({wrong}); it is kept there,"
        " checkpoints are untouched"
    )


def _move(temporary: Path, folder: Path) -> None:
    files = sorted(temporary.iterdir(), key=lambda path: path.name == "config.json")
    (folder / "config.json").unlink(missing_ok=True)
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    for path in files:
        _sync(path)
        if path.name == "config.json":
            failpoint("export.renamed")
        shutil.rmtree(folder / path.name, ignore_errors=True)
        path.rename(folder / path.name)
    _sync(folder)
    temporary.rmdir()


def _adapters(tensors: dict[str, Tensor], settings: Settings, folder: Path) -> None:
    """Write the adapters by themselves too, as peft reads them, to ``adapter/``."""
    adapters = lora_config(settings.model)
    adapters.base_model_name_or_path = settings.model.model_name_or_path
    adapters.save_pretrained(folder / "adapter")
    own = {
        f"base_model.model.{name.replace(f'.{ADAPTER_NAME}.', '.')}": tensor.contiguous()
        for name, tensor in tensors.items()
        if ".lora_" in name
    }
    save_file(own, folder / "adapter" / "adapter_model.safetensors")


def alpaca_chat_template(tokenizer: Any) -> str:
    """A chat template that lays a question out as :func:`trainer.template.alpaca_prompt` does."""
    opening = "{{ bos_token }}" if opening_ids(tokenizer) else ""
    preface = alpaca_prompt("").partition("\n\n")[0]
    return (
        f"{opening}{{% if messages[0]['role'] == 'system' %}}{{{{ messages[0]['content'] }}}}"
        f"{{% else %}}{preface}{{% endif %}}"
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '\n\n### Instruction:\n' + message['content'] }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ '\n\n### Response:' + message['content'] + eos_token }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\n### Response:' }}{% endif %}"
    )


def _sync(path: Path) -> None:
    for each in [*path.iterdir(), path] if path.is_dir() else [path]:
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
