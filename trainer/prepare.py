"""What a run needs before its first step: datasets, plan, sharded model, and where it was cut."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from trainer.cache import TokenDataset, tokenised_dataset
from trainer.checkpoint import Checkpoints, Manifest
from trainer.config import OptimSettings, Settings
from trainer.errors import ConfigError, DataError
from trainer.fsdp import apply_fsdp, blocks, hand_out
from trainer.metrics import say
from trainer.model import TokenLoss, empty_model, load_config, load_weights
from trainer.optim import training_state
from trainer.output import name_dropped
from trainer.packing import Batches
from trainer.ranks import Ranks
from trainer.records import read_examples

__all__ = [
    "compute_type",
    "datasets",
    "plans",
    "print_arithmetic",
    "recipe",
    "resumed",
    "sharded_model",
    "step_count",
]


def datasets(
    settings: Settings, tokenizer: Any, ranks: Ranks
) -> tuple[TokenDataset, TokenDataset | None]:
    """The training records, and those of ``eval_data_path``."""

    def made(path: Path, suffix: str = "") -> TokenDataset:
        def make() -> TokenDataset:
            return tokenised_dataset(read_examples(path), tokenizer, settings.data)

        first = ranks.together(lambda: make() if ranks.local_rank == 0 else None)
        keys = ranks.gather(bytes.fromhex(first.key) if first else bytes(32))
        key = keys[0].hex()
        if first is not None and first.key != key:
            raise DataError(f"{path}: is another dataset on this host than on rank 0's")
        cache = settings.data.dataset_cache_dir.expanduser()
        dataset = first or TokenDataset(cache / key)
        if ranks.rank == 0:
            name_dropped(dataset, path, settings.save.output_dir / f"dropped{suffix}.jsonl")
        return dataset

    held_out = settings.data.eval_data_path
    return (
        made(settings.data.data_path),
        None if held_out is None else made(held_out, suffix="_eval"),
    )


def plans(
    settings: Settings, training: TokenDataset, held_out: TokenDataset | None, ranks: Ranks
) -> tuple[Batches, Batches | None]:
    """Which records are trained on in which step, and which are held out."""
    data, optim = settings.data, settings.optim
    indexes, held = np.arange(len(training)), np.arange(0)
    if data.eval_split_ratio:
        count = max(1, round(len(training) * data.eval_split_ratio))
        shuffled = np.random.Generator(np.random.PCG64(optim.seed)).permutation(len(training))
        held, indexes = np.sort(shuffled[:count]), np.sort(shuffled[count:])
        if not len(indexes):
            raise DataError(f"{data.data_path}: --eval_split_ratio leaves no record to train on")
    per_round = optim.per_device_train_batch_size * ranks.size
    batches = Batches(
        training,
        indexes,
        global_batch=optim.global_batch_size or per_round * optim.gradient_accumulation_steps,
        rows=optim.per_device_train_batch_size,
        max_length=data.model_max_length,
        packing=data.packing,
        seed=optim.seed,
    )
    rows = settings.log.per_device_eval_batch_size
    if held_out is not None:
        return batches, replace(
            batches, dataset=held_out, indexes=np.arange(len(held_out)), rows=rows
        )
    return batches, replace(batches, indexes=held, rows=rows) if len(held) else None


def step_count(optim: OptimSettings, batches: Batches) -> int:
    if optim.max_steps > 0:
        return optim.max_steps
    return math.ceil(optim.num_train_epochs * batches.steps_per_epoch)


def compute_type(settings: Settings, device: torch.device) -> torch.dtype:
    """bfloat16 if asked for and there; and TensorFloat-32 likewise."""
    if settings.model.tf32 and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if not settings.model.bf16:
        return torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def sharded_model(
    settings: Settings, ranks: Ranks, mesh: DeviceMesh, compute: torch.dtype, largest_id: int
) -> TokenLoss:
    """The model with this rank's shards of the weights of ``model_name_or_path``."""

    def shape() -> tuple[TokenLoss, list[nn.Module]]:
        config = load_config(settings.model)
        vocabulary = config.get_text_config().vocab_size
        if largest_id >= vocabulary:
            raise ConfigError(
                f"{settings.model.model_name_or_path}: its tokenizer gives id {largest_id}, and the"
                f" model has {vocabulary} rows; the two do not belong together"
            )
        model = empty_model(config, settings.model)
        return model, blocks(model, settings.parallel.fsdp_transformer_layer_cls_to_wrap)

    model, groups = ranks.together(shape)
    source = ranks.together(
        lambda: load_weights(settings.model, settings.optim.seed) if ranks.rank == 0 else None
    )
    apply_fsdp(model, groups, mesh, settings.parallel, compute)
    hand_out(model, source, ranks, offload="offload" in settings.parallel.fsdp)
    return model.train()


