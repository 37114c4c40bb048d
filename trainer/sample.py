"""Ask a fine-tuned model a few questions: greedily, and sampled.

    python -m trainer.sample --model out [--prompt "Name three rivers."] [--temperature 0.7]

The questions are laid out by the folder's chat template, which the trainer sets to the layout that
was trained on; a folder without one gets Alpaca's.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from trainer.errors import ConfigError, TrainerError
from trainer.fetched import located
from trainer.template import alpaca_prompt

__all__ = ["answer", "main", "parser"]

QUESTIONS = (
    "Name three rivers.",
    "Give one reason to walk to work.",
    "Write a sentence about the sea.",
)
"""Asked where no ``--prompt`` is given; any model that follows instructions answers them."""


def answer(
    model: Any,
    tokenizer: Any,
    question: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: Any = None,
) -> str:
    """The model's answer to ``question``; greedy at temperature 0.

    Args:
        streamer: one of transformers' streamers, which gets the tokens as they come.
    """
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    else:
        inputs = tokenizer(alpaca_prompt(question), return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else greedy
    out = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        streamer=streamer,
        **how,
    )
    new = out[0, inputs["input_ids"].shape[1] :]
    text: str = tokenizer.decode(new, skip_special_tokens=True)
    return text.strip()


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    made = argparse.ArgumentParser(prog="trainer.sample", description="Ask a fine-tuned model.")
    made.add_argument("--model", required=True, help="the trainer's output_dir")
    made.add_argument("--prompt", action="append", help="a question; repeat for more")
    made.add_argument("--max_new_tokens", type=int, default=80)
    made.add_argument("--temperature", type=float, default=0.7, help="of the second answer")
    made.add_argument("--seed", type=int, default=0)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Print the answers, word by word as they come; the exit code."""
    arguments = parser().parse_args(argv)
    try:
        model, tokenizer = _load(arguments.model)
    except TrainerError as exc:
        sys.stderr.write(f"trainer.sample: {exc}\n")
        return exc.exit_code
    import torch
    from transformers import TextStreamer

    torch.manual_seed(arguments.seed)
    for question in arguments.prompt or QUESTIONS:
        sys.stdout.write(f"\n> {question}\n")
        for name, temperature in (("greedy", 0.0), ("sampled", arguments.temperature)):
            sys.stdout.write(f"[{name}] ")
            sys.stdout.flush()
            answer(
                model,
                tokenizer,
                question,
                max_new_tokens=arguments.max_new_tokens,
                temperature=temperature,
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
    return 0


def _load(name: str) -> tuple[Any, Any]:
    name = located(name)
    if not os.path.isfile(os.path.join(name, "config.json")):
        raise ConfigError(
            f"{name}: holds no finished model; check --model, or end its training: the same "
            "command with --resume goes on from its last checkpoint"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainer.opening import opened

    model = opened(AutoModelForCausalLM, name, "model", use_safetensors=True)
    tokenizer = opened(AutoTokenizer, name, "tokenizer")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), tokenizer


if __name__ == "__main__":
    sys.exit(main())
