"""Whole runs of the real command: data that people have, and runs that go on in other ways."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.trainer.conftest import CHAT_TEMPLATE, toy_records, write_records
from tests.trainer.launch import Finished, curve, finish, start
from trainer.checkpoint import checkpoint_steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

Train = Callable[..., list[Finished]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data-runs")


@pytest.fixture(scope="module")
def train(root: Path, llama: Path, records_file: Path) -> Train:
    """Run the command with ``--output_dir root/OUTPUT``: 6 steps of 4 records, a save every 2."""

    def run(
        output: str,
        *more: str,
        ranks: int = 1,
        code: int = 0,
        model: Path = llama,
        data: Path = records_file,
        **options: Any,
    ) -> list[Finished]:
        arguments = [
            *("--model_name_or_path", str(model), "--data_path", str(data)),
            *("--output_dir", str(root / output), "--dataset_cache_dir", str(root / "cache")),
            *("--max_steps", "6", "--global_batch_size", "4", "--save_steps", "2"),
            *("--per_device_train_batch_size", "2", "--model_max_length", "200"),
            *("--learning_rate", "3e-3", "--timeout_s", "20", "--async_save", "False", *more),
        ]
        done = finish(start(arguments, root / f"{output}.logs", ranks=ranks, **options))
        assert {rank.exit_code for rank in done} == {code}, [rank.output for rank in done]
        return done

    return run


@pytest.fixture(scope="module")
def whole(train: Train, root: Path) -> list[tuple[float, float, float]]:
    """The curve of a run that nothing cuts, all its checkpoints kept."""
    train("whole", "--save_total_limit", "9")
    return curve(root / "whole")


def rows(folder: Path, key: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if key in row]


def test_held_out_records_are_evaluated_unasked(train: Train, root: Path, tmp_path: Path) -> None:
    """--eval_data_path alone: after each epoch of ten steps, and at the end."""
    held_out = write_records(tmp_path / "held_out.json", toy_records(5)[1:4])
    train("evaluated", "--eval_data_path", str(held_out), "--max_steps", "11")
    assert [row["step"] for row in rows(root / "evaluated", "eval_loss")] == [10, 11]


def test_a_run_goes_on_from_the_checkpoint_that_is_named(
    train: Train, root: Path, whole: Any
) -> None:
    """In a new folder, or in its own, where newer checkpoints are set aside and stay."""
    source = root / "whole" / "checkpoint-2"
    done = train("branch", "--resume_from_checkpoint", str(source))
    assert "resumed from checkpoint-2" in done[0].output
    assert [row["loss"] for row in rows(root / "branch", "loss")] == [row[0] for row in whole[2:]]
    done = train("whole", "--resume_from_checkpoint", str(source), "--save_total_limit", "9")
    assert "checkpoint-6 is newer and was renamed to set-aside-6" in done[0].output
    assert sorted(path.name for path in (root / "whole").glob("set-aside-*")) == [
        "set-aside-4",
        "set-aside-6",
    ]
    assert checkpoint_steps(root / "whole") == [2, 4, 6]
    assert curve(root / "whole") == whole


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("nothing", "is no checkpoint of this trainer"),
        ("run", "did you mean"),
        ("foreign", "to begin from the weights of another trainer: --model_name_or_path"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    train: Train, root: Path, tmp_path: Path, found: str, message: str
) -> None:
    """78, with what to name instead."""
    if found == "run":
        (tmp_path / "checkpoint-4").mkdir()
    elif found == "foreign":
        (tmp_path / "trainer_state.json").write_text("{}")
    done = train(f"no-{found}", "--resume", str(tmp_path), code=78)
    assert message in done[0].output
    assert "Traceback" not in done[0].output


def test_a_finished_run_is_made_longer_where_its_schedule_allows(train: Train, root: Path) -> None:
    """A constant rate: bitwise the run that was longer from the start. A cosine is refused, since
    its first steps would have had other rates.
    """
    constant = ("--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "2")
    train("long", *constant, "--max_steps", "8")
    train("made-longer", *constant, "--max_steps", "4")
    train("made-longer", *constant, "--max_steps", "8", "--resume")
    assert curve(root / "made-longer") == curve(root / "long")
    done = train("short", "--max_steps", "4", "--resume")
    assert "short holds no checkpoint: training starts at step 1" in done[0].output
    done = train("short", "--max_steps", "8", "--resume", code=78)
    assert "total_steps 4 -> 8; the learning rates of steps that are done" in done[0].output
    assert "--lr_scheduler_type constant" in done[0].output


def test_other_adapters_are_refused_on_resume(train: Train) -> None:
    """78: the checkpoint's tensors belong to other layers."""
    lora = ("--lora_r", "2", "--max_steps", "2", "--lora_target_modules")
    done = train("lora", *lora, "q_proj,v_proj")
    assert "LlamaForCausalLM: 224 parameters learned" in done[0].output
    train("lora", *lora, "v_proj,q_proj", "--resume")
    done = train("lora", *lora, "q_proj,k_proj", "--resume", code=78)
    assert "lora_target_modules ['q_proj', 'v_proj'] -> ['k_proj', 'q_proj']" in done[0].output


