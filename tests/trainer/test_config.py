"""The command line: both spellings, one clear line for a mistake, and the exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainer import errors
from trainer.config import parse
from trainer.errors import ConfigError, TrainerError, UsageError
from trainer.flags import NO_EFFECT, ONLY, REFUSED, SPELLINGS
from trainer.optim import learning_rate
from trainer.train import main

NEEDED = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o"]


def test_old_and_new_spellings_mean_the_same() -> None:
    """Underscores or hyphens, yesterday's names or today's, a flag alone or with True."""
    old = (
        "--evaluation_strategy epoch --eval_split_ratio 0.1 --overwrite_output_dir True"
        " --transformer_layer_cls_to_wrap B"
    )
    new = (
        "--eval-strategy epoch --eval-split-ratio=0.1 --overwrite"
        " --fsdp-transformer-layer-cls-to-wrap B"
    )
    assert parse([*NEEDED, *old.split()]) == parse([*NEEDED, *new.split()])
    settings = parse([*NEEDED, *new.split()])
    assert settings.save.overwrite
    assert settings.parallel.fsdp_transformer_layer_cls_to_wrap == ("B",)
    assert not parse([*NEEDED, "--packing", "False"]).data.packing
    assert parse([*NEEDED, "--resume_from_checkpoint", "True"]).save.resume


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluation_strateg", "no"], "unknown flag --evaluation_strateg; did you mean --eval"),
        (["--deepspeed", "x.json"], "shards with FSDP2; use --fsdp full_shard"),
        (["stray"], "'stray' belongs to no flag"),
        (["--seed"], "expected one argument"),
    ],
)
def test_a_command_line_that_cannot_be_understood(arguments: list[str], message: str) -> None:
    """64, with the nearest flag."""
    with pytest.raises(UsageError) as caught:
        parse([*NEEDED, *arguments])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--learning_rate -1", "--learning_rate: Input should be greater than 0, not '-1'"),
        ("--num_train_epochs nan", "--num_train_epochs: Input should be"),
        ("--fsdp full_shad", "--fsdp: Input should be 'full_shard'"),
        ("--fsdp full_shard,no_shard", "fsdp names full_shard and no_shard: choose one"),
        ("--fsdp no_shard --replicas 2", "give replicas or no_shard, not both"),
        ("--resume --overwrite", "give resume or overwrite, not both"),
        ("--eval_strategy epoch", "evaluation needs eval_data_path or eval_split_ratio"),
        ("--eval_data_path e --eval_split_ratio .1", "give eval_data_path or eval_split_ratio"),
        ("--template chat --boundary alpaca", "the chat template goes with boundary split"),
        ("--optim lion", "--optim: Input should be 'adamw_torch' or 'adamw_torch_fused'"),
        ("--fp16 True", "--fp16 True: float16 loses small gradients; use --bf16 True"),
        ("--column_mapping a", "--column_mapping: should be OLD=NEW,OLD=NEW, not 'a'"),
        ("--report_to mlflow", "--report_to: Input should be 'none', 'tensorboard', 'trackio'"),
    ],
)
def test_a_setting_out_of_range(arguments: str, message: str) -> None:
    """78, naming the flag and what was given."""
    with pytest.raises(ConfigError) as caught:
        parse([*NEEDED, *arguments.split()])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--max_length 100", "--model_max_length 100"),
        ("--max_seq_length 100", "--model_max_length 100"),
        ("--cutoff_len 100", "--model_max_length 100"),
        ("--ddp_timeout 9", "--timeout_s 9"),
        ("--per_gpu_train_batch_size 3", "--per_device_train_batch_size 3"),
        ("--lora_rank 4", "--lora_r 4"),
        ("--validation_file v", "--eval_data_path v"),
        ("--resume_from_checkpoint out/checkpoint-3", "--resume out/checkpoint-3"),
        ("--resume_from_checkpoint False", ""),
        ("--do_train --fp16 False --save_safetensors true", ""),
        ("--lora_task_type CAUSAL_LM --assistant_only_loss True", ""),
        ("--report_to none", ""),
        ("--lora_target_modules q k", "--lora_target_modules q,k"),
        ("--report_to wandb trackio", "--report_to wandb,trackio"),
        ("--push-to-hub False --torch-compile=False", ""),
        ("--ignore_columns a,b --column_mapping x=y", "--ignore-columns a,b --column-mapping x=y"),
    ],
)
def test_flags_of_other_trainers_mean_the_same(theirs: str, ours: str) -> None:
    """Taken under another name, or taken where the value says what happens anyway."""
    assert parse([*NEEDED, *theirs.split()]) == parse([*NEEDED, *ours.split()])


def test_dataset_names_of_other_trainers() -> None:
    for name in ("dataset_name", "dataset_name_or_path", "train_file", "data_files"):
        arguments = ["--model_name_or_path", "m", "--output_dir", "o", f"--{name}", "a", "b"]
        assert parse(arguments).data.data_path == (Path("a"), Path("b"))


def test_every_foreign_flag_is_read_and_refused_or_explained() -> None:
    """No flag of the tables is unknown: one value at least is taken, or the remedy is said. And no
    name stands in two of them.
    """
    for name, (values, remedy) in ONLY.items():
        for value in values:
            assert parse([*NEEDED, f"--{name}", value]) == parse(NEEDED)
        with pytest.raises(ConfigError) as caught:
            parse([*NEEDED, f"--{name}", "else"])
        assert str(caught.value) == f"--{name} else: {remedy}"
    for name, instead in NO_EFFECT.items():
        assert parse([*NEEDED, f"--{name}", "1"]).notes == (f"--{name} has no effect: {instead}",)
    for name, remedy in REFUSED.items():
        with pytest.raises(UsageError) as refused:
            parse([*NEEDED, f"--{name}", "1"])
        assert str(refused.value) == f"--{name}: {remedy}"
    names = [*ONLY, *NO_EFFECT, *REFUSED, *(word for words in SPELLINGS.values() for word in words)]
    assert len(names) == len(set(names))


def test_when_held_out_records_are_evaluated() -> None:
    """Unasked after each epoch; every so many steps where their number is given; as said."""
    held = ["--eval_data_path", "e"]
    assert parse(NEEDED).eval_strategy == "no"
    assert parse([*NEEDED, *held]).eval_strategy == "epoch"
    assert parse([*NEEDED, "--eval_split_ratio", "0.1"]).eval_strategy == "epoch"
    assert parse([*NEEDED, *held, "--eval_steps", "5"]).eval_strategy == "steps"
    assert parse([*NEEDED, *held, "--eval_strategy", "no"]).eval_strategy == "no"


@pytest.mark.parametrize("suffix", [".toml", ".yaml"])
def test_a_configuration_file_says_what_flags_say(tmp_path: Path, suffix: str) -> None:
    """Lists, booleans, other spellings and hyphens; the command line wins over it."""
    path = tmp_path / f"run{suffix}"
    lines = {
        "model_name_or_path": '"m"',
        "dataset_name": '["d", "e"]',
        "output-dir": '"o"',
        "learning_rate": "1e-3",
        "packing": "false",
        "fsdp": '["full_shard", "auto_wrap"]',
        "report_to": '["wandb", "trackio"]',
        "seed": "3",
    }
    separator = " = " if suffix == ".toml" else ": "
    path.write_text("\n".join(f"{key}{separator}{value}" for key, value in lines.items()))
    flags = (
        "--model_name_or_path m --data_path d e --output_dir o --learning_rate 1e-3"
        " --packing False --fsdp full_shard,auto_wrap --report_to wandb,trackio --seed 4"
    )
    assert parse(["--config", str(path), "--seed", "4"]) == parse(flags.split())


@pytest.mark.parametrize(
    ("name", "body", "error", "message"),
    [
        ("r.toml", "lerning_rate = 1", UsageError, "unknown lerning_rate; did you mean --learning"),
        ("r.toml", "fp16 = true", ConfigError, "--fp16 True: float16 loses small gradients"),
        ("r.toml", "deepspeed = 'x'", UsageError, "--deepspeed: this trainer shards with FSDP2"),
        (
            "r.toml",
            "max_length = 3\nmodel_max_length = 4",
            ConfigError,
            "says model_max_length",
        ),
        ("r.toml", "a = ", ConfigError, "r.toml: Invalid value"),
        ("r.yaml", "a: [", ConfigError, "r.yaml: while parsing a flow"),
        ("r.yaml", "- a", ConfigError, "holds no names with values"),
        ("r.toml", "seed = -1", ConfigError, "--seed: Input should be greater than or equal to 0"),
        (None, "", ConfigError, "No such file or directory"),
    ],
)
def test_a_configuration_file_that_cannot_be_used(
    tmp_path: Path, name: str | None, body: str, error: type[TrainerError], message: str
) -> None:
    """One line that names the file or the flag."""
    path = tmp_path / (name or "none.toml")
    if name:
        path.write_text(body)
    with pytest.raises(error) as caught:
        parse([*NEEDED, "--config", str(path)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tracker_that_is_not_installed_is_named_before_torch_is_loaded() -> None:
    program = (
        "import sys\nfrom trainer.train import main\n"
        f"assert main([*{NEEDED!r}, '--report_to', 'wandb']) == 78\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "trainer: --report_to wandb: pip install wandb\n")


def test_a_flag_that_is_missing() -> None:
    with pytest.raises(UsageError, match="--data_path: is missing"):
        parse(["--model_name_or_path", "m", "--output_dir", "o"])


def test_every_error_has_the_exit_code_that_its_drawing_says() -> None:
    """The tree in the docstring is the tree in the code, and ``__all__`` is complete."""
    drawn = errors.__doc__ or ""
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    assert sorted(c.__name__ for c in classes) == sorted(errors.__all__)
    for cls in classes:
        (line,) = [part for part in drawn.splitlines() if f" {cls.__name__} " in part]
        if cls is not errors.Interrupted:
            assert f" {cls.exit_code} " in line  # type: ignore[attr-defined]
    assert issubclass(errors.Interrupted, TrainerError)
    assert [errors.Interrupted(n, "").exit_code for n in (2, 15)] == [130, 143]


def test_usage_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NEEDED, "--lerning_rate", "1"]) == 64
    assert capsys.readouterr().err == (
        "trainer: unknown flag --lerning_rate; did you mean --learning_rate?\n"
    )


def test_train_py_runs_as_a_script_too() -> None:
    """As Alpaca's README starts it, from any folder, with the same exit codes."""
    script = Path(__file__).parents[2] / "trainer" / "train.py"
    done = subprocess.run(
        [sys.executable, script, "--no_such_flag", "1"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr == "trainer: unknown flag --no_such_flag; see python -m trainer --help\n"


def test_help_is_quick_and_names_every_flag() -> None:
    """--help loads no torch, and neither does importing the package or a mistyped flag."""
    program = (
        "import sys, trainer\nfrom trainer.train import main\n"
        "main(['--no_such_flag'])\nassert 'torch' not in sys.modules\nmain(['--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for flag in ("--model_name_or_path", "--fsdp", "--save_total_limit", "--evaluation_strategy"):
        assert flag in done.stdout


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
def test_learning_rates_are_transformers_own(kind: str) -> None:
    """Step for step, warmup included."""
    import torch
    from transformers import get_scheduler

    optim = parse([*NEEDED, "--lr_scheduler_type", kind, "--warmup_ratio", "0.25"]).optim
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=optim.learning_rate)
    scheduler = get_scheduler(kind, optimizer, optim.warmup(10), 10)
    for step in range(10):
        assert learning_rate(optim, step, 10) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
