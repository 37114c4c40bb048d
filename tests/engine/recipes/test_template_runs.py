"""Whole runs of recipes in TOML files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.backends.scripted import ScriptedBackend
from engine.errors import ConfigError
from engine.recipes import guard
from engine.records import EVERY, Prompt
from engine.run import generate as generate_module
from engine.run.display import SilentDisplay
from engine.run.generate import Result, generate
from engine.settings import RunConfig
from engine.store import RunStore
from engine.upkeep.redecide import redecide_run
from tests.engine.recipes.test_template import JUDGED, stage

pytestmark = pytest.mark.slow

anyio_test = pytest.mark.anyio


def scripted(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    monkeypatch.setattr(generate_module, "make_backends", lambda config: [ScriptedBackend(answer)])


async def ran(folder: Path, spec: Path, **more: Any) -> Result:
    settings = {"backend": "scripted", "semantic": False, "out": folder, "recipe": str(spec)}
    return await generate(RunConfig.model_validate(settings | more), SilentDisplay())


def decided(folder: Path) -> list[Any]:
    with RunStore.read(folder) as run:
        return [(d.index, d.reason, d.record, d.detail) for d in run.decisions()]


def people(folder: Path, count: int = 40) -> None:
    lines = [f"{n},person {n} of the harbour" for n in range(count)]
    (folder / "people.csv").write_text("\n".join(["id,persona", *lines]) + "\n")


def asked(prompt: Prompt) -> str:
    """A question of its own for each person; some answers are damaged, some too low."""
    assert prompt.api == "chat"
    number = int(prompt.chat[-1].content.split("person ")[1].split()[0])
    if number % 10 == 3:
        return '{"question": "Why'
    if number % 10 == 4:
        return f'{{"question": "Where does number {number} moor?", "score": "high"}}'
    score = 2 if number % 10 == 5 else 4
    question = (
        "Why?" if number % 10 == 6 else f"Which rope does number {number} choose {prompt.index}?"
    )
    return f"```json\n{json.dumps({'question': question, 'score': score})}\n```"


REASONS = {3: "bad_format", 4: "invalid", 5: "not_kept", 6: "too_short"}


@anyio_test
@pytest.mark.parametrize("in_flight", [1, 64])
async def test_every_row_of_csv_has_its_decision(
    in_flight: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N rows in, N decisions out, each with its reason; the process that decides loads the file."""
    people(tmp_path)
    spec = tmp_path / "judged.toml"
    spec.write_text(JUDGED.replace('compare = "{{ question }}"', ""))
    scripted(monkeypatch, asked)
    result = await ran(tmp_path / "run", spec, max_in_flight=in_flight)
    assert result.stop.reached
    came = decided(tmp_path / "run")
    assert [index for index, *_ in came] == list(range(40))
    for index, reason, record, _ in came:
        assert reason == REASONS.get(index % 10)
        if reason is None:
            assert record["id"] == str(index)
            assert record["score"] == 4
            assert record["tone"] in ("plain", "formal", "terse")


@anyio_test
async def test_a_mended_recipe_decides_again_and_a_changed_prompt_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people(tmp_path)
    spec = tmp_path / "judged.toml"
    spec.write_text(JUDGED)
    scripted(monkeypatch, asked)
    await ran(tmp_path / "run", spec)
    spec.write_text(
        JUDGED.replace("score >= options.least", "score >= 1").replace(
            "words_below = 3", "words_below = 1"
        )
    )
    with pytest.raises(ConfigError, match=r"recipe_source"):
        await ran(tmp_path / "run", spec)
    scripted(monkeypatch, None)  # whoever asks, fails
    done = await redecide_run(tmp_path / "run", None, {"target": EVERY})
    assert done.answers == 40
    reasons = {index % 10: reason for index, reason, *_ in decided(tmp_path / "run")}
    assert reasons[5] is None
    assert reasons[6] == "duplicate_exact"
    await ran(tmp_path / "run", spec)
    spec.write_text(spec.read_text().replace("Write one question", "Write a question"))
    with pytest.raises(ConfigError, match=r"recipe_asks"):
        await ran(tmp_path / "run", spec)


@anyio_test
async def test_a_free_recipe_of_lists_stops_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = '[recipe]\nname = "lists"\ncompare = "{{ q }}"\n[stage]\nuser = "Five questions."\nanswer = { format = "list" }\ngive = { q = "{{ item }}" }\n'
    spec = tmp_path / "lists.toml"
    spec.write_text(text)
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()

    def lists(prompt: Prompt) -> str:
        return "Here:\n" + "\n".join(
            f"{n}. {words[n]} {prompt.index} {words[prompt.index % 10]}?" for n in range(5)
        )

    scripted(monkeypatch, lists)
    result = await ran(tmp_path / "run", spec, target=33)
    assert result.stop.reached
    assert result.progress.accepted == 33
    assert sum(reason is None for _, reason, *_ in decided(tmp_path / "run")) == 33


@anyio_test
async def test_a_name_that_no_row_has_is_said_at_the_start_and_one_row_s_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people(tmp_path)
    spec = tmp_path / "judged.toml"
    spec.write_text(JUDGED.replace("{{ persona }}", "{{ persn }}"))
    scripted(monkeypatch, asked)
    with pytest.raises(
        ConfigError,
        match=r"recipe judged makes no prompt: stage.user: there is no 'persn'; did you mean 'persona'",
    ):
        await ran(tmp_path / "none", spec)
    spec.write_text(JUDGED)
    rows = tmp_path / "rows.jsonl"
    each = [{"id": n, "persona": f"person {n} here"} if n != 2 else {"id": 2} for n in range(3)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in each))
    result = await ran(tmp_path / "one", spec, rows=rows)
    assert result.stop.reached
    assert [reason for _, reason, *_ in decided(tmp_path / "one")] == [None, None, "recipe_error"]


@anyio_test
async def test_a_regex_that_backtracks_for_ever_is_one_refusal_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the process that decides, which goes on."""
    monkeypatch.setattr(guard, "LIMIT_S", guard.LIMIT_S)  # the file changes it here too
    spec = tmp_path / "own.toml"
    spec.write_text(
        stage(
            'user = "{{ n }}"\nanswer = { format = "regex", pattern = "^(?P<x>(a+)+)$" }', rows=""
        )
    )
    code = tmp_path / "own.py"
    code.write_text(
        "from engine.recipes import guard\nfrom engine.recipes.template import load_template\n"
        f"guard.LIMIT_S = 0.3\nrecipe = load_template({str(spec)!r}, {{}})\n"
    )
    (tmp_path / "rows.csv").write_text("n\n0\n1\n2\n")
    scripted(monkeypatch, lambda prompt: "a" * 40 + ("b" if prompt.index == 1 else ""))
    result = await ran(tmp_path / "run", Path(f"{code}:recipe"), rows=tmp_path / "rows.csv")
    assert result.stop.reached
    assert [reason for _, reason, *_ in decided(tmp_path / "run")] == [None, "recipe_error", None]
