"""What a run needs before its first step: datasets, plan, sharded model, and where it was cut."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from trainer.cache import MixedDataset, TokenDataset, tokenised_dataset
from trainer.checkpoint import Checkpoints, Manifest
from trainer.config import OptimSettings, Settings
from trainer.errors import ConfigError, DataError
from trainer.fsdp import apply_fsdp, blocks, hand_out
from trainer.memory import Need, available_bytes, estimate
from trainer.metrics import say
from trainer.mixture import Source, records_an_epoch, sources
from trainer.model import TokenLoss, empty_model, load_config, load_weights
from trainer.optim import learning_rate, training_state
from trainer.output import name_dropped
from trainer.packing import Batches, Part
from trainer.proof import WAYS, say_way, set_way
from trainer.ranks import Ranks
from trainer.records import Records

__all__ = [
    "Data",
    "compute_type",
    "datasets",
    "for_evaluation",
    "laid_out",
    "plans",
    "print_arithmetic",
    "print_mixture",
    "read_records",
    "recipe",
    "resumed",
    "sharded_model",
    "step_count",
]


@dataclass(frozen=True, slots=True)
class Data:
    """Tokenised records and the sources that they came from."""

    sources: tuple[Source, ...]
    dataset: MixedDataset

    @property
    def alpaca(self) -> bool:
        """Whether all that was laid out has Alpaca's layout."""
        return not self.dataset.chats and bool(self.dataset.instructions)


def datasets(settings: Settings, tokenizer: Any, ranks: Ranks) -> tuple[Data, Data | None]:
    """The training records, and those of ``eval_data_path``."""
    training = read_records(settings, settings.data.paths, tokenizer, ranks, "dropped.jsonl")
    held_out = settings.data.eval_paths
    if not held_out:
        return training, None
    return training, read_records(settings, held_out, tokenizer, ranks, "dropped_eval.jsonl")


def read_records(
    settings: Settings, paths: tuple[Path, ...], tokenizer: Any, ranks: Ranks, list_file: str
) -> Data:
    """The records of ``paths`` as tokens; those that are left out are named in ``list_file``."""
    found = ranks.together(lambda: sources(paths, settings.data))
    parts = [_tokenised(source, tokenizer, ranks) for source in found]
    if ranks.rank == 0:
        name_dropped(
            {source.name: part for source, part in zip(found, parts, strict=True)},
            settings.save.output_dir / list_file,
        )
        for source, part in zip(found, parts, strict=True):
            for note, count in part.notes.items():
                say(f"{source.name}: {note} ({count:,} records)")
    dataset = MixedDataset(parts)
    others = dataset.instructions
    if ranks.rank == 0 and dataset.chats and others > 0:
        say(
            f"{dataset.chats:,} records are in the layout of the model's chat template and"
            f" {others:,} in Alpaca's; --template chat lays all out as chats"
        )
    return Data(found, dataset)


def _tokenised(source: Source, tokenizer: Any, ranks: Ranks) -> TokenDataset:
    """Tokenised once a host, mapped by its other processes."""

    def make() -> TokenDataset:
        records = Records(source.paths, source.rules)
        if ranks.rank == 0:
            for note in records.notes:
                say(note)
        return tokenised_dataset(records, tokenizer, source.settings)

    first = ranks.together(lambda: make() if ranks.local_rank == 0 else None)
    key = ranks.gather(bytes.fromhex(first.key) if first else bytes(32))[0].hex()

    def check() -> None:
        if first is not None and first.key != key:
            raise DataError(f"{source.name}: is another dataset on this host than on rank 0's")

    ranks.together(check)
    cache = source.settings.dataset_cache_dir.expanduser()
    return first or TokenDataset(cache / key)


def plans(
    settings: Settings, training: Data, held_out: Data | None, ranks: Ranks
) -> tuple[Batches, Batches | None]:
    """Which records are trained on in which step, and which are held out."""
    data, optim, dataset = settings.data, settings.optim, training.dataset
    indexes, held = np.arange(len(dataset)), np.arange(0)
    if data.eval_split_ratio:
        count = max(1, round(len(dataset) * data.eval_split_ratio))
        shuffled = np.random.Generator(np.random.PCG64(optim.seed)).permutation(len(dataset))
        held, indexes = np.sort(shuffled[:count]), np.sort(shuffled[count:])
    per_round = optim.per_device_train_batch_size * ranks.size
    batches = replace(
        for_evaluation(settings, dataset, indexes, ranks),
        global_batch=optim.global_batch_size or per_round * optim.gradient_accumulation_steps,
        rows=optim.per_device_train_batch_size,
        parts=ranks.together(lambda: _parts(training, indexes)),
    )
    if held_out is not None:
        every = np.arange(len(held_out.dataset))
        return batches, for_evaluation(settings, held_out.dataset, every, ranks)
    return batches, for_evaluation(settings, dataset, held, ranks) if len(held) else None


