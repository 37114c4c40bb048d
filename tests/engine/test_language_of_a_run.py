"""Runs in other languages than English: what ``--language`` and the seeds decide."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from engine.decide.decider import unreadable_note
from engine.errors import ConfigError
from engine.export.card import card
from engine.kept import recipe_of
from engine.recipes.seeds import bundled_seeds
from engine.report.analysis import analyse
from engine.report.figures import figures
from engine.report.markdown import markdown
from engine.run.generate import generate
from engine.settings import RunConfig, load_config
from engine.store import RunStore
from engine.upkeep.redecide import redecide_run
from engine.view.rows import Rows
from tests.engine.doubles import Notes
from tests.engine.sentences import CHANGED

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


async def run(folder: Path, **settings: Any) -> list[str]:
    """A scripted run; the notes that were shown."""
    given = {"backend": "scripted", "target": 40, "semantic": False, "out": folder}
    notes = Notes()
    result = await generate(RunConfig.model_validate(given | settings), notes)
    assert result.stop.reached, result.stop
    return notes.notes


def seeds_of(folder: Path, texts: Sequence[str]) -> Path:
    path = folder / "seeds.jsonl"
    rows = [{"instruction": text, "input": "", "output": "x"} for text in texts]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


def decision_of(folder: Path) -> dict[str, Any]:
    with RunStore.read(folder) as reader:
        return dict(reader.manifest.decision)


async def test_a_chinese_run_from_the_bundled_seeds(tmp_path: Path) -> None:
    """Chinese prompts, records, report and view; it goes on without being told its language."""
    notes = await run(tmp_path / "zh", language="zh")
    assert any(note.startswith("language zh (Chinese); filters: 4 to 300") for note in notes)
    assert not any("refuse" in note for note in notes)
    decision = decision_of(tmp_path / "zh")
    assert (decision["language"], decision["rouge_threshold"]) == ("zh", 0.75)
    assert "filters" not in decision
    with RunStore.read(tmp_path / "zh") as reader:
        rows = [d.record["instruction"] for d in reader.decisions(accepted=True) if d.record]
        analysis = analyse(reader)
        assert "language:\n  - zh\n" in card(reader, {"train": 40}, None)
        first = next(iter(reader.decisions(accepted=True)))
        with closing(Rows(tmp_path / "zh", recipe_of(reader))) as view:
            shown = view.row(first.index, first.position)
            word = dict(shown["fields"])["instruction"][1:4]
            found = [row["id"] for row in view.find(word)["rows"]]
    assert shown["id"] in found
    assert len(rows) == 40
    assert all("\u4e00" <= row[0] <= "\u9fff" for row in rows)
    assert shown["prompt"].endswith("###\n4. 指令：")
    assert analysis["unit"] == "characters"
    assert 15 < analysis["words"]["instruction"]["mean"] < 40
    assert all(len(opening) == 4 for opening, _ in analysis["openings"])
    assert "## Lengths, in characters" in markdown(analysis)
    await run(tmp_path / "zh", target=45)
    assert decision_of(tmp_path / "zh") == decision


async def test_seeds_tell_the_language(tmp_path: Path) -> None:
    notes = await run(tmp_path / "run", seeds=bundled_seeds("zh"))
    assert any(note.startswith("language zh") for note in notes)
    assert decision_of(tmp_path / "run")["language"] == "zh"


async def test_english_runs_remember_no_language(tmp_path: Path) -> None:
    """So that those from before there were others go on; and nothing is said."""
    for name, settings in (("auto", {}), ("en", {"language": "en"})):
        notes = await run(tmp_path / name, **settings)
        assert not any("language" in note for note in notes)
        decision = decision_of(tmp_path / name)
        assert decision.keys().isdisjoint({"language", "filters"})
        assert decision["rouge_threshold"] == 0.7
    with pytest.raises(ConfigError, match="language: was absent, now"):
        await run(tmp_path / "en", language="ru", seeds=bundled_seeds(), target=50)


async def test_a_threshold_that_is_set_stands(tmp_path: Path) -> None:
    await run(tmp_path, language="zh", rouge_threshold=0.7)
    assert decision_of(tmp_path)["rouge_threshold"] == 0.7


async def test_seeds_that_the_filters_refuse_are_said_before_anything_is_paid(
    tmp_path: Path,
) -> None:
    """More than a fifth of them; here Russian ones under Alpaca's filters."""
    seeds = seeds_of(tmp_path, [sentence for sentence, _, _ in CHANGED["ru"]])
    notes = await run(tmp_path / "run", seeds=seeds, language="en")
    (said,) = [note for note in notes if "filters refuse" in note]
    assert said == (
        "the filters refuse 10 of the 10 seed tasks themselves (not_ascii_start 10), and will "
        "refuse such records too; see --language and the table [filters]"
    )
    assert notes.index(said) < notes.index("starting scripted with scripted")
    assert not any("filters refuse" in n for n in await run(tmp_path / "ru", seeds=seeds))


