"""How well a model predicts records that it did not learn from.

    python -m trainer.evaluate --model_name_or_path out --data_path held_out.jsonl \\
        --output_dir scores

Records are laid out as the same flags lay them out in training, so that a model before its training
and after it can be compared. Each path of ``--data_path`` is measured alone; ``loss.json`` in the
output folder has them all.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config import Settings
from trainer.train import carry_out

__all__ = ["RESULT", "main"]

RESULT = "loss.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the command line says; the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return carry_out(_evaluate, arguments)


def _evaluate(settings: Settings) -> None:
    # After parsing: a mistyped flag should not wait for torch.
    import numpy as np

    from trainer.evaluation import mean_loss
    from trainer.fsdp import make_mesh, replica_count
    from trainer.metrics import say
    from trainer.model import load_tokenizer
    from trainer.prepare import (
        compute_type,
        for_evaluation,
        laid_out,
        read_records,
        sharded_model,
    )
    from trainer.ranks import Ranks, noticing_lost_ranks

    ranks = Ranks.start(settings.parallel)
    with noticing_lost_ranks():
        out = settings.save.output_dir
        if ranks.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
        tokenizer = ranks.together(lambda: load_tokenizer(settings.model))
        sets = [
            (path, read_records(settings, (path,), tokenizer, ranks, f"dropped_{number}.jsonl"))
            for number, path in enumerate(settings.data.paths, start=1)
        ]
        compute = compute_type(settings, ranks.device)
        replicas = ranks.together(lambda: replica_count(settings.parallel, ranks))
        largest = max(data.dataset.largest_id for _, data in sets)
        mesh = make_mesh(replicas, ranks)
        model = sharded_model(settings, ranks, mesh, compute, largest)
        told: list[dict[str, Any]] = []
        for path, data in sets:
            every = np.arange(len(data.dataset))
            batches = laid_out(model, for_evaluation(settings, data.dataset, every, ranks), ranks)
            loss, targets = mean_loss(model, batches, ranks)
            told.append(
                {"data": str(path), "loss": loss, "records": len(every), "targets": targets}
            )
            if ranks.rank == 0:
                say(f"{path}: loss {loss:.4f} over {targets:,} tokens of {len(every):,} records")
        if ranks.rank == 0:
            _write(out / RESULT, told)
        ranks.stop()


def _write(path: Path, told: list[dict[str, Any]]) -> None:
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(told, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