def for_evaluation(
    settings: Settings, dataset: MixedDataset, indexes: np.ndarray, ranks: Ranks
) -> Batches:
    """The records ``indexes`` in micro-batches to be measured, not learned from."""
    rows = settings.log.per_device_eval_batch_size
    return Batches(
        dataset,
        indexes,
        global_batch=rows * ranks.size,
        rows=rows,
        max_length=settings.data.model_max_length,
        packing=settings.data.packing,
        seed=settings.optim.seed,
        processes=settings.parallel.planned_processes or ranks.size,
    )


def _parts(training: Data, indexes: np.ndarray) -> tuple[Part, ...]:
    """What each source of a mixture gives; one source alone gives all."""
    edges = np.searchsorted(indexes, training.dataset.starts)
    counts = [int(count) for count in np.diff(edges)]
    for source, count in zip(training.sources, counts, strict=True):
        if not count:
            raise DataError(f"{source.name}: --eval_split_ratio leaves no record to train on")
    if len(counts) == 1 and training.sources[0].repeat == 1:
        return ()
    taken = records_an_epoch(counts, training.sources)
    return tuple(Part(count, n) for count, n in zip(counts, taken, strict=True))


def laid_out(model: TokenLoss, batches: Batches, ranks: Ranks) -> Batches:
    """``batches`` in rows that ``model`` can be given: some take one record a row."""
    if model.packs or not batches.packing:
        return batches
    if ranks.rank == 0:
        say(say_way(model.hf))
    return replace(batches, packing=False)


def step_count(optim: OptimSettings, batches: Batches) -> int:
    if optim.max_steps > 0:
        return optim.max_steps
    return math.ceil(optim.num_train_epochs * batches.steps_per_epoch)


def compute_type(settings: Settings, device: torch.device) -> torch.dtype:
    """bfloat16 if asked for and there, or on a GPU if nothing is said; TensorFloat-32 likewise."""
    if settings.model.tf32 and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    wanted = settings.model.bf16
    if not (device.type == "cuda" if wanted == "auto" else wanted):
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

    def shape() -> tuple[TokenLoss, list[nn.Module], torch.dtype | None]:
        config = load_config(settings.model)
        vocabulary = config.get_text_config().vocab_size
        if largest_id >= vocabulary:
            raise ConfigError(
                f"{settings.model.model_name_or_path}: its tokenizer gives id {largest_id}, and the"
                f" model has {vocabulary} rows; the two do not belong together"
            )
        came_in = config.dtype
        model = empty_model(config, settings.model)
        groups = blocks(model, settings.parallel.fsdp_transformer_layer_cls_to_wrap)
        return model, groups, came_in

    model, groups, came_in = ranks.together(shape)
    # What is frozen came in this type and is computed in it: float32 would hold nothing more.
    frozen = compute if compute == came_in == torch.bfloat16 else torch.float32
    if ranks.rank == 0:
        need = estimate(
            model,
            groups,
            settings,
            shards=mesh.size(mesh.ndim - 1),
            compute=compute,
            frozen=frozen,
            device=ranks.device,
        )
        say(_told(need, ranks))
    source = ranks.together(
        lambda: load_weights(settings.model, settings.optim.seed) if ranks.rank == 0 else None
    )
    ways = list(WAYS)
    chosen = 0 if source is None else ways.index(source.hf.config._attn_implementation)
    set_way(model.hf, ways[int(ranks.sum([float(chosen)])[0])])
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(frozen)
    apply_fsdp(model, groups, mesh, settings.parallel, compute)
    hand_out(model, source, ranks, offload="offload" in settings.parallel.fsdp)
    return model.train()