async def test_filters_are_settings_that_decisions_follow_from(tmp_path: Path) -> None:
    """From the file, kept with the run, and named where they differ when it goes on."""
    file = tmp_path / "run.toml"
    file.write_text('language = "zh"\n[filters]\nmax_length = 20\nblocked_words = ["诗"]\n')
    config = load_config(file, {})
    filters = config.filters
    notes = await run(tmp_path / "run", language="zh", filters=filters.model_dump())
    assert any("4 to 20 characters, 1 blocked words" in note for note in notes)
    with RunStore.read(tmp_path / "run") as reader:
        rows = [d.record["instruction"] for d in reader.decisions(accepted=True) if d.record]
        reasons = reader.counts().reasons
    assert all(len(row) <= 20 and "诗" not in row for row in rows)
    assert reasons["too_long"] > 10
    decision = decision_of(tmp_path / "run")
    assert decision["filters"] == {"max_length": 20, "blocked_words": ["诗"]}
    with pytest.raises(ConfigError, match="filters"):
        await run(tmp_path / "run", language="zh", target=50)


async def test_a_run_is_decided_again_in_its_language_or_another(tmp_path: Path) -> None:
    await run(tmp_path, language="zh")
    again = await redecide_run(tmp_path, None, {})
    assert again.accepted == again.accepted_before == 40
    other = await redecide_run(tmp_path, None, {"language": "en"})
    assert other.accepted == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('language = "klingon"\n', "language: 'klingon' is no language known here"),
        ("[filters]\nmin_lenght = 3\n", "did you mean 'min_length'"),
        ('[filters]\nfirst_character = "big"\n', "filters.first_character"),
        ("[filters]\nblocked_words = ['']\n", "filters.blocked_words"),
    ],
)
def test_a_bad_setting_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_language_without_bundled_seeds_needs_some(tmp_path: Path) -> None:
    import anyio

    with pytest.raises(ConfigError, match="no seed tasks in Japanese"):
        anyio.run(run_in, tmp_path)


async def run_in(folder: Path) -> None:
    await run(folder, language="ja")


async def test_rows_that_no_model_reads_are_counted(tmp_path: Path) -> None:
    """They are accepted without a look at their meaning; figures, report and view have them."""
    await run(tmp_path, language="zh")
    with RunStore.read(tmp_path) as reader:
        manifest = reader.manifest
        assert figures(reader)["not_compared_by_meaning"] == 0
    assert manifest.decision["semantic"] is False
    await redecide_run(tmp_path, None, {"semantic": True})
    with RunStore.read(tmp_path) as reader:
        assert figures(reader)["not_compared_by_meaning"] == 40
        assert "40 records that the embedding model cannot read" in card(reader, {}, None)
        assert "not\\_compared\\_by\\_meaning | 40" in markdown(analyse(reader))
    with closing(Rows(tmp_path, None)) as view:
        assert view.state()["not_compared_by_meaning"] == 40
    assert "cannot read 3 of the 200 texts" in unreadable_note(3, 200)