def recipe(
    settings: Settings, model: TokenLoss, batches: Batches, total_steps: int, compute: torch.dtype
) -> dict[str, Any]:
    """Everything the loss curve follows from, except the number of processes."""
    optim = settings.optim.model_dump(
        mode="json",
        exclude={
            "num_train_epochs",
            "max_steps",
            "gradient_accumulation_steps",
            "global_batch_size",
            "max_bad_steps",
        },
    )
    lora = settings.model.model_dump(mode="json", include={"lora_r", "lora_alpha", "lora_dropout"})
    config = model.hf.config.to_json_string(use_diff=False)
    return {
        **optim,
        **(lora if settings.model.lora_r else {}),
        "model": hashlib.sha256(config.encode()).hexdigest()[:16],
        "compute": str(compute).removeprefix("torch."),
        "dataset": batches.dataset.key[:16],
        "eval_split_ratio": settings.data.eval_split_ratio,
        "model_max_length": settings.data.model_max_length,
        "packing": settings.data.packing,
        "global_batch_size": batches.global_batch,
        "total_steps": total_steps,
    }


def resumed(
    checkpoints: Checkpoints,
    fresh: Manifest,
    model: TokenLoss,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
) -> Manifest:
    """The newest whole checkpoint, loaded; ``fresh`` when there is none."""
    found = checkpoints.newest()
    if found is None:
        return fresh
    changed = [
        f"{name} {found.recipe.get(name)!r} -> {value!r}"
        for name, value in fresh.recipe.items()
        if found.recipe.get(name) != value
    ]

    def refuse() -> None:
        if changed:
            raise ConfigError(
                f"checkpoint-{found.step} was made with other settings: {', '.join(changed)}; use"
                " the same, or another --output_dir"
            )

    ranks.together(refuse)
    checkpoints.load(found.step, training_state(model, optimizer, updates=found.updates))
    if ranks.rank == 0:
        say(f"resumed from checkpoint-{found.step}, written by {found.world_size} processes")
    return replace(fresh, step=found.step, updates=found.updates, tokens=found.tokens)


def print_arithmetic(
    settings: Settings,
    model: TokenLoss,
    batches: Batches,
    total_steps: int,
    ranks: Ranks,
    compute: torch.dtype,
) -> None:
    """What will happen, in numbers, before it does."""
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    wanted = (
        " (bf16 was asked for; this device has none)"
        if (settings.model.bf16 and compute == torch.float32)
        else ""
    )
    say(
        f"{type(model.hf).__name__}: {learned / 1e6:,.1f} M parameters learned in float32,"
        f" computed in {str(compute).removeprefix('torch.')}{wanted}"
    )
    optim = settings.optim
    how = (
        "--global_batch_size"
        if optim.global_batch_size
        else (
            f"{optim.per_device_train_batch_size} a device x {optim.gradient_accumulation_steps}"
            f" accumulated x {ranks.size} {ranks.device.type}"
        )
    )
    say(
        f"{len(batches.indexes):,} records: {total_steps:,} steps of {batches.global_batch} records"
        f" ({how}), {total_steps / batches.steps_per_epoch:.2f} epochs"
    )
    groups = batches.micro_batches(0)
    tokens = int(batches.dataset.lengths[batches.records(0)].sum())
    if batches.packing:
        rows = (
            f"packed in {len(groups)} rows of at most {batches.capacity:,},"
            f" {tokens / (len(groups) * batches.capacity):.0%} full"
        )
    else:
        rows = f"padded, in {len(groups)} micro-batches of at most {batches.rows} records"
    say(
        f"the first step: {tokens:,} tokens, {batches.targets(batches.records(0)):,} of them"
        f" learned; {rows}; {math.ceil(len(groups) / ranks.size)} a process"
    )
