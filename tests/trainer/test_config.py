"""The command line: both spellings, one clear line for a mistake, and the exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainer import errors
from trainer.config import parse
from trainer.errors import ConfigError, TrainerError, UsageError
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
    for flag in ("--model_name_or_path", "--fsdp", "--save-total-limit", "--evaluation_strategy"):
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
