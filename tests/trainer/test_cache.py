"""The cache of tokenised datasets: hit by content, rebuilt when damaged, never half there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.conftest import toy_records
from trainer.cache import tokenised_dataset
from trainer.config import DataSettings
from trainer.errors import DataError, DiskError
from trainer.records import Instruction
from trainer.tokens import Tokenised, tokenise


def settings(**more: Any) -> DataSettings:
    return DataSettings(data_path=Path("unused"), **({"model_max_length": 200} | more))


def test_a_dataset_of_which_nothing_is_left(tokenizer: Any, tmp_path: Path) -> None:
    """65, with what to do."""
    small = settings(model_max_length=4, dataset_cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"all 1 records were dropped \(too_long\); raise --model"):
        tokenised_dataset([Instruction("#0", "a", "", "b")], tokenizer, small)


def test_the_cache_is_hit_by_content_and_rebuilt_when_damaged(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second start tokenises nothing; another record, setting or a flipped bit does."""
    examples = [Instruction(f"#{i}", **row) for i, row in enumerate(toy_records(6))]
    cached = settings(dataset_cache_dir=tmp_path)
    first = tokenised_dataset(examples, tokenizer, cached)
    calls: list[int] = []

    def counting(*args: Any) -> Any:
        calls.append(1)
        return tokenise(*args)

    monkeypatch.setattr("trainer.cache.tokenise", counting)
    again = tokenised_dataset(examples, tokenizer, cached)
    assert (again.key, calls) == (first.key, [])
    for i in range(6):
        assert np.array_equal(first[i].ids, again[i].ids)
    assert tokenised_dataset(examples[:5], tokenizer, cached).key != first.key
    assert tokenised_dataset(examples, tokenizer, settings(
        dataset_cache_dir=tmp_path, boundary="prefix")).key != first.key  # fmt: skip
    assert len(calls) == 2
    file = tmp_path / first.key / "ids.bin"
    body = bytearray(file.read_bytes())
    body[-1] ^= 1
    file.write_bytes(body)
    repaired = tokenised_dataset(examples, tokenizer, cached)
    assert len(calls) == 3
    (expected,) = tokenise([examples[5]], tokenizer, cached)
    assert isinstance(expected, Tokenised)
    assert np.array_equal(repaired[5].ids, expected.ids)


def test_a_cache_that_cannot_be_written(tokenizer: Any, tmp_path: Path) -> None:
    """74, naming the flag."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="set --dataset_cache_dir"):
        tokenised_dataset([Instruction("#0", "a", "", "b")], tokenizer,
                          settings(dataset_cache_dir=tmp_path / "file"))  # fmt: skip
