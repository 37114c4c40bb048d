"""The ledger: what is written is read again, and what is no ledger is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import ConfigError, InputError
from engine.loop.ledger import Ledger, Round, Start, is_loop

START = Start(settings={"model": "m", "generate": {"target": 5}}, shown=9, held_out=3, loss=2.0)
DONE = Round(
    number=1, started_from=0, accepted=5, trained=4, completion_tokens=1000, per_1000_tokens=5.0,
    refused={"cut_off": 3, "bad_format": 1}, distinct_verbs=4, nearest_rouge_l=0.25,
    nearest_cosine=None, loss_before=2.0, loss=1.5, own_loss=1.25, kept=True,
)  # fmt: skip


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert not is_loop(tmp_path)
    ledger = Ledger(tmp_path)
    ledger.begin(START)
    worse = replace(DONE, number=2, loss=1.75, kept=False, loss_before=1.5)
    ledger.add(DONE)
    ledger.add(worse)
    again = Ledger(tmp_path)
    assert is_loop(tmp_path)
    assert (again.start, again.rounds) == (START, [DONE, worse])
    assert again.kept == DONE
    assert again.loss == 1.5


def test_a_loss_that_rose_and_was_kept_sets_no_new_measure(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin(START)
    ledger.add(replace(DONE, loss=2.5))
    assert ledger.loss == 2.0
    assert ledger.kept is not None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is damaged"),
        ("{}\n", "is damaged"),
        ('{"format": 2}\n', "written by another version"),
        ('{"format":1,"settings":{},"shown":1,"held_out":1,"loss":2.0}\n{"number":1}\n', "damaged"),
        ('{"format":1,"settings":{},"shown":1,"held_out":1,"loss":2.0,"x":1}\n', "unknown field x"),
    ],
)
def test_a_damaged_one_is_an_error(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "ledger.jsonl").write_text(text)
    with pytest.raises(InputError, match=said):
        Ledger(tmp_path)


def test_a_round_that_is_missing_is_an_error(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin(START)
    ledger.add(replace(DONE, number=2))
    with pytest.raises(InputError, match="rounds are missing"):
        Ledger(tmp_path)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin(START)
    ledger.refuse_other(START.settings)
    with pytest.raises(ConfigError, match=r'began with model = "m", not "n"'):
        ledger.refuse_other(START.settings | {"model": "n"})
    with pytest.raises(ConfigError, match=r"began with \[generate\] target = 5, not 6"):
        ledger.refuse_other(START.settings | {"generate": {"target": 6}})
    with pytest.raises(ConfigError, match=r"with \[generate\] top_p = nothing, not 0\.5"):
        ledger.refuse_other(START.settings | {"generate": {"target": 5, "top_p": 0.5}})
