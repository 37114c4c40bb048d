"""Architectures: what is trained is what the architecture computes, or it is refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.trainer.conftest import toy_records, write_records
from tests.trainer.launch import finish, start
from tests.trainer.reference import reference_loss
from trainer.attention import ALONE, IMPLEMENTATION
from trainer.config import ModelSettings
from trainer.errors import ConfigError, DataError
from trainer.model import TokenLoss, load_weights
from trainer.opening import architecture
from trainer.packing import collate
from trainer.proof import choose_way, set_way
from trainer.tokens import Tokenised

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "vocab_size": 401,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": (IMPLEMENTATION, {"sliding_window": 8}),
    "gpt_oss": (IMPLEMENTATION, {"num_local_experts": 4, "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt2": (IMPLEMENTATION, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "qwen3_moe": (IMPLEMENTATION, EXPERTS),
    "stablelm": (ALONE, {}),
    "qwen3_5_text": (ALONE, {"layer_types": ["linear_attention", "full_attention"], **LINEAR}),
    "lfm2": (ALONE, {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}),
    "mamba2": (ALONE, {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1,
               "chunk_size": 8}),
    "falcon_h1": (ALONE, {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
                  "mamba_d_state": 8, "mamba_n_groups": 1}),
    "llama4_text": ("sdpa", {"attention_chunk_size": 8, "intermediate_size_mlp": 48,
                    "num_local_experts": 4, "no_rope_layers": [1, 0],
                    "layer_types": ["chunked_attention", "full_attention"]}),
    "bloom": ("eager", {"n_layer": 2, "n_head": 4}),
    "falcon": ("eager", {"alibi": True}),
}  # fmt: skip


def model_of(family: str, attention: str = "eager") -> Any:
    """A tiny model of ``family``, the values of its vectors large enough to matter."""
    config = AutoConfig.for_model(family)
    with contextlib.suppress(Exception):
        config = type(config)(**SIZES | KINDS[family][1])
    for name, value in (SIZES | KINDS[family][1]).items():
        with contextlib.suppress(AttributeError, ValueError):
            setattr(config, name, value)
    torch.manual_seed(0)
    hf = architecture(config, dtype=torch.float32, attn_implementation=attention).eval()
    for name, parameter in hf.named_parameters():
        if parameter.ndim <= 1 or "sinks" in name:
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.5)
    return hf


def records(count: int = 4) -> list[Tokenised]:
    generator = np.random.Generator(np.random.PCG64(3))
    out = []
    for length in (11, 17, 9, 20)[:count]:
        ids = generator.integers(3, 401, length).astype(np.int32)
        out.append(Tokenised(ids, np.arange(length) > 2))
    return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", KINDS)
def test_the_loss_is_the_architectures_own(family: str) -> None:
    """Within 2e-7 of one record at a time through its own eager attention, packed or padded, for
    every kind of architecture; and records share a row where that is so, and only there.
    """
    reference = model_of(family)
    expected = 0.0
    with torch.no_grad():
        for record in records():
            ids = torch.from_numpy(record.ids).long()[None]
            logits = reference(input_ids=ids, use_cache=False).logits[0, 2:-1].double()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 3:], reduction="sum")
            expected += loss.item()
    model = TokenLoss(model_of(family))
    assert choose_way(model) == KINDS[family][0]
    assert model.packs == (KINDS[family][0] == IMPLEMENTATION)
    with torch.no_grad():
        for packing in (True, False):
            loss = model(collate(records(), packing=packing))
            assert loss.item() == pytest.approx(expected, rel=2e-7)


def test_sinks_are_learned() -> None:
    """gpt-oss's attention sinks get the gradient that its own attention gives them."""
    gradients = []
    for attention in ("eager", IMPLEMENTATION):
        hf = model_of("gpt_oss", attention)
        for record in records(2):
            batch = collate([record], packing=True)
            model = TokenLoss(hf)
            if attention == "eager":
                logits = hf(input_ids=batch.input_ids, use_cache=False).logits[0]
                logits = logits[batch.positions].double()
                loss = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum")
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                model(batch).backward()
        gradients.append(torch.cat([p.grad for n, p in hf.named_parameters() if "sinks" in n]))
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_a_window_that_short_records_do_not_fill_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An attention that ignores sliding windows is not taken, though no record of the trial is as
    long as the window; and the model's own window is put back.
    """
    from trainer import attention

    hf = model_of("mistral")
    hf.config.sliding_window = 128
    before = attention._one_segment

    def windowless(*arguments: Any) -> Any:
        changed = list(arguments)
        changed[5] = None
        return before(*changed)

    monkeypatch.setattr(attention, "_one_segment", windowless)
    assert choose_way(TokenLoss(hf)) == "sdpa"
    assert hf.config.sliding_window == 128


def test_apart_keeps_every_target_in_its_place() -> None:
    """A packed row taken apart is the padded batch of the same records."""
    apart, padded = collate(records(), packing=True).apart(), collate(records(), packing=False)
    for name in ("input_ids", "position_ids", "positions", "targets", "segments"):
        mine, theirs = getattr(apart, name), getattr(padded, name)
        assert (mine == theirs) if mine is None else torch.equal(mine, theirs)


def test_weights_that_are_not_there_are_not_drawn(llama: Path, tmp_path: Path) -> None:
    """transformers would initialise them at random, with a warning; here it is 65."""
    from safetensors.torch import load_file, save_file

    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"lack 1 tensor\(s\).*layers.1.mlp.up_proj.weight"):
        load_weights(ModelSettings(model_name_or_path=str(tmp_path)), seed=0)


def test_a_folder_with_code_of_its_own_is_refused_without_a_question(tmp_path: Path) -> None:
    """78 in one line, and nothing of it runs."""
    from trainer.model import load_config, load_tokenizer

    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoTokenizer": "evil.T"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", None]}})
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('this ran')")
    for load in (load_config, load_tokenizer):
        with pytest.raises(ConfigError, match="wants to run Python code of its own"):
            load(ModelSettings(model_name_or_path=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("family", ["qwen3_5_text", "bloom"])
def test_a_model_that_cannot_be_packed_trains_all_the_same(
    tmp_path: Path, tokenizer: Any, family: str
) -> None:
    """On 2 ranks, said in a line; the exported model computes the held-out loss that was logged."""
    model_of(family).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    held_out = toy_records(5)[1:4]
    arguments = [
        *("--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")),
        *("--data_path", str(write_records(tmp_path / "data.json", toy_records(12)))),
        *("--eval_data_path", str(write_records(tmp_path / "held_out.json", held_out))),
        *("--eval_strategy", "epoch", "--max_steps", "3", "--global_batch_size", "4"),
        *("--per_device_train_batch_size", "2", "--model_max_length", "200"),
        *("--learning_rate", "3e-3", "--dataset_cache_dir", str(tmp_path / "cache")),
        *("--export_dtype", "float32", "--save_strategy", "no"),
    ]
    done = finish(start(arguments, tmp_path / "logs", ranks=2))
    assert {rank.exit_code for rank in done} == {0}, [rank.output for rank in done]
    assert "one record a row, not packed: " in done[0].output
    exported = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(rows[-1])
    expected, targets = reference_loss(exported, tokenizer, held_out, 200)
    assert last["eval_targets"] == targets
    assert last["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_an_architecture_that_no_way_fits_is_refused() -> None:
    """Where no way computes what the model does alone, as with RecurrentGemma: 78."""
    hf = model_of("mistral")
    before = hf.model.forward

    def shifted(**arguments: Any) -> Any:
        out = before(**arguments)
        if "segments" in arguments or arguments["input_ids"].shape[0] > 1:
            out.last_hidden_state = out.last_hidden_state + 0.1
        return out

    hf.model.forward = shifted
    with pytest.raises(ConfigError, match="is not what the architecture computes"):
        choose_way(TokenLoss(hf))
    assert set_way(hf, "eager")
