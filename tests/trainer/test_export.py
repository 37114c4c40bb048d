"""The export: opened again, it is the model that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.trainer.conftest import toy_records, write_records
from tests.trainer.launch import Finished, finish, start
from tests.trainer.test_proof import model_of
from trainer import export
from trainer.errors import DataError
from trainer.proof import export_difference, live_answer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def names_in(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    return names


def trained(root: Path, tokenizer: Any, family: str, *more: str, ranks: int = 1) -> list[Finished]:
    """Three steps from a tiny model of ``family`` in ``root/model``, exported to ``root/out``."""
    model_of(family).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    arguments = [
        *("--model_name_or_path", str(root / "model"), "--output_dir", str(root / "out")),
        *("--data_path", str(write_records(root / "data.json", toy_records(12)))),
        *("--dataset_cache_dir", str(root / "cache"), "--max_steps", "3"),
        *("--global_batch_size", "4", "--per_device_train_batch_size", "2"),
        *("--model_max_length", "200", "--learning_rate", "3e-3", "--save_strategy", "no", *more),
    ]
    return finish(start(arguments, root / "logs", ranks=ranks))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt2", "gpt_oss"])
@pytest.mark.filterwarnings("ignore")
def test_a_merged_export_is_base_and_adapter_together(
    tmp_path: Path, tokenizer: Any, family: str, ranks: int
) -> None:
    """Adapters on stacks of experts and on transposed layers: the export has the source's tensor
    names, and computes what peft computes from base and adapter.
    """
    from peft import PeftModel

    lora = ("--lora_r", "2", "--lora_alpha", "8", "--export_dtype", "float32")
    done = trained(tmp_path, tokenizer, family, *lora, ranks=ranks)
    assert {rank.exit_code for rank in done} == {0}, [rank.output for rank in done]
    assert names_in(tmp_path / "out") == names_in(tmp_path / "model")
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    load = AutoModelForCausalLM.from_pretrained
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    folded = load(tmp_path / "out", **options)(ids).logits
    base = load(tmp_path / "model", **options)
    before = base(ids).logits
    apart = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")(ids).logits
    torch.testing.assert_close(folded, apart, atol=1e-5, rtol=1e-5)
    assert (before - apart).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mamba2", "gpt2"])
def test_a_full_export_has_the_sources_names(tmp_path: Path, tokenizer: Any, family: str) -> None:
    done = trained(tmp_path, tokenizer, family, ranks=2)
    assert {rank.exit_code for rank in done} == {0}, [rank.output for rank in done]
    assert names_in(tmp_path / "out") == names_in(tmp_path / "model")


def test_a_server_stops_where_answers_were_learned_to_end(tmp_path: Path, tokenizer: Any) -> None:
    """Trained on chats, generation stops at the chat's end of turn too; on Alpaca's layout, at the
    end of the text alone.
    """
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for name, rows in (("chat", [{"messages": turns}] * 4), ("alpaca", toy_records(4))):
        root = tmp_path / name
        root.mkdir()
        more = ("--data_path", str(write_records(root / "own.json", rows)))
        (done,) = trained(root, tokenizer, "mistral", *more)
        assert done.exit_code == 0, done.output
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for name, ends in (("chat", [2, end_of_turn]), ("alpaca", 2)):
        body = json.loads((tmp_path / name / "out" / "generation_config.json").read_text())
        assert body["eos_token_id"] == ends


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("lost", r"it has lost 1 tensor\(s\): model.norm.weight"),
        ("renamed", r"it has lost 1 tensor\(s\): model.norm.weight"),
        ("changed", "log-probabilities differ by .* of their spread"),
    ],
)
def test_an_export_that_is_not_the_live_model_is_not_finished(
    tmp_path: Path, llama: Path, damage: str, message: str
) -> None:
    """A tensor lost, under another name or of other numbers: 65, and what there is is kept."""
    from trainer.model import TokenLoss

    hf = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    live = live_answer(TokenLoss(hf), torch.device("cpu"))
    weights = hf.state_dict()
    weights.pop("lm_head.weight", None)
    if damage == "changed":
        weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
        weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(24, 16)
    else:
        norm = weights.pop("model.norm.weight")
        if damage == "renamed":
            weights["model.norm.base_layer.weight"] = norm
    hf.save_pretrained(tmp_path / ".export", state_dict=weights)
    with pytest.raises(DataError, match=message):
        export._prove(tmp_path / ".export", live, torch.float32, 1e-3)
    assert (tmp_path / "unproved" / "config.json").exists()
    assert not (tmp_path / ".export").exists()


def test_rounding_an_export_is_no_difference(tmp_path: Path, llama: Path) -> None:
    """The same in bfloat16 passes, and one that was changed does not."""
    from trainer.model import TokenLoss

    hf: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    live = live_answer(TokenLoss(hf), torch.device("cpu"))
    hf.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    export._prove(tmp_path / "half", live, torch.bfloat16, export._ROUNDED)


def test_one_position_that_rounding_throws_off_condemns_no_export(llama: Path) -> None:
    """As an extreme activation does in sound models; a change of all positions still does."""
    from trainer.model import TokenLoss

    hf: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    live = live_answer(TokenLoss(hf), torch.device("cpu"))
    other = live.clone()
    other[1] = other[1].flip(0)
    assert export_difference(hf, other) < 1e-5
    assert export_difference(hf, live.flip(1)) > 0.5
