"""Mixture files: what an epoch holds, as a function of the seed and its number alone."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import DataSettings
from trainer.errors import ConfigError, DataError
from trainer.formats import Rules
from trainer.mixture import Source, records_an_epoch, sources
from trainer.packing import Batches, Part
from trainer.prepare import _parts

SETTINGS = DataSettings(data_path=(Path("unused"),), ignore_columns=("id2",))


def mixture(tmp_path: Path, text: str) -> tuple[Source, ...]:
    path = tmp_path / "mix.toml"
    path.write_text(text)
    return sources((path,), SETTINGS)


def plan(parts: list[Part], global_batch: int = 7) -> Batches:
    records = sum(part.records for part in parts)
    lengths = np.ones(records, np.int64)
    dataset: Any = SimpleNamespace(lengths=lengths, targets=lengths)
    return Batches(
        dataset,
        np.arange(records),
        global_batch=global_batch,
        rows=1,
        max_length=8,
        packing=True,
        seed=3,
        parts=tuple(parts),
    )


def test_what_a_source_says_for_itself(tmp_path: Path) -> None:
    """Paths from the file's folder, its own rules in place of the command's, and names for people;
    ids of the hub stay what they are.
    """
    (tmp_path / "sub").mkdir()
    first, second = mixture(
        tmp_path,
        """
        [[source]]
        path = ["sub/a.jsonl", "tatsu-lab/alpaca"]
        weight = 2
        repeat = 1.5
        template = "chat"
        column_mapping = { question = "instruction" }
        ignore_columns = ["score2"]
        on_bad_row = "skip"
        name = "talk"

        [[source]]
        path = "b.jsonl"
        weight = 1
        """,
    )
    assert first.paths == (tmp_path / "sub" / "a.jsonl", Path("tatsu-lab/alpaca"))
    assert first.rules == Rules({"question": "instruction"}, ("score2",), "skip")
    assert (first.name, first.weight, first.repeat) == ("talk", 2, 1.5)
    assert first.settings.template == "chat"
    assert second.paths == (tmp_path / "b.jsonl",)
    assert second.rules == Rules({}, ("id2",), "refuse")
    assert (second.name, second.settings.template) == ("b.jsonl", "auto")


def test_paths_alone_are_one_source() -> None:
    (source,) = sources((Path("a"), Path("b")), SETTINGS)
    assert (source.name, source.paths) == ("a, b", (Path("a"), Path("b")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[source]]\nweight = 1", "source 1: path: Field required"),
        ("[[source]]\npath = 'a'\nweight = 0", "source 1: weight: Input should be greater than 0"),
        ("[[source]]\npath = 'a'\nwieght = 1", "source 1: wieght: Extra inputs are not permitted"),
        ("[[source]]\npath = 'a'\nweight = 1\n[[source]]\npath = 'b'", "source 2 has no weight"),
        ("learning_rate = 1", "is no mixture file; it should hold [[source]] tables alone"),
        ("source = 3", "is no mixture file"),
        ("[[source", "mix.toml: Expected"),
    ],
)
def test_a_mixture_file_that_contradicts_itself(tmp_path: Path, text: str, message: str) -> None:
    """78, naming the source and its key."""
    with pytest.raises(ConfigError) as caught:
        mixture(tmp_path, text)
    assert message in str(caught.value)


def test_a_mixture_file_comes_alone_and_exists(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a mixture file names all sources; give it alone"):
        sources((Path("m.toml"), Path("a.jsonl")), SETTINGS)
    with pytest.raises(ConfigError, match="No such file or directory; check --data_path"):
        sources((tmp_path / "none.toml",), SETTINGS)


def test_how_many_records_an_epoch_takes_of_each_source() -> None:
    """By weights until the first source is used up; without weights, repeats times the records."""

    def taken(*parts: tuple[int, float | None, float]) -> list[int]:
        named = [Source("", (), SETTINGS, weight, repeat) for _, weight, repeat in parts]
        return records_an_epoch([count for count, _, _ in parts], named)

    assert taken((100, None, 1), (40, None, 2.5)) == [100, 100]
    assert taken((100, None, 0.25), (40, None, 1)) == [25, 40]
    assert taken((100, 3, 1), (1000, 1, 1)) == [100, 33]
    assert taken((100, 3, 2), (1000, 1, 1)) == [200, 67]
    assert taken((1000, 1, 1), (10, 1e-6, 1)) == [1000, 1]


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 70)), min_size=1, max_size=4),
    st.integers(0, 5),
)
def test_every_epoch_has_its_shares_and_no_record_is_favoured(
    sizes: list[tuple[int, int]], epochs: int
) -> None:
    """Each source gives its number to every epoch; over all epochs so far its records have been
    seen equally often, but for one.
    """
    parts = [Part(*size) for size in sizes]
    batches = plan(parts)
    edges = np.cumsum([0, *(part.records for part in parts)])
    seen: Counter[int] = Counter()
    for epoch in range(epochs + 1):
        first = epoch * batches.steps_per_epoch
        steps = [batches.records(first + step) for step in range(batches.steps_per_epoch)]
        every = [record for step in steps for record in step]
        seen.update(every)
        for part, (low, high) in zip(parts, itertools.pairwise(edges), strict=True):
            assert sum(low <= record < high for record in every) == part.an_epoch
    for low, high in itertools.pairwise(edges):
        counts = [seen[record] for record in range(low, high)]
        assert max(counts) - min(counts) <= 1


def test_a_step_is_a_function_of_the_seed_and_its_number() -> None:
    """Asked in any order, by another plan of the same numbers, a step has the same records."""
    parts = [Part(50, 20), Part(9, 30)]
    steps = [plan(parts).records(step) for step in range(40)]
    again = plan(parts)
    assert [again.records(step) for step in (39, 0, 17)] == [steps[39], steps[0], steps[17]]
    assert steps[0] != steps[8]  # the first of the next epoch


def test_held_out_records_are_no_part_of_a_mixture() -> None:
    """What is left of each source counts; a source of which nothing is left ends the run."""
    pair = [Source(name, (), SETTINGS, repeat=2) for name in ("a", "b")]
    data: Any = SimpleNamespace(sources=pair, dataset=SimpleNamespace(starts=[0, 4, 10]))
    assert _parts(data, np.array([0, 3, 4, 5, 9])) == (Part(2, 4), Part(3, 6))
    with pytest.raises(DataError, match="b: --eval_split_ratio leaves no record to train on"):
        _parts(data, np.array([0, 3]))
