"""Answers in any order are taken in that of the plan."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson

from engine.backends.batch.lines import request_id
from engine.backends.batch.local import CarriedJobs
from engine.run.batches.collect import _Reading


def line(run: str, index: int) -> bytes:
    answer = {
        "custom_id": request_id(run, index, b"key!"),
        "response": {"status_code": 200, "body": index},
    }
    return orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE)


def test_answers_are_taken_in_the_order_of_the_plan(tmp_path: Path) -> None:
    """Input rows are read forwards: a row before the last ones is looked for from the start."""
    run = "0123456789abcdef"
    order = list(range(100))
    random.Random(4).shuffle(order)
    paths = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    paths[0].write_bytes(b"".join(line(run, index) for index in order[:60]))
    more = [line(run, 7), line("another run", 3), b"no JSON\n", line(run, 1000)]
    paths[1].write_bytes(b"\n".join([*more, *(line(run, index) for index in order[60:])]))
    desk: Any = SimpleNamespace(jobs=CarriedJobs(tmp_path), store=SimpleNamespace(run_id=run))
    lane: Any = SimpleNamespace(has_answer=lambda index: index == 50)
    row: Any = order
    reading = _Reading(desk, lane, row)
    found = reading._results(paths, reading._places(paths))
    assert [index for index, _ in found] == sorted([7, *range(50), *range(51, 100)])
