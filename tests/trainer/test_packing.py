"""Packing and plans: every record once, no row too long, the same everywhere."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.conftest import toy_records
from trainer.cache import tokenised_dataset
from trainer.config import DataSettings
from trainer.packing import Batches, balance, collate, epoch_order, pack
from trainer.records import Instruction
from trainer.tokens import Tokenised


@given(st.lists(st.integers(1, 120), max_size=60), st.integers(1, 120))
def test_pack_keeps_every_length_within_the_capacity(lengths: list[int], capacity: int) -> None:
    """Each index once; a group over the capacity holds one record; and no two groups could be one,
    as best fit guarantees.
    """
    groups = pack(lengths, capacity)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    sums = sorted(sum(lengths[i] for i in group) for group in groups)
    for group in groups:
        assert len(group) == 1 or sum(lengths[i] for i in group) <= capacity
    if len(sums) > 1:
        assert sums[0] + sums[1] > capacity


@given(
    st.lists(st.integers(1, 120), min_size=1, max_size=60), st.integers(0, 200), st.integers(1, 9)
)
def test_balance_makes_a_multiple_of_rows_and_none_too_long(
    lengths: list[int], more: int, multiple: int
) -> None:
    """Each index once, every row within the capacity; as few rows as packing
    needs, up to a multiple of the processes, or as many as there are records.
    """
    capacity = max(lengths) + more
    rows = balance(lengths, capacity, multiple)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert max(sums) <= capacity
    least = len(pack(lengths, capacity))
    wanted = min(len(lengths), -(-least // multiple) * multiple)
    assert len(rows) <= wanted


def alpaca_like(records: int) -> Any:
    """Lengths as Alpaca's records have them: 130 tokens in the middle, some of several hundred."""
    chance = np.random.default_rng(1)
    lengths = np.clip(chance.lognormal(np.log(115), 0.5, records), 40, 512).astype(np.int64)
    return SimpleNamespace(lengths=lengths, targets=lengths)


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize(("rows", "accumulated"), [(8, 1), (4, 1), (4, 8), (8, 4), (1, 4)])
def test_all_processes_are_busy(rows: int, accumulated: int, processes: int) -> None:
    """At least 90 % of the processes' time is work, with default flags (8 x 1) and others, over an
    epoch of Alpaca-like records.
    """
    dataset = alpaca_like(1600)
    batches = Batches(
        dataset,
        np.arange(1600),
        global_batch=rows * accumulated * processes,
        rows=rows,
        max_length=512,
        packing=True,
        seed=1,
        processes=processes,
    )
    work = longest = 0.0
    for step in range(batches.steps_per_epoch):
        groups = batches.micro_batches(step)
        assert sorted(i for group in groups for i in group) == sorted(batches.records(step))
        tokens = [int(dataset.lengths[group].sum()) for group in groups]
        rounds = [max(tokens[i : i + processes]) for i in range(0, len(tokens), processes)]
        work += sum(tokens)
        longest += sum(rounds)
        assert max(tokens) <= batches.capacity
        assert batches.busy(groups, processes) == sum(tokens) / (sum(rounds) * processes)
    assert work / (longest * processes) >= 0.9


def test_rows_do_not_depend_on_the_processes_where_their_number_does_not() -> None:
    """Two rows a step are the same two for one process and for two, so that a step is bitwise the
    same on both.
    """
    dataset = alpaca_like(400)

    def plan(processes: int) -> Batches:
        return Batches(
            dataset,
            np.arange(400),
            global_batch=30,
            rows=4,
            max_length=512,
            packing=True,
            seed=1,
            processes=processes,
        )

    same = 0
    for step in range(plan(1).steps_per_epoch):
        if len(plan(1).micro_batches(step)) == 2:
            same += 1
            assert plan(1).micro_batches(step) == plan(2).micro_batches(step)
    assert same > 0


@given(st.integers(1, 50), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_visits_every_record_in_an_order_of_its_own(n: int, seed: int, epoch: int) -> None:
    """A permutation, and the same one whenever it is asked for."""
    order = epoch_order(n, seed, epoch)
    assert sorted(order) == list(range(n))
    assert (order == epoch_order(n, seed, epoch)).all()


def test_steps_cover_each_epoch_once(tokenizer: Any, tmp_path: Path) -> None:
    """10 records in steps of 4: the third step has two, and each epoch has all ten."""
    settings = DataSettings(data_path=Path("unused"), dataset_cache_dir=tmp_path)
    examples = [Instruction(f"#{i}", **row) for i, row in enumerate(toy_records(10))]
    dataset = tokenised_dataset(examples, tokenizer, settings)
    batches = Batches(
        dataset, np.arange(10), global_batch=4, rows=1, max_length=200, packing=True, seed=3
    )
    assert batches.steps_per_epoch == 3
    steps = [batches.records(step) for step in range(6)]
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = sum(steps[:3], []), sum(steps[3:], [])  # noqa: RUF017 - ten items
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    for step in range(6):
        assert sorted(sum(batches.micro_batches(step), [])) == sorted(steps[step])  # noqa: RUF017


def test_collate_restarts_positions_and_never_learns_across_records() -> None:
    """Packed: positions count from 0 in each record, a record's last state predicts nothing, and a
    record's first token is no target even where it is marked as learned.
    """
    learned = np.array([True, False, True])
    rows = [
        Tokenised(np.array([5, 6, 7], np.int32), learned),
        Tokenised(np.array([8, 9, 10], np.int32), learned),
    ]
    packed = collate(rows, packing=True)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 10]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert packed.segments == (3, 3)
    assert (packed.positions.tolist(), packed.targets.tolist()) == ([1, 4], [7, 10])
    shorter = [rows[0], Tokenised(rows[1].ids[:2], np.array([False, True]))]
    padded = collate(shorter, packing=False)
    assert padded.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert padded.segments is None
    assert (padded.positions.tolist(), padded.targets.tolist()) == ([1, 3], [7, 9])
    assert padded.targets.dtype == torch.int64