def _told(need: Need, ranks: Ranks) -> str:
    """``need`` beside what there is."""
    host = available_bytes(torch.device("cpu"))
    if ranks.device.type == "cuda":
        return need.line("on each GPU", available_bytes(ranks.device), host)
    processes = "" if ranks.local_size == 1 else f" in each of {ranks.local_size} processes"
    return need.line(f"of memory{processes}", host // ranks.local_size, host)


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
    lora["lora_target_modules"] = sorted(settings.model.lora_target_modules)
    config = model.hf.config.to_json_string(use_diff=False)
    return {
        **optim,
        **(lora if settings.model.lora_r else {}),
        "model": hashlib.sha256(config.encode()).hexdigest()[:16],
        "compute": str(compute).removeprefix("torch."),
        "dataset": batches.dataset.key[:16],
        "mixture": [list(part) for part in batches.parts],
        "eval_split_ratio": settings.data.eval_split_ratio,
        "model_max_length": settings.data.model_max_length,
        "packing": batches.packing,
        "global_batch_size": batches.global_batch,
        "planned_processes": batches.processes,
        "total_steps": total_steps,
    }


def resumed(
    settings: Settings,
    checkpoints: Checkpoints,
    fresh: Manifest,
    model: TokenLoss,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
) -> Manifest:
    """The checkpoint to go on from, loaded; ``fresh`` when there is none. Its recipe is the run's,
    with the number of processes that rows were cut for when it began.
    """
    chosen = settings.save.resume
    found = checkpoints.at(chosen) if isinstance(chosen, Path) else checkpoints.newest()
    if found is None:
        if ranks.rank == 0:
            say(f"{settings.save.output_dir} holds no checkpoint: training starts at step 1")
        return fresh
    folder, manifest = found
    recipe = dict(fresh.recipe)
    if settings.parallel.planned_processes is None:
        recipe["planned_processes"] = manifest.recipe.get("planned_processes")
    ranks.together(lambda: _refuse_other_recipe(settings, manifest, recipe))
    checkpoints.load(folder, training_state(model, optimizer, updates=manifest.updates))
    if ranks.rank == 0:
        say(f"resumed from {folder.name}, written by {manifest.world_size} processes")
    if isinstance(chosen, Path):
        ranks.together(lambda: checkpoints.set_aside(manifest.step) if ranks.rank == 0 else None)
    return replace(
        fresh,
        recipe=recipe,
        step=manifest.step,
        updates=manifest.updates,
        tokens=manifest.tokens,
    )


def _refuse_other_recipe(settings: Settings, found: Manifest, recipe: dict[str, Any]) -> None:
    changed = {
        name: f"{name} {found.recipe.get(name)!r} -> {value!r}"
        for name, value in recipe.items()
        if found.recipe.get(name) != value
    }
    advice = "use the same, or another --output_dir"
    if "total_steps" in changed:
        old, new = found.recipe["total_steps"], recipe["total_steps"]
        optim = settings.optim
        if found.step <= new and all(
            learning_rate(optim, step, old) == learning_rate(optim, step, new)
            for step in range(found.step)
        ):
            del changed["total_steps"]
        elif set(changed) == {"total_steps"}:
            advice = (
                "the learning rates of steps that are done would have been others. With"
                " --lr_scheduler_type constant or constant_with_warmup and --warmup_steps a run may"
                " be made longer; or begin anew from its weights: --model_name_or_path"
                f" {settings.save.output_dir} and another --output_dir"
            )
    if changed:
        raise ConfigError(
            f"checkpoint-{found.step} was made with other settings: {', '.join(changed.values())};"
            f" {advice}"
        )


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
        if (settings.model.bf16 is True and compute == torch.float32)
        else ""
    )
    say(
        f"{type(model.hf).__name__}: {_count(learned)} parameters learned in float32,"
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
        f"{batches.records_per_epoch:,} records: {total_steps:,} steps of {batches.global_batch}"
        f" records ({how}), {total_steps / batches.steps_per_epoch:.2f} epochs"
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
        + (f", busy {batches.busy(groups, ranks.size):.0%} of the time" if ranks.size > 1 else "")
    )


def _count(number: int) -> str:
    """``134.5 M``, ``48.2 k``: in the unit that shows it."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:,.1f}{unit}"
    return str(number)


def print_mixture(training: Data, batches: Batches) -> None:
    """What each source of a mixture gives to an epoch."""
    for source, part in zip(training.sources, batches.parts, strict=False):
        say(
            f"{source.name}: {part.an_epoch:,} of {part.records:,} records an epoch,"
            f" {part.an_epoch / batches.records_per_epoch:.1%} of it"
        )
