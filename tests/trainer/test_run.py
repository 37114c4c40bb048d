"""Whole runs of the real command: how a step is split, and how a run is cut, does not matter."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.conftest import FAMILIES, toy_records, write_records
from tests.trainer.launch import Finished, curve, finish, start
from tests.trainer.reference import reference_loss
from trainer.checkpoint import checkpoint_steps, read_manifest
from trainer.template import alpaca_prompt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

Train = Callable[..., list[Finished]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def train(root: Path, llama: Path, records_file: Path) -> Train:
    """Run the command with ``--output_dir root/OUTPUT``: 8 steps of two micro-batches of a row."""

    def run(
        output: str,
        *more: str,
        ranks: int = 1,
        code: int | None = 0,
        model: Path = llama,
        data: Path = records_file,
        patience_s: float = 50.0,
        **options: Any,
    ) -> list[Finished]:
        arguments = [
            *("--model_name_or_path", str(model), "--data_path", str(data)),
            *("--output_dir", str(root / output), "--dataset_cache_dir", str(root / "cache")),
            *("--max_steps", "8", "--global_batch_size", "4", "--save_steps", "3"),
            *("--per_device_train_batch_size", "1", "--model_max_length", "200"),
            *("--learning_rate", "3e-3", "--warmup_steps", "2", "--timeout_s", "20"),
            # A kill some steps after a save should find it whole, however slow the disk.
            *("--async_save", "False", *more),
        ]
        run = start(arguments, root / f"{output}.logs", ranks=ranks, **options)
        done = finish(run, patience_s=patience_s)
        if code is not None:
            assert {rank.exit_code for rank in done} == {code}, [rank.output for rank in done]
        return done

    return run


@pytest.fixture(scope="module")
def whole(train: Train, root: Path) -> list[tuple[float, float, float]]:
    """The curve of a run that nothing cuts."""
    train("whole")
    assert len(curve(root / "whole")) == 8
    return curve(root / "whole")


def test_one_rank_and_two_ranks_give_the_same_bits(train: Train, root: Path, whole: Any) -> None:
    """Loss and gradient norm of 8 steps are bitwise equal on 1 and 2 ranks."""
    train("two", ranks=2)
    assert curve(root / "two") == whole


def test_replicas_give_the_same_bits_as_shards(train: Train, root: Path, whole: Any) -> None:
    """A 2 x 1 mesh, which replicates, follows the curve of the mesh that shards."""
    train("replicas", "--replicas", "2", ranks=2)
    assert curve(root / "replicas") == whole


def test_fault_125_a_run_goes_on_with_another_number_of_ranks(
    train: Train, root: Path, whole: Any
) -> None:
    """2 ranks, killed; 1 rank, killed; 2 ranks to the end: the curve of a run that was not cut."""
    train("cut", ranks=2, failpoint="train.step:5:kill", code=-signal.SIGKILL)
    done = train("cut", "--resume", failpoint="train.step:4:kill", code=-signal.SIGKILL)
    assert "resumed from checkpoint-3, written by 2 processes" in done[0].output
    done = train("cut", "--resume", ranks=2)
    assert "resumed from checkpoint-6, written by 1 processes" in done[0].output
    assert curve(root / "cut") == whole


@pytest.mark.parametrize(
    "point",
    [
        "save.begin:2",
        "save.shards:2",
        "save.digests:2",
        "save.manifest:2",
        "save.whole:2",
        "save.pruned:2",
        "export.weights:1",
        "export.renamed:1",
    ],
)
def test_fault_123_a_kill_at_every_point_of_a_save(
    train: Train, root: Path, whole: Any, point: str
) -> None:
    """Whatever a save had done when it was killed, the run goes on bitwise and exports; and a
    folder whose export was cut does not open.
    """
    name = point.replace(":", "-")
    limit = ("--save_total_limit", "1", "--async_save", "True")
    train(name, *limit, failpoint=f"{point}:kill", code=-signal.SIGKILL)
    assert not (root / name / "config.json").exists()
    train(name, *limit, "--resume")
    assert curve(root / name) == whole
    assert (root / name / "config.json").exists()
    # Killed between the newest being whole and the older being gone, both are there.
    assert checkpoint_steps(root / name) == ([3, 6] if point == "save.whole:2" else [6])


def test_fault_124_a_damaged_checkpoint_is_named_and_an_older_one_taken(
    train: Train, root: Path, whole: Any
) -> None:
    """One flipped bit in the newest checkpoint costs the steps since the one before."""
    train("flipped", failpoint="train.step:8:kill", code=-signal.SIGKILL)
    file = next((root / "flipped" / "checkpoint-6").glob("*.safetensors"))
    body = bytearray(file.read_bytes())
    body[-5] ^= 1
    file.write_bytes(body)
    done = train("flipped", "--resume")
    assert f"checkpoint-6 is not whole ({file.name}: its SHA-256" in done[0].output
    assert "resumed from checkpoint-3" in done[0].output
    assert curve(root / "flipped") == whole


def test_fault_125_other_settings_and_other_data_are_refused(
    train: Train, root: Path, tmp_path: Path
) -> None:
    """A resumed run whose curve would not be the old one's stops with 78 and says what differs;
    and a folder that holds a run is never written to unasked (73).
    """
    train("other", "--max_steps", "3")
    steps = ("--max_steps", "3")
    done = train("other", *steps, code=73)
    assert "holds an earlier run (checkpoint-3); go on with --resume" in done[0].output
    done = train("other", *steps, "--resume", "--learning_rate", "1e-3", code=78)
    assert "learning_rate 0.003 -> 0.001" in done[0].output
    done = train("other", *steps, "--resume", "--global_batch_size", "8", ranks=2, code=78)
    assert "global_batch_size 4 -> 8" in done[0].output
    assert done[1].output == ""
    more = write_records(tmp_path / "more.json", toy_records(41))
    done = train("other", *steps, "--resume", code=78, data=more)
    assert "dataset '" in done[0].output
    train("other", *steps, "--overwrite", "--learning_rate", "1e-3")
    assert curve(root / "other")[2][2] == pytest.approx(1e-3)


def test_fault_126_a_loss_that_is_not_finite(train: Train, root: Path) -> None:
    """One bad step is skipped and named; the fourth in a row stops the run with 75."""
    done = train("nan-once", failpoint="train.loss:3:nan")
    assert "step      3  loss or gradient is not finite: step skipped" in done[0].output
    losses = [row[0] for row in curve(root / "nan-once")]
    assert losses[2] is None
    assert None not in losses[3:]
    assert read_manifest(root / "nan-once" / "checkpoint-6").updates == 5
    done = train("nan", failpoint="train.loss:4+:nan", code=75)
    assert "not finite in 4 steps in a row; the last good step is 3" in done[0].output
    assert read_manifest(root / "nan" / "checkpoint-3").updates == 3


def test_fault_127_a_rank_is_killed(train: Train) -> None:
    """The other one stops with 75, in one line that says how to go on."""
    survivor, dead = train("killed", ranks=2, failpoint="train.loss:4:kill@1", code=None)
    assert (survivor.exit_code, dead.exit_code) == (75, -signal.SIGKILL)
    assert "another rank is gone; start all of them again with --resume" in survivor.output
    assert "Traceback" not in survivor.output


def test_fault_127_a_rank_hangs(train: Train) -> None:
    """The other one waits --timeout_s and no longer."""
    options: dict[str, Any] = {"ranks": 2, "code": None, "patience_s": 0.1}
    done = train("hung", "--timeout_s", "2", failpoint="train.loss:4:hang@1", **options)
    assert done[0].exit_code == 75
    assert "another rank does not answer (--timeout_s)" in done[0].output


def test_a_save_beside_an_evaluation_is_whole(train: Train, root: Path) -> None:
    """Held-out records are evaluated after the step of a save, on 2 ranks: what is resumed from it
    goes on as the uncut run does. Forward passes alone leave parameters gathered.
    """
    held_out = write_records(root / "beside.json", toy_records(5)[1:4])
    every = ("--eval_data_path", str(held_out), "--eval_strategy", "steps", "--eval_steps", "3")
    train("beside-1", *every)
    train("beside", *every, failpoint="train.step:5:kill", code=-signal.SIGKILL, ranks=2)
    train("beside", *every, "--resume", ranks=2)
    assert curve(root / "beside") == curve(root / "beside-1")


def test_fault_128_a_full_disk_in_a_save(train: Train, root: Path, whole: Any) -> None:
    """A save that fails leaves older checkpoints and the training alone; when the last save failed,
    the run ends with 74 and the model is there.
    """
    done = train("full-once", "--async_save", "True", failpoint="save.shards:1:enospc")
    assert "checkpoint-3: could not be written" in done[0].output
    assert "training goes on" in done[0].output
    assert curve(root / "full-once") == whole
    read_manifest(root / "full-once" / "checkpoint-6")

    done = train("full", file_limit=50_000, code=74)
    assert "File too large" in done[0].output
    assert curve(root / "full") == whole
    assert (root / "full" / "config.json").exists()


@pytest.mark.parametrize(("action", "code"), [("int", 130), ("term", 143)])
def test_a_signal_ends_the_step_saves_and_is_resumable(
    train: Train, root: Path, whole: Any, action: str, code: int
) -> None:
    """SIGINT and SIGTERM to one of two ranks: both stop after the same step, in a checkpoint."""
    options: dict[str, Any] = {"ranks": 2, "failpoint": f"train.loss:2:{action}@1"}
    done = train(action, "--save_strategy", "no", code=code, **options)
    assert "in checkpoint-3; go on with --resume" in done[0].output
    train(action, "--save_strategy", "no", "--resume", ranks=2)
    assert done[1].output == ""
    assert curve(root / action) == whole


def test_options_that_must_not_change_the_curve(train: Train, root: Path, whole: Any) -> None:
    """Recomputed activations and blocks kept gathered: bitwise. Padding instead of packing, and
    AdamW without the fused kernel: to rounding, which eight steps make larger.
    """
    same = ("--gradient_checkpointing", "True", "--fsdp", "shard_grad_op auto_wrap")
    train("recomputed", *same, ranks=2)
    assert curve(root / "recomputed") == whole
    other = ("--packing", "False", "--per_device_train_batch_size", "3", "--optim", "adamw_torch")
    train("padded", *other)
    padded = curve(root / "padded")
    assert padded[0][:2] == pytest.approx(whole[0][:2], rel=1e-6)
    for mine, theirs in zip(padded, whole, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


def test_alpacas_mean_of_means_can_be_had(train: Train, root: Path, whole: Any) -> None:
    """--loss_norm microbatch weighs every micro-batch alike, which is another loss."""
    train("means", "--loss_norm", "microbatch", "--max_steps", "1", "--save_strategy", "no")
    loss = curve(root / "means")[0][0]
    assert loss != whole[0][0]
    assert loss == pytest.approx(whole[0][0], rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_fault_129_every_architecture_shards_resumes_and_exports(
    train: Train, root: Path, model_folders: dict[str, Path], family: str
) -> None:
    """On 2 ranks, with dropout where the family has it: cut and resumed, the curve is the uncut
    one, and transformers computes from the exported folder the held-out loss that the run logged.
    """
    model = model_folders[family]
    held_out = write_records(root / "held_out.json", toy_records(5)[1:4])
    evaluation = ("--eval_data_path", str(held_out), "--eval_strategy", "epoch")
    train(f"{family}-1", *evaluation, model=model)
    uncut = curve(root / f"{family}-1")
    options: dict[str, Any] = {"ranks": 2, "model": model}
    train(family, *evaluation, failpoint="train.step:5:kill", code=-signal.SIGKILL, **options)
    train(family, *evaluation, "--resume", **options)
    assert curve(root / family) == uncut
    assert uncut[-1][0] < uncut[0][0]

    exported = AutoModelForCausalLM.from_pretrained(root / family, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(root / family)
    last = json.loads((root / family / "metrics.jsonl").read_text().splitlines()[-1])
    expected, targets = reference_loss(exported, tokenizer, json.loads(held_out.read_text()), 200)
    assert last["eval_targets"] == targets
    assert last["eval_loss"] == pytest.approx(expected, rel=1e-6)
    # Asked over a chat, the model gets the layout that it has learned.
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say it"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == f"<s>{alpaca_prompt('Say it')}"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's use of it
def test_lora_learns_adapters_alone_and_exports_them_folded_in(
    train: Train, root: Path, llama: Path
) -> None:
    """The checkpoint holds adapters only, resume is exact on other ranks, and the exported model
    computes what base and adapter compute together.
    """
    from peft import PeftModel

    lora = ("--lora_r", "2", "--lora_alpha", "4", "--lora_dropout", "0.1")
    train("lora-1", *lora)
    train("lora", *lora, failpoint="train.step:4:kill", code=-signal.SIGKILL, ranks=2)
    train("lora", *lora, "--resume")
    assert curve(root / "lora") == curve(root / "lora-1")
    weights = sum(f.stat().st_size for f in (root / "lora" / "checkpoint-6").glob("*.safetensors"))
    assert weights < (llama / "model.safetensors").stat().st_size

    ids = torch.tensor([[1, 50, 60, 70]])
    folded = AutoModelForCausalLM.from_pretrained(root / "lora", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    before = base(ids).logits
    apart = PeftModel.from_pretrained(base, root / "lora" / "adapter")(ids).logits
    torch.testing.assert_close(folded(ids).logits, apart, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, apart, atol=1e-4)


def test_alpacas_readme_command_runs_unchanged(
    train: Train, root: Path, model_folders: dict[str, Path]
) -> None:
    """Every flag of the command in Stanford Alpaca's README, old spellings and all, on 2 ranks."""
    arguments = [
        *("--model_name_or_path", str(model_folders["opt"])),
        *("--data_path", str(write_records(root / "alpaca_data.json", toy_records(130)))),
        *("--bf16", "True", "--output_dir", str(root / "readme"), "--num_train_epochs", "3"),
        *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4"),
        *("--gradient_accumulation_steps", "8", "--evaluation_strategy", "no"),
        *("--save_strategy", "steps", "--save_steps", "2000", "--save_total_limit", "1"),
        *("--learning_rate", "2e-5", "--weight_decay", "0.", "--warmup_ratio", "0.03"),
        *("--lr_scheduler_type", "cosine", "--logging_steps", "1"),
        *("--fsdp", "full_shard auto_wrap"),
        *("--fsdp_transformer_layer_cls_to_wrap", "OPTDecoderLayer", "--tf32", "True"),
        # Not Alpaca's: keeps the test's cache out of the home folder.
        *("--dataset_cache_dir", str(root / "cache"), "--model_max_length", "200"),
    ]
    done = finish(start(arguments, root / "readme.logs", ranks=2))
    assert [rank.exit_code for rank in done] == [0, 0], done[0].output
    assert "(4 a device x 8 accumulated x 2 cpu), 3.00 epochs" in done[0].output
    assert len(curve(root / "readme")) == 9
