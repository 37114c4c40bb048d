"""What a training run can be told: one frozen section for each part, and one flat command line.

The flags are Hugging Face's and Alpaca's, because people have them in their scripts; where a name
has changed over the years both spellings are read. A flag that would be ignored elsewhere is either
honoured here or refused. The price of one flat command line: a field's name occurs once in all
sections.
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from trainer.errors import ConfigError, UsageError

__all__ = [
    "DataSettings",
    "LogSettings",
    "ModelSettings",
    "OptimSettings",
    "ParallelSettings",
    "SaveSettings",
    "Settings",
    "parse",
]

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )


class ModelSettings(_Section):
    """The model and the arithmetic."""

    model_name_or_path: str
    """A folder, or a model id that transformers can fetch."""
    cache_dir: Path | None = None
    """Where transformers keeps what it fetches."""
    bf16: bool = False
    """Compute in bfloat16 where the device has it; the weights that learn stay float32."""
    tf32: bool = False
    """Let float32 products use TensorFloat-32 on a GPU."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, a third more work."""
    lora_r: Annotated[int, Field(ge=0)] = 0
    """Rank of LoRA adapters; 0 trains the whole model."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    lora_dropout: Fraction = 0.0
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the layers that get an adapter; all-linear: every linear layer but the head."""

    @field_validator("lora_target_modules", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value


class DataSettings(_Section):
    """The records and what of them is learned."""

    data_path: Path
    """Alpaca JSON, JSON Lines, messages, Self-Instruct seeds, Parquet, or a Woolmill run folder."""
    eval_data_path: Path | None = None
    eval_split_ratio: Fraction = 0.0
    """Share of the records that is held out when there is no eval_data_path."""
    template: Literal["auto", "alpaca", "chat"] = "auto"
    """auto: chat for conversations, Alpaca's for instructions."""
    model_max_length: Positive = 512
    """Longest record, in tokens."""
    boundary: Literal["split", "alpaca", "prefix"] = "split"
    """How prompt and response are tokenised: apart (as inference does), as Alpaca did, or together
    with every token that holds a character of the response learned."""
    too_long: Literal["drop", "truncate"] = "drop"
    """Records longer than model_max_length; truncate cuts the end off, as Alpaca did."""
    packing: bool = True
    """Lay several records in one row. False pads each to the longest of its micro-batch."""
    dataset_cache_dir: Path = Path("~/.cache/woolmill/datasets")

    @model_validator(mode="after")
    def _one_held_out_set(self) -> DataSettings:
        if self.eval_data_path is not None and self.eval_split_ratio:
            raise ValueError("give eval_data_path or eval_split_ratio, not both")
        if self.template == "chat" and self.boundary != "split":
            raise ValueError("the chat template goes with boundary split: its turns end in tokens")
        return self


class OptimSettings(_Section):
    """Batches, optimizer and learning rate."""

    num_train_epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3.0
    max_steps: int = -1
    """Optimizer steps in all; above 0 it overrides num_train_epochs."""
    per_device_train_batch_size: Positive = 8
    """Records of a padded micro-batch. Packed, a micro-batch is one row that holds at most this
    number x model_max_length tokens: no more memory than padded training needs."""
    gradient_accumulation_steps: Positive = 1
    global_batch_size: Positive | None = None
    """Records of one optimizer step, over all devices. None: the product of the two numbers above
    and the number of devices."""
    optim: Literal["adamw_torch", "adamw_torch_fused"] = "adamw_torch"
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-5
    weight_decay: NotNegative = 0.0
    """Of matrices; vectors (norms, biases) do not decay."""
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: NotNegative = 1e-8
    max_grad_norm: NotNegative = 1.0
    """Longer gradients are scaled down to this length; 0: never."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Fraction = 0.0
    warmup_steps: NotNegative = 0.0
    """Steps, or below 1 a share of all steps; it wins over warmup_ratio."""
    loss_norm: Literal["token", "microbatch"] = "token"
    """token: divide by the target tokens of the global batch. microbatch: Alpaca's mean of means,
    which weighs short answers more."""
    max_bad_steps: Annotated[int, Field(ge=0)] = 3
    """Steps in a row whose loss or gradient is not finite that are skipped before the run stops."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42

    def warmup(self, total_steps: int) -> int:
        """Steps of linear warmup out of ``total_steps``."""
        if self.lr_scheduler_type == "constant":
            return 0
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil((self.warmup_steps or self.warmup_ratio) * total_steps)


Fsdp = Literal[
    "full_shard", "shard_grad_op", "hybrid_shard", "no_shard", "offload", "auto_wrap", ""
]


class ParallelSettings(_Section):
    """How the model is spread over processes. Launch them with torchrun."""

    fsdp: tuple[Fsdp, ...] = ("full_shard",)
    """Words: full_shard, shard_grad_op (keep gathered weights until the backward pass),
    hybrid_shard (shard in a node, replicate across nodes), no_shard (replicate), offload (weights
    and optimizer in host memory), auto_wrap (always on)."""
    fsdp_transformer_layer_cls_to_wrap: tuple[str, ...] = ()
    """Class names of the blocks that are sharded one by one; empty: as the model's code says."""
    replicas: Positive | None = None
    """Copies of the sharded model; None: as the fsdp words say."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """How long a process waits for the others before it calls them lost."""

    @field_validator("fsdp", "fsdp_transformer_layer_cls_to_wrap", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_way_to_shard(self) -> ParallelSettings:
        ways = [word for word in self.fsdp if word not in ("offload", "auto_wrap", "")]
        if len(ways) > 1:
            raise ValueError(f"fsdp names {' and '.join(ways)}: choose one")
        if self.replicas is not None and {"no_shard", "hybrid_shard"} & set(ways):
            raise ValueError(f"give replicas or {ways[0]}, not both")
        return self


class SaveSettings(_Section):
    """Checkpoints and the finished model."""

    output_dir: Path
    """The finished model; below it checkpoint-N, metrics.jsonl and dropped.jsonl."""
    save_strategy: Literal["steps", "epoch", "no"] = "steps"
    save_steps: Positive = 500
    save_total_limit: Positive | None = 2
    """Whole checkpoints that are kept."""
    async_save: bool = True
    """Write checkpoints beside the training, from a copy in host memory."""
    resume: bool = False
    """Go on from the newest whole checkpoint of output_dir; without one, start."""
    overwrite: bool = False
    """Replace what an earlier run left in output_dir."""
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the finished model; auto: as the model came."""

    @model_validator(mode="after")
    def _resume_or_overwrite(self) -> SaveSettings:
        if self.resume and self.overwrite:
            raise ValueError("give resume or overwrite, not both")
        return self


class LogSettings(_Section):
    """Evaluation and metrics."""

    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    eval_steps: Positive = 500
    eval_on_start: bool = False
    per_device_eval_batch_size: Positive = 8
    logging_steps: Positive = 10
    report_to: Literal["none", "tensorboard", "trackio"] = "none"


class Settings(BaseModel):
    """All sections; what ``parse`` returns."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelSettings
    data: DataSettings
    optim: OptimSettings
    parallel: ParallelSettings
    save: SaveSettings
    log: LogSettings

    @model_validator(mode="after")
    def _held_out_records(self) -> Settings:
        wants = self.log.eval_strategy != "no" or self.log.eval_on_start
        if wants and self.data.eval_data_path is None and not self.data.eval_split_ratio:
            raise ValueError("evaluation needs eval_data_path or eval_split_ratio")
        return self


_SECTIONS: dict[str, type[_Section]] = {
    "model": ModelSettings,
    "data": DataSettings,
    "optim": OptimSettings,
    "parallel": ParallelSettings,
    "save": SaveSettings,
    "log": LogSettings,
}

_OTHER_SPELLINGS = {
    "eval_strategy": "evaluation_strategy",
    "fsdp_transformer_layer_cls_to_wrap": "transformer_layer_cls_to_wrap",
    "overwrite": "overwrite_output_dir",
    "resume": "resume_from_checkpoint",
}
"""Names that Hugging Face's Trainer has, or had, for a setting."""


def _fields() -> Iterator[tuple[str, str, FieldInfo]]:
    """Every setting: its section, name and field."""
    for section, model in _SECTIONS.items():
        for name, field in model.model_fields.items():
            yield section, name, field


def _spellings(name: str) -> list[str]:
    names = [name, _OTHER_SPELLINGS[name]] if name in _OTHER_SPELLINGS else [name]
    return list(dict.fromkeys(word for n in names for word in (n, n.replace("_", "-"))))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see python -m trainer --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m trainer",
        usage="torchrun [...] -m trainer --model_name_or_path MODEL --data_path DATA"
        " --output_dir DIR [--FLAG VALUE ...]",
        description="Fine-tune a causal language model on instruction records, with FSDP2.",
        epilog="Every flag can be written with _ or -. Exit codes: 0 done, 64 usage, 65 data, "
        "69 hub unreachable, 73 output folder, 74 disk, 75 stopped and resumable, 77 access, "
        "78 settings, 130/143 interrupted after a checkpoint.",
        allow_abbrev=False,
    )
    groups = {name: parser.add_argument_group(name, cls.__doc__) for name, cls in _SECTIONS.items()}
    for section, name, field in _fields():
        boolean = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
        default = "required" if field.is_required() else f"default {field.get_default()!r}"
        groups[section].add_argument(
            *(f"--{spelling}" for spelling in _spellings(name)),
            dest=name,
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f"{' '.join((field.description or '').split())} ({default})".strip(),
            **boolean,  # type: ignore[arg-type]
        )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    # torch.distributed.launch passes it; torchrun says the same in the environment.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def parse(argv: Sequence[str]) -> Settings:
    """The settings that a command line asks for.

    Raises:
        UsageError: an unknown flag (with the nearest name), or a flag without its value.
        ConfigError: a value out of range, or settings that contradict each other.
    """
    known, unknown = _parser().parse_known_args(argv)
    if unknown:
        raise UsageError(_unknown_flag(unknown[0]))
    given = vars(known)
    sections: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    for section, name, _ in _fields():
        if name in given:
            sections[section][name] = given[name]
    try:
        return Settings.model_validate(sections)
    except ValidationError as exc:
        first = exc.errors()[0]
        flag = f"--{first['loc'][1]}: " if len(first["loc"]) > 1 else ""
        if first["type"] == "missing":
            raise UsageError(f"{flag}is missing; see python -m trainer --help") from exc
        message = first["msg"].removeprefix("Value error, ")
        shown = f", not {first['input']!r}" if isinstance(first["input"], str) else ""
        raise ConfigError(f"{flag}{message}{shown}") from exc


def _unknown_flag(word: str) -> str:
    if word.split("=")[0].strip("-").replace("-", "_") == "deepspeed":
        return "--deepspeed: this trainer shards with FSDP2; use --fsdp full_shard"
    if not word.startswith("-"):
        return f"{word!r} belongs to no flag; see python -m trainer --help"
    names = [spelling for _, name, _ in _fields() for spelling in _spellings(name)]
    name = word.split("=")[0].lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean --{near[0]}?" if near else "see python -m trainer --help"
    return f"unknown flag {word.split('=')[0]}; {hint}"
