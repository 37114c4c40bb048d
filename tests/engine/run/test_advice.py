"""Commands that are told are followed to the letter, and work."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from engine.cli.main import cli
from engine.errors import ConfigError, InputError
from engine.run.advice import REDECIDES, as_flags
from engine.store import RunReader
from engine.upkeep.redecide import redecide

pytestmark = pytest.mark.slow

RECIPE = """
[recipe]
name = "ask"
compare = "{{ asked }}"
[rows]
[[stage]]
name = "ask"
user = "Ask something about {{ question }}"
give = { asked = "{{ text }}" }
refuse = [{ field = "asked", words_below = 2 }]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"id": place, "question": f"topic {place}"} for place in range(6)]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    Path("ask.toml").write_text(RECIPE)
    Path("mended.toml").write_text(RECIPE.replace("words_below = 2", "words_below = 3"))


def say(*words: str, status: int = 0) -> str:
    """What a command prints."""
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.output


def follow(told: str) -> str:
    """What the command does that a run decided again is said to go on with."""
    found = re.search(r"^go on with: woolmill (.*)$", told, re.M)
    assert found is not None, told
    return say(*shlex.split(found[1]))


def decided(folder: str = "run") -> dict[str, Any]:
    with RunReader(Path(folder)) as run:
        return dict(run.manifest.decision)


OWN = ("--recipe", "ask.toml", "--rows", "rows.jsonl", "--backend", "scripted", "--out", "run")


def test_it_knows_the_flags_of_redecide() -> None:
    others = {"folder", "stage", "dry_run", "drop_failed", "drop_refused", "drop_stale"}
    assert {param.name for param in redecide.params} - others == REDECIDES


def test_settings_read_as_flags() -> None:
    given = {"carry": ["id", "a b"], "semantic": False, "base_url": ["http://x/v1", "http://y/v1"]}
    given |= {
        "filters": {"min_length": 2},
        "recipe_options": {"tone": "dry"},
        "rouge_threshold": 0.5,
    }
    assert shlex.split(as_flags(given)) == [
        *("--carry", "id,a b", "--no-semantic", "--base-url", "http://x/v1"),
        *("--base-url", "http://y/v1", "--filters", '{"min_length":2}', "--set", "tone=dry"),
        *("--rouge-threshold", "0.5"),
    ]


@pytest.mark.parametrize(
    "other",
    [
        ("--carry", "id"),
        ("--rouge-threshold", "0.5", "--carry", "id"),
        ("--recipe", "mended.toml"),
        ("--language", "de"),
    ],
)
def test_a_run_refused_for_other_settings_goes_on_by_what_it_says(other: tuple[str, ...]) -> None:
    say("generate", *OWN, "--no-semantic")
    with pytest.raises(ConfigError, match=r"\(woolmill redecide run .*which asks") as refused:
        say("generate", *OWN, "--no-semantic", *other)
    found = re.search(r"\(woolmill ([^()]*), which asks nothing\)", str(refused.value))
    assert found is not None
    say(*shlex.split(found[1]))
    assert "decided all 6 input rows" in say("generate", *OWN, "--no-semantic", *other)


def test_what_only_a_new_run_can_have_is_not_promised() -> None:
    say("generate", *OWN, "--no-semantic")
    with pytest.raises(ConfigError, match="resume with those, or start a new run"):
        say("generate", *OWN, "--no-semantic", "--against", "rows.jsonl")


def test_a_run_decided_again_goes_on_with_all_that_generate_would_not_settle_by_itself() -> None:
    more = ("--no-semantic", "--samples", "2", "--temperature", "0.3", "--max-requests", "9")
    say("generate", *OWN, *more, "--carry", "id", status=75)
    told = say("redecide", "run", "--recipe", "mended.toml", "--rouge-threshold", "0.9")
    before = decided()
    assert " --recipe mended.toml --rows rows.jsonl --backend scripted --max-requests 9 " in told
    assert " --samples 2 --carry id --rouge-threshold 0.9 --no-semantic --out run\n" in told
    found = re.search(r"^go on with: woolmill (.*) --max-requests 9 (.*)$", told, re.M)
    assert found is not None
    assert "decided all 6 input rows" in say(*shlex.split(f"{found[1]} {found[2]}"))
    assert decided() == before


def test_the_seeds_and_the_target_of_a_run_are_its_own() -> None:
    own = ("--backend", "scripted", "--no-semantic", "--out", "run")
    seeds = [
        {
            "id": f"s{n}",
            "name": f"n{n}",
            "instruction": f"Name {n} things that are red in a garden.",
            "instances": [{"input": "", "output": "A rose."}],
            "is_classification": False,
        }
        for n in range(4)
    ]
    Path("seeds.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in seeds))
    say("generate", *own, "--seeds", "seeds.jsonl", "--target", "5", "--seed", "3")
    Path("seeds.jsonl").unlink()
    assert "accepted 7 of 7" in follow(
        say("redecide", "run", "--scope", "instruction+input", "--target", "7")
    )


def test_an_edited_dataset_is_not_in_the_way_once_it_is_moved() -> None:
    say("generate", *OWN, "--no-semantic")
    dataset = Path("run/dataset.jsonl")
    whole = dataset.read_bytes()
    dataset.write_bytes(whole + b"{}\n")
    told = say("generate", *OWN, "--no-semantic", status=73)
    assert "dataset.jsonl: was changed since this run exported it; move it away" in told
    assert "--overwrite" not in told
    dataset.rename("mine.jsonl")
    say("generate", *OWN, "--no-semantic")
    assert dataset.read_bytes() == whole


@pytest.mark.parametrize(
    ("more", "raise_"),
    [
        (("--max-requests", "3"), "go on with a higher --max-requests"),
        (("--target", "50"), "give more rows at the end of the input"),
        (("--max-tokens-total", "100"), "raise --max-tokens-total"),
    ],
)
def test_what_could_only_stop_again_is_not_told_as_the_way_on(
    more: tuple[str, ...], raise_: str
) -> None:
    told = say("generate", *OWN, "--no-semantic", *more, status=75)
    assert raise_ in told
    assert "resume with" not in told
    told = say("generate", *OWN, "--no-semantic", *more, "--log-format", "json", status=75)
    assert json.loads(told.splitlines()[-1])["resume"] is None


def test_where_no_run_is_none_is_salvaged() -> None:
    Path("nothing").mkdir()
    with pytest.raises(InputError, match=r"holds no run .*nothing to salvage") as refused:
        say("verify", "nothing")
    assert "with: woolmill salvage" not in str(refused.value)


def test_a_folder_of_any_name_stays_one_word() -> None:
    own = (*OWN[:-1], "it's my run")
    say("generate", *own, "--no-semantic")
    told = say("redecide", "it's my run", "--carry", "id")
    assert "decided all 6 input rows" in follow(told)
    export = told.partition("write the dataset with: woolmill ")[2]
    assert "6 records" in say(*shlex.split(export))


def test_a_row_that_is_another_one_now_is_asked_about_anew_only_where_it_failed() -> None:
    say("generate", *OWN, "--no-semantic")
    text = Path("rows.jsonl").read_text()
    Path("rows.jsonl").write_text(text.replace("topic 2", "topic two"))
    with pytest.raises(ConfigError, match=r"row 2 .*is another one now; resume") as refused:
        say("generate", *OWN, "--no-semantic")
    assert "--drop-failed" not in str(refused.value)
