"""Alpaca's four public names, in transformers' own Trainer."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import trainer
from tests.trainer.conftest import toy_records, write_records
from tests.trainer.reference import reference_ids, reference_loss
from trainer import (
    DataCollatorForSupervisedDataset,
    SupervisedDataset,
    make_supervised_data_module,
    smart_tokenizer_and_embedding_resize,
)
from trainer.errors import ConfigError

pytestmark = pytest.mark.slow


@dataclass
class DataArguments:
    data_path: str


def test_items_are_the_references(tokenizer: Any, tmp_path: Path) -> None:
    """Ids and labels token for token, cut at model_max_length; a record without a target is dropped
    by name.
    """
    rows = toy_records(8)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 90
    rows[5] = {"instruction": "green " * 100, "input": "", "output": "never seen"}
    with pytest.warns(UserWarning, match=r"no token of the response is left: d\.json#5"):
        dataset = SupervisedDataset(write_records(tmp_path / "d.json", rows), tokenizer)
    del rows[5]
    assert len(dataset) == 7
    for item, row in zip((dataset[i] for i in range(7)), rows, strict=True):
        ids, prompt = reference_ids(tokenizer, row, "alpaca")
        assert item["input_ids"].tolist() == ids[:90]
        assert item["labels"].tolist() == ([-100] * prompt + ids[prompt:])[:90]


def test_the_collator_hides_padding_and_nothing_else(tokenizer: Any) -> None:
    """With pad == eos, the end-of-text token of a record stays visible."""
    tokenizer = copy.deepcopy(tokenizer)
    collate = DataCollatorForSupervisedDataset(tokenizer)
    rows = [torch.tensor([1, 9, 2]), torch.tensor([1, 2])]
    with pytest.raises(ConfigError, match="call smart_tokenizer_and_embedding_resize first"):
        collate([{"input_ids": row, "labels": row} for row in rows])
    tokenizer.pad_token = tokenizer.eos_token
    batch = collate([{"input_ids": row, "labels": row} for row in rows])
    assert batch["input_ids"].tolist() == [[1, 9, 2], [1, 2, 2]]
    assert batch["labels"].tolist() == [[1, 9, 2], [1, 2, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_embeddings_only_grow(llama: Path, tokenizer: Any) -> None:
    """A new pad token gets the mean of the old rows, in a spare row where the vocabulary was padded
    and in a new one otherwise.
    """
    for spare in (0, 7):
        words = copy.deepcopy(tokenizer)
        model: Any = AutoModelForCausalLM.from_pretrained(llama)
        size = len(words)
        model.resize_token_embeddings(size + spare, mean_resizing=False)
        old = model.get_input_embeddings().weight[:size].clone()
        smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, words, model)
        rows = model.get_input_embeddings().weight
        assert len(rows) == max(size + 1, size + spare)
        torch.testing.assert_close(rows[size], old.mean(dim=0))
        assert torch.equal(rows[:size], old)


def test_alpacas_training_script_runs(llama: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The module goes into Trainer as it is, and the first loss is the reference's."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 200
    rows = toy_records(4)
    data = write_records(tmp_path / "d.json", rows)
    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model)
    expected, _ = reference_loss(model, tokenizer, rows, 200, "alpaca")
    module = make_supervised_data_module(tokenizer, DataArguments(str(data)))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_steps=1,
    )
    hf = Trainer(model=model, args=arguments, processing_class=tokenizer, **module)
    hf.train()
    assert hf.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)  # it rounds
    hf.save_state()
    hf.save_model(arguments.output_dir)


def test_the_public_names_are_complete() -> None:
    """Everything in ``__all__`` resolves, and nothing else does."""
    for name in trainer.__all__:
        assert getattr(trainer, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        trainer.nothing  # noqa: B018