def test_bad_rows_are_skipped_counted_and_named(train: Train, root: Path, tmp_path: Path) -> None:
    """With --on_bad_row skip; without, the first of them ends the run with 65."""
    data = tmp_path / "rows.jsonl"
    good = [json.dumps(row) for row in toy_records(30)]
    data.write_text("\n".join([*good, '{"instruction": "torn', '{"instruction": "a"}']))
    done = train("skips", "--on_bad_row", "skip", data=data)
    assert f"{data}: 2 bad_row dropped of 32: rows.jsonl:31, rows.jsonl:32" in done[0].output
    dropped = [
        json.loads(line) for line in (root / "skips" / "dropped.jsonl").read_text().splitlines()
    ]
    assert [row["name"] for row in dropped] == ["rows.jsonl:31", "rows.jsonl:32"]
    assert "output is missing" in dropped[1]["detail"]
    done = train("refuses", data=data, code=65)
    assert "rows.jsonl:31:" in done[0].output


def test_a_mixture_resumes_to_the_bit_on_another_number_of_processes(
    train: Train, root: Path, tmp_path: Path, model_folders: dict[str, Path]
) -> None:
    """Two sources with weights, layouts and column names of their own, a model with dropout; killed
    on two processes, gone on with one, and finished on two.
    """
    (tmp_path / "a.json").write_text(json.dumps(toy_records(20)))
    asked = [{"q": row["instruction"], "a": row["output"] or "x"} for row in toy_records(30)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, asked)))
    mixture = tmp_path / "mix.toml"
    mixture.write_text(
        """
        [[source]]
        path = "a.json"
        weight = 3
        [[source]]
        name = "questions"
        path = "b.jsonl"
        weight = 1
        template = "chat"
        column_mapping = { q = "question", a = "answer" }
        """
    )
    options: dict[str, Any] = {"model": model_folders["opt"], "data": mixture}
    done = train("mixed", ranks=2, **options)
    assert "a.json: 20 of 20 records an epoch, 74.1% of it" in done[0].output
    assert "questions: 7 of 30 records an epoch, 25.9% of it" in done[0].output
    assert "27 records: 6 steps of 4 records" in done[0].output
    assert "30 records are in the layout of the model's chat template and 20" in done[0].output
    killed = {"code": -signal.SIGKILL}
    train("mixed-cut", ranks=2, failpoint="train.step:3:kill", **killed, **options)
    train("mixed-cut", "--resume", failpoint="train.step:3:kill", **killed, **options)
    train("mixed-cut", "--resume", ranks=2, **options)
    assert curve(root / "mixed-cut") == curve(root / "mixed")


def test_plain_text_is_learned_and_leaves_the_chat_template_alone(
    train: Train, root: Path, tmp_path: Path
) -> None:
    """Every token but the first, and the end of text; the exported tokenizer asks as before."""
    data = tmp_path / "text.jsonl"
    data.write_text("\n".join(json.dumps({"text": row["instruction"]}) for row in toy_records(8)))
    train("text", "--max_steps", "1", data=data)
    (row,) = rows(root / "text", "loss")
    assert row["targets"] == row["tokens"] - 4
    assert AutoTokenizer.from_pretrained(root / "text").chat_template == CHAT_TEMPLATE


def test_a_run_from_a_configuration_file(
    root: Path, tmp_path: Path, llama: Path, records_file: Path
) -> None:
    """As YAML, with null, no and a list; the command line wins over it."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
        model_name_or_path: {llama}
        data_path: [{records_file}]
        dataset_cache_dir: {root}/cache
        max_length: 200
        learning_rate: 1e-3
        max_steps: 2
        eval_strategy: no
        bf16: null
        dataloader_num_workers: 4
        """
    )
    arguments = ["--config", str(config), "--output_dir", str(root / "yaml"), "--max_steps", "1"]
    (done,) = finish(start(arguments, root / "yaml.logs"))
    assert done.exit_code == 0, done.output
    assert "--dataloader_num_workers has no effect: rows are mapped from disk" in done.output
    assert len(curve(root / "yaml")) == 1


def test_a_missing_tracker_is_known_before_anything_is_loaded(train: Train, tmp_path: Path) -> None:
    """78, though there is no model to load."""
    done = train("tracked", "--report_to", "wandb", model=tmp_path / "none", code=78)
    assert "--report_to wandb: pip install wandb" in done[0].output
