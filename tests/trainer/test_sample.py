"""python -m trainer.sample: greedy is the argmax, a wrong folder is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from trainer.export import alpaca_chat_template
from trainer.sample import answer, main
from trainer.template import alpaca_prompt

pytestmark = pytest.mark.slow


def test_greedy_answers_are_the_most_likely_tokens(llama: Path, tokenizer: Any) -> None:
    """Token by token the argmax, asked with the folder's chat template or with Alpaca's prompt."""
    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    before = tokenizer.chat_template
    try:
        for template in (None, alpaca_chat_template(tokenizer)):
            tokenizer.chat_template = template
            text = answer(model, tokenizer, "Say it", max_new_tokens=5)
            ids = tokenizer(alpaca_prompt("Say it"))["input_ids"]
            for _ in range(5):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            assert text == tokenizer.decode(ids[-5:], skip_special_tokens=True).strip()
    finally:
        tokenizer.chat_template = before


def test_the_command(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both answers to each prompt; 78 where there is no model."""
    arguments = ["--model", str(llama), "--prompt", "one", "--prompt", "two"]
    assert main([*arguments, "--max_new_tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert [out.count(part) for part in ("> one", "> two", "[greedy]", "[sampled]")] == [1, 1, 2, 2]
    assert main(["--model", str(tmp_path)]) == 78
    assert capsys.readouterr().err == (
        f"trainer.sample: {tmp_path}: holds no finished model; check --model, or end its "
        "training: the same command with --resume goes on from its last checkpoint\n"
    )
