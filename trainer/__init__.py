"""Fine-tuning with PyTorch FSDP2. The command is ``python -m trainer``; from Python, Alpaca's four
names for use with transformers' own Trainer. Importing this package alone loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.alpaca import (
        DataCollatorForSupervisedDataset,
        SupervisedDataset,
        make_supervised_data_module,
        smart_tokenizer_and_embedding_resize,
    )

__all__ = [
    "DataCollatorForSupervisedDataset",
    "SupervisedDataset",
    "make_supervised_data_module",
    "smart_tokenizer_and_embedding_resize",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trainer import alpaca

    return getattr(alpaca, name)
