"""The cache of tokenised datasets: hit by content, rebuilt when damaged, never half there."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.conftest import toy_records
from trainer.cache import MixedDataset, tokenised_dataset
from trainer.config import DataSettings
from trainer.errors import DataError, DiskError
from trainer.records import Instruction, Records, Rules
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


@pytest.mark.slow
def test_records_and_ids_are_never_in_memory_as_a_whole(tokenizer: Any, tmp_path: Path) -> None:
    """Four times as many records take the same memory: they pass through in batches."""
    cached = settings(dataset_cache_dir=tmp_path / "cache")
    peaks = []
    for count in (2048, 8192):
        path = tmp_path / f"{count}.jsonl"
        rows = (json.dumps({"text": " ".join(str(i * k) for k in range(20))}) for i in range(count))
        path.write_text("\n".join(rows))
        tracemalloc.start()
        try:
            assert len(tokenised_dataset(Records(path), tokenizer, cached)) == count
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_a_mixed_dataset_is_its_parts_one_after_the_other(tokenizer: Any, tmp_path: Path) -> None:
    cached = settings(dataset_cache_dir=tmp_path)
    examples = [Instruction(f"#{i}", **row) for i, row in enumerate(toy_records(9))]
    parts = [tokenised_dataset(some, tokenizer, cached) for some in (examples[:4], examples[4:])]
    mixed, whole = MixedDataset(parts), tokenised_dataset(examples, tokenizer, cached)
    assert len(mixed) == 9
    assert mixed.lengths.tolist() == whole.lengths.tolist()
    assert mixed.targets.tolist() == whole.targets.tolist()
    for i in range(9):
        assert mixed[i].ids.tolist() == whole[i].ids.tolist()
    assert mixed.key != MixedDataset(parts[::-1]).key


def test_bad_rows_of_which_nothing_is_left(tokenizer: Any, tmp_path: Path) -> None:
    """65, with what is wrong with the first."""
    path = tmp_path / "d.jsonl"
    path.write_text('{"instruction": "a"}\n')
    records = Records(path, Rules(on_bad_row="skip"))
    with pytest.raises(DataError, match=r"dropped \(bad_row\); the first: d\.jsonl:1: output is"):
        tokenised_dataset(records, tokenizer, settings(dataset_cache_dir=tmp_path))


def test_a_chat_that_is_split_is_still_no_instruction(tmp_path: Path) -> None:
    """Rows are counted apart from records: two rows of one chat leave no record in Alpaca's
    layout, whose template an export would take.
    """
    from tests.trainer.test_templates import CHATS, TEMPLATES, with_special_tokens

    qwen = with_special_tokens((TEMPLATES / "qwen3.jinja").read_text())
    cached = settings(dataset_cache_dir=tmp_path)
    dataset = tokenised_dataset([CHATS["system"]], qwen, cached)
    assert (len(dataset), dataset.chats, dataset.instructions) == (2, 1, 0)
    assert "split, one training row for each answer" in " ".join(dataset.notes)
