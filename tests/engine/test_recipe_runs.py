"""Whole runs of recipes that this package does not know: every row decided once, in plan order, the
same whatever the concurrency, a crash or a mended parser.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from engine.errors import ConfigError, InputError, StoppedError
from engine.run.display import SilentDisplay
from engine.run.generate import Result, generate
from engine.settings import RunConfig
from engine.store import RunStore
from engine.upkeep.merge import merge_runs
from engine.upkeep.redecide import redecide_run
from engine.upkeep.salvage import salvage_run
from engine.upkeep.verify import problems
from tests.engine.killed import run_with_kills
from tests.engine.own_recipe import COUNT, RECIPE, dump, input_rows, ran, recipe_file

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

ROOT = Path(__file__).parents[2]


async def test_every_row_is_decided_once_whatever_the_concurrency(tmp_path: Path) -> None:
    """N rows in, N decisions out, the same for 1 and 64 in flight."""
    recipe, rows = recipe_file(tmp_path), input_rows(tmp_path)
    one = await ran(tmp_path / "1", recipe=recipe, rows=rows, max_in_flight=1)
    many = await ran(tmp_path / "64", recipe=recipe, rows=rows, max_in_flight=64)
    assert one.stop.reached
    assert many.stop.reached
    assert dump(tmp_path / "1") == dump(tmp_path / "64")
    decided = dump(tmp_path / "64")
    assert [index for index, *_ in decided] == list(range(COUNT))
    reasons = {reason for _, _, reason, *_ in decided}
    assert {None, "odd"} <= reasons
    assert all(record["id"] == index for index, _, _, record, *_ in decided)


async def test_several_requests_for_each_row(tmp_path: Path) -> None:
    recipe, rows = recipe_file(tmp_path), input_rows(tmp_path, 20)
    result = await ran(tmp_path / "run", recipe=recipe, rows=rows, samples=3)
    assert result.stop.reached
    decided = dump(tmp_path / "run")
    assert [record["id"] for _, _, _, record, *_ in decided] == [n // 3 for n in range(60)]


async def test_a_target_stops_exactly_and_more_rows_are_not_there(tmp_path: Path) -> None:
    """Exactly N are accepted; where the rows do not suffice, that is said."""
    recipe, rows = recipe_file(tmp_path), input_rows(tmp_path)
    result = await ran(tmp_path / "few", recipe=recipe, rows=rows, target=10)
    assert result.stop.reached
    assert sum(reason is None for _, _, reason, *_ in dump(tmp_path / "few")) == 10
    result = await ran(tmp_path / "few", recipe=recipe, rows=rows, target=COUNT)
    assert isinstance(result.stop.error, StoppedError)
    assert "all input rows" in str(result.stop.error)
    assert len(dump(tmp_path / "few")) == COUNT


async def test_a_changed_row_is_refused_by_its_number(tmp_path: Path) -> None:
    recipe, rows = recipe_file(tmp_path), input_rows(tmp_path)
    await ran(tmp_path / "run", recipe=recipe, rows=rows, target=10)
    lines = rows.read_text().splitlines()
    lines[4] = json.dumps({"id": 4, "topic": "another"})
    rows.write_text("\n".join(lines) + "\n")
    with pytest.raises(
        ConfigError,
        match=r"row 4 \(the first is 0\), which the run has asked about, is another one now",
    ):
        await ran(tmp_path / "run", recipe=recipe, rows=rows, target=20)


async def test_a_row_that_is_gone_is_named(tmp_path: Path) -> None:
    recipe, rows = recipe_file(tmp_path), input_rows(tmp_path, 10)
    await ran(tmp_path / "run", recipe=recipe, rows=rows)
    rows.write_text("\n".join(rows.read_text().splitlines()[:7]) + "\n")
    with pytest.raises(
        ConfigError,
        match=r"row 7 \(the first is 0\), which the run has asked about, is not there any",
    ):
        await ran(tmp_path / "run", recipe=recipe, rows=rows)


async def test_another_number_of_samples_is_named_and_no_row_blamed(tmp_path: Path) -> None:
    recipe, rows = recipe_file(tmp_path), input_rows(tmp_path, 10)
    await ran(tmp_path / "run", recipe=recipe, rows=rows, samples=2)
    with pytest.raises(ConfigError, match="samples: was 2, now 3"):
        await ran(tmp_path / "run", recipe=recipe, rows=rows, samples=3)


async def test_a_mended_parser_decides_again_and_asks_nobody(tmp_path: Path) -> None:
    """Going on with another parser is refused; ``redecide`` takes it, and then the run goes on."""
    recipe, rows = recipe_file(tmp_path), input_rows(tmp_path)
    await ran(tmp_path / "run", recipe=recipe, rows=rows, target=30)
    before = dump(tmp_path / "run")
    mended = RECIPE.replace("MOST = 40", "MOST = 5").replace('"odd", "an odd', '"uneven", "an odd')
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    recipe_file(tmp_path, mended)
    sys.modules.pop(next(name for name in sys.modules if name.startswith("woolmill_recipe")), None)
    with pytest.raises(ConfigError, match=r"recipe_source: the recipe's parser.*woolmill redecide"):
        await ran(tmp_path / "run", recipe=recipe, rows=rows, target=40)
    with RunStore.read(tmp_path / "run") as run:
        sent = run.counts().sent
    done = await redecide_run(tmp_path / "run", None, {"target": 30, "recipe": recipe})
    assert done.accepted == 30
    with RunStore.read(tmp_path / "run") as run:
        assert run.counts().sent == sent
    after = dump(tmp_path / "run")
    assert after != before
    assert any(reason == "uneven" for _, _, reason, *_ in after)
    assert all(len(record["answer"].split()) <= 5 for _, _, _, record, *_ in after)
    await ran(tmp_path / "run", recipe=recipe, rows=rows)
    await ran(fresh / "run", recipe=recipe, rows=rows)
    assert dump(tmp_path / "run") == dump(fresh / "run")


async def test_a_run_is_merged_verified_and_salvaged(tmp_path: Path) -> None:
    recipe, rows = recipe_file(tmp_path), input_rows(tmp_path)
    await ran(tmp_path / "a", recipe=recipe, rows=rows)
    other = tmp_path / "other"
    other.mkdir()
    await ran(tmp_path / "b", recipe=recipe, rows=input_rows(other, 30), seed=4)
    merged = await merge_runs(
        [tmp_path / "a", tmp_path / "b"], tmp_path / "ab", None, {"recipe": recipe}
    )
    decided = dump(tmp_path / "ab")
    assert len(decided) == COUNT + 30
    assert merged == sum(reason is None for _, _, reason, *_ in decided)
    for folder in ("a", "b", "ab"):
        assert list(problems(tmp_path / folder)) == []
    salvaged = await anyio.to_thread.run_sync(salvage_run, tmp_path / "a", tmp_path / "saved")
    assert (salvaged.answers, salvaged.lost_answers) == (COUNT, 0)
    assert dump(tmp_path / "saved") == dump(tmp_path / "a")


async def test_a_run_s_accepted_rows_are_another_run_s_input(tmp_path: Path) -> None:
    recipe, rows = recipe_file(tmp_path), input_rows(tmp_path)
    await ran(tmp_path / "a", recipe=recipe, rows=rows)
    result = await ran(tmp_path / "b", recipe=recipe, rows=tmp_path / "a")
    assert result.stop.reached
    accepted = [record["id"] for _, _, reason, record, *_ in dump(tmp_path / "a") if reason is None]
    assert [record["id"] for _, _, _, record, *_ in dump(tmp_path / "b")] == accepted


@pytest.mark.timeout(180)
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    """kill -9 again and again, then to the end: the same decisions as undisturbed."""
    settings = {"recipe": recipe_file(tmp_path), "rows": str(input_rows(tmp_path, 3000)), "seed": 3}
    whole, killed = run_with_kills(tmp_path, settings, kills=20)
    assert dump(killed) == dump(whole)


async def test_an_input_without_rows_is_said(tmp_path: Path) -> None:
    """A header alone is easily the wrong file."""
    (tmp_path / "rows.csv").write_text("id,topic\n")
    with pytest.raises(InputError, match="holds no rows"):
        await ran(tmp_path / "run", recipe=recipe_file(tmp_path), rows=tmp_path / "rows.csv")


async def test_rows_that_cannot_be_read_are_left_out_where_asked(tmp_path: Path) -> None:
    """Each is named once, though the input is read anew, and the rows behind keep their numbers
    when the run goes on; without the setting the run stops there and says how to go on.
    """
    recipe, rows = recipe_file(tmp_path), input_rows(tmp_path, 30)
    good = rows.read_text().splitlines()
    rows.write_text("\n".join(["{broken", *good[:10], "[1]", *good[10:]]) + "\n")
    notes: list[str] = []

    class Noted(SilentDisplay):
        def note(self, message: str) -> None:
            notes.append(message)

    async def start(**more: Any) -> Result:
        settings = {"backend": "scripted", "semantic": False, "out": tmp_path / "run", "seed": 3}
        settings |= {"recipe": recipe, "rows": rows, **more}
        return await generate(RunConfig.model_validate(settings), Noted())

    with pytest.raises(InputError, match=r"rows.jsonl:1: .*; --on-bad-row skip leaves such rows"):
        await start()
    some = await start(on_bad_row="skip", target=5)
    assert some.stop.reached
    rest = await start(on_bad_row="skip")
    assert (rest.stop.reached, rest.bad_rows) == (True, 2)
    kept = map(json.loads, (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines())
    assert [(bad["line"], bad["text"]) for bad in kept] == [(1, "{broken"), (12, "[1]")]
    assert [record["id"] for _, _, _, record, *_ in dump(tmp_path / "run")] == list(range(30))
    named = [note for note in notes if note.startswith("left out: ")]
    assert sum("rows.jsonl:1:" in note for note in named) == 2  # once in each session
    assert sum("rows.jsonl:12:" in note for note in named) <= 2
    await ran(tmp_path / "whole", recipe=recipe, rows=input_rows(tmp_path, 30))
    assert dump(tmp_path / "whole") == dump(tmp_path / "run")
