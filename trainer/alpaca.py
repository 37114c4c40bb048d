"""Stanford Alpaca's public names, for scripts that bring their own ``transformers.Trainer``.

Same semantics: Alpaca's prompt, the response with its end-of-text token as target, everything else
labelled -100, records cut at ``tokenizer.model_max_length``. Three faults are not reproduced. A
record that would keep no target is dropped by name, where Alpaca's loss becomes NaN; the attention
mask follows the lengths and not ``input_ids != pad``, which hides end-of-text where it doubles as
padding; and embeddings only grow, where a padded vocabulary used to shrink.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from trainer.config import DataSettings
from trainer.errors import ConfigError
from trainer.loss import IGNORE_INDEX
from trainer.records import read_examples
from trainer.tokens import Dropped, Tokenised, tokenise

__all__ = [
    "DataCollatorForSupervisedDataset",
    "SupervisedDataset",
    "make_supervised_data_module",
    "smart_tokenizer_and_embedding_resize",
]


class SupervisedDataset(Dataset[dict[str, Tensor]]):
    """Records as ``{"input_ids", "labels"}``, two int64 tensors of one length.

    Args:
        data_path: any dataset that the trainer reads.
        tokenizer: of transformers.

    Raises:
        TrainerError: as ``python -m trainer`` does for the same file.
    """

    def __init__(self, data_path: str | Path, tokenizer: Any) -> None:
        settings = DataSettings(
            data_path=Path(data_path),
            template="alpaca",
            boundary="alpaca",
            too_long="truncate",
            model_max_length=int(tokenizer.model_max_length),
        )
        results = list(tokenise(read_examples(settings.paths), tokenizer, settings))
        self._records = [row for row in results if isinstance(row, Tokenised)]
        dropped = [row.name for row in results if isinstance(row, Dropped)]
        if dropped:
            warnings.warn(
                f"dropped, since no token of the response is left: {', '.join(dropped)}",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        record = self._records[index]
        ids = torch.from_numpy(record.ids).long()
        labels = ids.masked_fill(~torch.from_numpy(record.learned), IGNORE_INDEX)
        return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class DataCollatorForSupervisedDataset:
    """Pads records at the right: ids with the pad token, labels with -100."""

    tokenizer: Any

    def __call__(self, instances: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """(B, T) ``input_ids``, ``labels`` and ``attention_mask``."""
        pad = self.tokenizer.pad_token_id
        if pad is None:
            raise ConfigError(
                "the tokenizer has no pad token; call smart_tokenizer_and_embedding_resize first"
            )
        ids = [row["input_ids"] for row in instances]
        labels = [row["labels"] for row in instances]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }


def make_supervised_data_module(tokenizer: Any, data_args: Any) -> dict[str, Any]:
    """The keyword arguments of ``transformers.Trainer`` for ``data_args.data_path``."""
    return {
        "train_dataset": SupervisedDataset(data_args.data_path, tokenizer),
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }


@torch.no_grad()
def smart_tokenizer_and_embedding_resize(
    special_tokens_dict: Mapping[str, str], tokenizer: Any, model: Any
) -> None:
    """Add special tokens; their rows in the embeddings start at the mean of the rows before."""
    added = tokenizer.add_special_tokens(dict(special_tokens_dict))
    size = len(tokenizer)
    if size > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(size, mean_resizing=False)
    if added:
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            rows = layer.weight
            rows[size - added : size] = rows[: size - added].mean(dim=0)
