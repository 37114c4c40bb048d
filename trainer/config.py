"""What a training run can be told: one frozen section for each part, and one flat command line.

The flags are Hugging Face's and Alpaca's, because people have them in their scripts; what other
trainers call a setting is read too (``trainer/flags.py``). ``--config`` names a TOML or YAML file
of the same names, over which the command line wins. The price of one flat command line: a field's
name occurs once in all sections.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

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
from trainer.fetched import located
from trainer.flags import NO_EFFECT, ONLY, REFUSED, SPELLINGS

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


def _words(value: Any, separators: str) -> tuple[Any, ...]:
    """The words of a text, or of a list of such texts."""
    texts = [value] if isinstance(value, str) else value
    pattern = f"[{re.escape(separators)}]"
    return tuple(word for text in texts for word in re.split(pattern, text) if word)


class ModelSettings(_Section):
    """The model and the arithmetic."""

    model_name_or_path: str
    """A folder, a model id that transformers can fetch, or smollm2 (woolmill models fetch)."""
    cache_dir: Path | None = None
    """Where transformers keeps what it fetches."""
    chat_template: str | None = None
    """A file, or the name of a chat template (chatml, plain, or one that TRL ships), instead of the
    model's own; for base models, which have none."""
    bf16: bool | Literal["auto"] = "auto"
    """Compute in bfloat16 where the device has it; the weights that learn stay float32. auto: on a
    GPU, and in float32 on a CPU."""
    tf32: bool | Literal["auto"] = "auto"
    """Let float32 products use TensorFloat-32 on a GPU. auto: yes, as PyTorch does not."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, a third more work."""
    lora_r: Annotated[int, Field(ge=0)] = 0
    """Rank of LoRA adapters; 0 trains the whole model."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    lora_dropout: Fraction = 0.0
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the layers that get an adapter; all-linear: every linear layer but the head."""

    @field_validator("model_name_or_path")
    @classmethod
    def _located(cls, value: str) -> str:
        return located(value)

    @field_validator("lora_target_modules", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _words(value, ",")


def _tuple(value: Path | tuple[Path, ...]) -> tuple[Path, ...]:
    return (value,) if isinstance(value, Path) else value


class DataSettings(_Section):
    """The records and what of them is learned."""

    data_path: Path | tuple[Path, ...]
    """Files, folders, patterns or ids of hub datasets, one or several: JSON, JSON Lines, CSV,
    Parquet, Arrow, a Woolmill run; or one .toml file that mixes several sources."""
    eval_data_path: Path | tuple[Path, ...] | None = None
    """The same, of records that are held out. They are evaluated after each epoch and at the end,
    unless --eval_strategy says otherwise."""
    eval_split_ratio: Fraction = 0.0
    """Share of the records that is held out when there is no eval_data_path."""
    column_mapping: dict[str, str] = Field(default_factory=dict)
    """New names of columns: OLD=NEW,OLD=NEW."""
    ignore_columns: tuple[str, ...] = ()
    """Columns that are left out, separated by commas; any other column that would be lost is
    refused."""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """Rows that are no records end the run, or are skipped, counted and named in dropped.jsonl."""
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

    @field_validator("data_path", "eval_data_path", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Path) else value

    @property
    def paths(self) -> tuple[Path, ...]:
        """``data_path``, which may be one."""
        return _tuple(self.data_path)

    @property
    def eval_paths(self) -> tuple[Path, ...]:
        """``eval_data_path``; empty without one."""
        return () if self.eval_data_path is None else _tuple(self.eval_data_path)

    @field_validator("ignore_columns", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _words(value, ",")

    @field_validator("column_mapping", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("{"):
            return json.loads(value)
        pairs = [pair.split("=", 1) for pair in value.split(",")]
        if any(len(pair) != 2 or not all(pair) for pair in pairs):
            raise ValueError("should be OLD=NEW,OLD=NEW")
        return dict(pairs)

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
    planned_processes: Positive | None = None
    """Cut rows so that this many processes are equally busy; None: as many as the run is started
    with. A run keeps it when it goes on with another number of processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """How long a process may be silent before the others call it lost; work is no silence."""

    @field_validator("fsdp", "fsdp_transformer_layer_cls_to_wrap", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _words(value, ", ")

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
    resume: bool | Path = False
    """Go on from the newest whole checkpoint of output_dir; without one, start. A path is the
    checkpoint to go on from."""
    overwrite: bool = False
    """Replace what an earlier run left in output_dir."""
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the finished model; auto: as the model came."""

    @field_validator("resume", mode="before")
    @classmethod
    def _word_or_path(cls, value: Any) -> Any:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if isinstance(value, str):
            return words.get(value.lower(), Path(value))
        return value

    @model_validator(mode="after")
    def _resume_or_overwrite(self) -> SaveSettings:
        if self.resume and self.overwrite:
            raise ValueError("give resume or overwrite, not both")
        return self


class LogSettings(_Section):
    """Evaluation and metrics."""

    eval_strategy: Literal["no", "steps", "epoch"] | None = None
    """When held-out records are evaluated, and at the end. None: after each epoch where there are
    such records, or every eval_steps where that is given."""
    eval_steps: Positive = 500
    eval_on_start: bool = False
    per_device_eval_batch_size: Positive = 8
    logging_steps: Positive | None = None
    """Steps that a printed line stands for. None: 10, or fewer in a run of less than 100 steps, so
    that it prints ten lines."""
    report_to: tuple[Literal["none", "tensorboard", "trackio", "wandb"], ...] = ()
    """Also tell these trackers, separated by commas."""
    run_name: str | None = None
    """What trackers call the run; None: as the output folder is called."""
    logging_dir: Path | None = None
    """Where TensorBoard's files go; None: tensorboard in the output folder."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(word for word in _words(value, ",") if word != "none")


class Settings(BaseModel):
    """All sections; what ``parse`` returns."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelSettings
    data: DataSettings
    optim: OptimSettings
    parallel: ParallelSettings
    save: SaveSettings
    log: LogSettings
    notes: tuple[str, ...] = ()
    """What the person should know about the flags: a line each."""

    @property
    def holds_out(self) -> bool:
        """Whether there are records to evaluate on."""
        return self.data.eval_data_path is not None or self.data.eval_split_ratio > 0

    @property
    def eval_strategy(self) -> Literal["no", "steps", "epoch"]:
        """When held-out records are evaluated."""
        if self.log.eval_strategy is not None:
            return self.log.eval_strategy
        if not self.holds_out:
            return "no"
        return "steps" if "eval_steps" in self.log.model_fields_set else "epoch"

    @model_validator(mode="after")
    def _held_out_records(self) -> Settings:
        wants = self.eval_strategy != "no" or self.log.eval_on_start
        if wants and not self.holds_out:
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
"""The fields of ``Settings``, in the order in which ``--help`` shows them."""


def _fields() -> Iterator[tuple[str, str, FieldInfo]]:
    """Every setting: its section, name and field."""
    for section, model in _SECTIONS.items():
        for name, field in model.model_fields.items():
            yield section, name, field


def _spellings(name: str) -> list[str]:
    names = [name, *SPELLINGS.get(name, ())]
    return list(dict.fromkeys(word for n in names for word in (n, n.replace("_", "-"))))


class _Help(argparse.HelpFormatter):
    """Names each flag by its underscored spellings; the others are the same with dashes."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name.removeprefix("--")]
        if action.nargs == 0 or not names:
            return super()._format_action_invocation(action)
        return f"{', '.join(names)} {self._format_args(action, 'VALUE')}"


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
        formatter_class=_Help,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="TOML or YAML file of flags; the command line wins over it"
    )
    groups = {name: parser.add_argument_group(name, cls.__doc__) for name, cls in _SECTIONS.items()}
    for section, name, field in _fields():
        more: dict[str, Any] = {}
        if bool in (field.annotation, *get_args(field.annotation)):
            more = {"nargs": "?", "const": "true"}
        elif get_origin(field.annotation) is tuple or name in ("data_path", "eval_data_path"):
            more = {"nargs": "+", "action": "extend"}
        default = "required" if field.is_required() else f"default {_default(field)!r}"
        groups[section].add_argument(
            *(f"--{spelling}" for spelling in _spellings(name)),
            dest=name,
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f"{' '.join((field.description or '').split())} ({default})".strip(),
            **more,
        )
    for name in (*ONLY, *NO_EFFECT, *REFUSED):
        parser.add_argument(
            *dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")),
            dest=name,
            nargs="?",
            const="true",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    # torch.distributed.launch passes it; torchrun says the same in the environment.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def parse(argv: Sequence[str]) -> Settings:
    """The settings that a command line asks for.

    Raises:
        UsageError: an unknown flag (with the nearest name), or a flag without its value.
        ConfigError: a value out of range, settings that contradict each other, or a configuration
            file that cannot be read.
    """
    known, unknown = _parser().parse_known_args(argv)
    if unknown:
        raise UsageError(_unknown_flag(unknown[0]))
    given = vars(known)
    if given["config"] is not None:
        given = _from_file(Path(given["config"])) | given
    notes = _foreign(given)
    sections: dict[str, Any] = {name: {} for name in _SECTIONS}
    for section, name, _ in _fields():
        if name in given:
            sections[section][name] = given[name]
    try:
        return Settings.model_validate({**sections, "notes": notes})
    except ValidationError as exc:
        first = exc.errors()[0]
        flag = f"--{first['loc'][1]}: " if len(first["loc"]) > 1 else ""
        if first["type"] == "missing":
            raise UsageError(f"{flag}is missing; see python -m trainer --help") from exc
        message = first["msg"].removeprefix("Value error, ")
        shown = f", not {first['input']!r}" if isinstance(first["input"], str) else ""
        raise ConfigError(f"{flag}{message}{shown}") from exc


def _foreign(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Lines about flags of other trainers that have no effect here.

    Raises:
        UsageError, ConfigError: a flag, or its value, asks for what this trainer does not do; says
            what to do instead.
    """
    for name, remedy in REFUSED.items():
        if name in given:
            raise UsageError(f"--{name}: {remedy}")
    for name, (values, remedy) in ONLY.items():
        if name in given and str(given[name]).lower() not in values:
            raise ConfigError(f"--{name} {given[name]}: {remedy}")
    return tuple(
        f"--{name} has no effect: {instead}" for name, instead in NO_EFFECT.items() if name in given
    )


def _from_file(path: Path) -> dict[str, Any]:
    """The settings of a configuration file, by their own names."""
    try:
        body = path.read_text(encoding="utf-8")
        values = _yaml(path, body) if path.suffix in (".yaml", ".yml") else tomllib.loads(body)
    except OSError as exc:
        raise ConfigError(f"--config {path}: {exc.strerror}") from exc
    except ValueError as exc:  # also tomllib's and the decoder's own
        raise ConfigError(f"--config {path}: {' '.join(str(exc).split())}") from exc
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: holds no names with values")
    fields = {name: field for _, name, field in _fields()}
    own = {spelling: name for name in fields for spelling in _spellings(name)}
    own |= {name: name for name in (*ONLY, *NO_EFFECT, *REFUSED)}
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = own.get(str(key))
        if name is None:
            raise UsageError(f"{path}: {_unknown_flag(f'--{key}').replace('flag --', '')}")
        if name in out:
            raise ConfigError(f"{path}: says {name} twice, once as {key}")
        choices = get_args(fields[name].annotation) if name in fields else ()
        if value is None and type(None) not in choices:
            continue  # "key:" in YAML: as if it were not there
        if value is False and any("no" in get_args(c) or c == "no" for c in choices):
            value = "no"  # which YAML reads as false
        out[name] = value
    return out


def _yaml(path: Path, body: str) -> Any:
    try:
        import yaml
    except ImportError as exc:
        raise ConfigError(f"--config {path}: YAML needs PyYAML; pip install pyyaml") from exc
    try:
        return yaml.safe_load(body)
    except yaml.YAMLError as exc:
        raise ValueError(str(exc)) from exc


def _unknown_flag(word: str) -> str:
    if not word.startswith("-"):
        return f"{word!r} belongs to no flag; see python -m trainer --help"
    names = [spelling for _, name, _ in _fields() for spelling in _spellings(name)]
    name = word.split("=")[0].lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    hint = f"did you mean --{near[0]}?" if near else "see python -m trainer --help"
    return f"unknown flag {word.split('=')[0]}; {hint}"
