"""The reference semantics, written for the tests alone: one record at a time, full logits, nothing
of the trainer.
"""

from __future__ import annotations

from typing import Any

import torch

HEAD = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{}\n\n{}### Response:"
)


def reference_prompt(row: dict[str, str]) -> str:
    if not row["input"]:
        return HEAD.format("", row["instruction"], "")
    context = ", paired with an input that provides further context"
    return HEAD.format(context, row["instruction"], f"### Input:\n{row['input']}\n\n")


def reference_ids(tokenizer: Any, row: dict[str, str], boundary: str) -> tuple[list[int], int]:
    """(ids, how many of them are prompt) as Alpaca has them, or with the two parts apart."""
    prompt = tokenizer(reference_prompt(row))["input_ids"]
    if boundary == "alpaca":
        ids = tokenizer(reference_prompt(row) + row["output"] + tokenizer.eos_token)["input_ids"]
        return ids, len(prompt)
    answer = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


@torch.no_grad()
def reference_loss(
    model: Any, tokenizer: Any, rows: list[dict[str, str]], limit: int, boundary: str = "split"
) -> tuple[float, int]:
    """(mean loss over all target tokens of ``rows``, how many there are), in float64."""
    model = model.eval()
    total, count = 0.0, 0
    for row in rows:
        ids, prompt = reference_ids(tokenizer, row, boundary)
        ids = ids[:limit]
        logits = model(torch.tensor([ids])).logits[0].double()
        for position in range(prompt, len(ids)):
            total -= torch.log_softmax(logits[position - 1], dim=0)[ids[position]].item()
            count += 1
    return total / count, count
