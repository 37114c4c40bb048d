"""``woolmill recipe`` and ``woolmill preview``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.backends.scripted import ScriptedBackend
from engine.cli.main import main
from engine.run import generate as generate_module
from engine.run.preview import preview
from engine.settings import RunConfig

pytestmark = pytest.mark.slow

RECIPE = """
[recipe]
name = "questions"

[options]
kind = "short"

[rows]

[stage]
system = "Ask a {{ options.kind }} question."
user = "About {{ topic }}."
answer = { format = "json", schema = { type = "object", properties = { q = { type = "string" } }, required = ["q"] } }
give = { topic = "{{ topic }}", question = "{{ q }}" }
refuse = [ { field = "question", words_below = 3 } ]
"""


def woolmill(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command line."""
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in argv])
    said = capsys.readouterr()
    return int(caught.value.code or 0), said.out, said.err


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    recipe, rows = tmp_path / "own.toml", tmp_path / "rows.jsonl"
    recipe.write_text(RECIPE)
    rows.write_text("".join(json.dumps({"topic": f"topic {n}"}) + "\n" for n in range(5)))
    return recipe, rows


def python_recipe(folder: Path, parse: str) -> str:
    path = folder / "own.py"
    path.write_text(
        "from engine.recipes.base import Part, Recipe\nfrom engine.recipes import guard\n"
        "guard.LIMIT_S = 0.5\n\n"
        'class Own(Recipe):\n    """What it is for."""\n    fields = (\'a\',)\n\n'
        "    def prompt(self, ask):\n        return [Part(f'Question {ask.index}')]\n\n"
        f"    def parse(self, ask, answer):\n        {parse}\n"
    )
    return f"{path}:Own"


def test_a_sound_recipe_passes_the_check(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = woolmill(capsys, "recipe", "check", files[0], "--rows", files[1])
    assert status == 0, err
    assert out.startswith("5 prompts; 1,000 damaged answers: rows ")
    assert "bad_format" in out
    assert "cut_off" in out
    assert "thoughts_only" in out
    assert out.endswith("sound: the same in two processes, and no answer makes it fail\n")


FAULTY = {
    "return [{'a': answer.text.split()[0]}]": "fault: parse: IndexError: list index out of range (own.py:13), of an empty answer",
    "return [{'a': ' '.join({*answer.text})}]": "two processes came to different results",
    "return [{'b': 1}]": "the recipe's fields are a",
    "import time; time.sleep(60)": "fault: parse: it took more than 0.5 s",
}


def test_where_nobody_is_asked_no_model_need_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stage asks a model that only the settings of a run know; ``generate`` needs them."""
    recipe, rows = tmp_path / "judged.toml", tmp_path / "rows.jsonl"
    rows.write_text('{"topic": "rain"}\n')
    judge = '[[stage]]\nname = "judge"\nmodel = "judge"\nuser = "Is this good? {{ text }}"\n'
    judge += 'give = { verdict = "{{ text }}" }\n'
    first = '[[stage]]\nname = "ask"\nuser = "About {{ topic }}."\ngive = { text = "{{ text }}" }\n'
    recipe.write_text(f'[recipe]\nname = "judged"\n[rows]\n{first}{judge}')
    assert woolmill(capsys, "recipe", "check", recipe, "--rows", rows)[0] == 0
    status, out, _ = woolmill(capsys, "preview", recipe, "--rows", rows, "--answer", "It rains.")
    assert status == 0
    assert "Is this good? It rains." in out
    status, _, err = woolmill(
        capsys, "generate", "--recipe", recipe, "--rows", rows, "--backend", "scripted",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert status == 78
    assert "[models.judge]" in err


@pytest.mark.parametrize("parse", FAULTY)
def test_each_fault_is_a_line(
    parse: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = python_recipe(tmp_path, parse)
    status, out, err = woolmill(capsys, "recipe", "check", spec)
    assert status == 65
    assert FAULTY[parse] in out
    assert err.endswith("see above\n")


def test_a_prompt_that_follows_from_more_than_the_request_is_a_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = python_recipe(tmp_path, "return [{'a': answer.text}]")
    path = tmp_path / "own.py"
    path.write_text(path.read_text().replace("{ask.index}", '{hash("x")}'))
    status, out, _ = woolmill(capsys, "recipe", "check", spec)
    assert status == 65
    assert "fault: the prompt of request 0: two processes came to different results" in out


def test_what_cannot_be_loaded_or_has_no_rows_is_a_setting(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = woolmill(capsys, "recipe", "check", files[0])
    assert status == 78
    assert "needs input rows; name them with --rows" in err
    (tmp_path / "bad.toml").write_text(RECIPE.replace("user =", "usr ="))
    status, _, err = woolmill(capsys, "recipe", "check", tmp_path / "bad.toml", "--rows", files[1])
    assert status == 78
    assert "unknown key 'stage.usr'; did you mean 'user'" in err


def test_a_recipe_that_dies_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = python_recipe(tmp_path, "import os; os._exit(3)")
    status, _, err = woolmill(capsys, "recipe", "check", spec)
    assert status == 65
    assert "the recipe's process ended with status 3" in err


def test_show_prints_what_can_be_copied(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert woolmill(capsys, "recipe", "show", files[0]) == (0, RECIPE, "")
    spec = python_recipe(tmp_path, "return []")
    status, out, _ = woolmill(capsys, "recipe", "show", spec)
    assert status == 0
    assert "What it is for." in out
    assert "fields  a" in out
    assert str(tmp_path / "own.py") in out


def test_list_names_alpaca(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = woolmill(capsys, "recipe", "list")
    assert status == 0
    assert out.startswith("alpaca ")


def test_preview_shows_prompts_and_asks_nobody(
    files: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate_module, "make_backends", None)
    flags = ("--rows", files[1], "--set", "kind=long", "-n", "2", "--max-tokens", "77")
    cold = ("--temperature", "0")
    status, out, err = woolmill(capsys, "preview", files[0], *flags, *cold)
    assert status == 0, err
    assert out.count("━━ request") == 2
    assert "── system\nAsk a long question.\n── user\nAbout topic 0.\n── sampling\n" in out
    assert '"max_tokens": 77, "temperature": 0.0, ' in out
    assert "response_format" in out
    assert "── answer" not in out
    assert not (tmp_path / "runs").exists()


def test_preview_shows_what_becomes_of_an_answer(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = tmp_path / "answer.txt"
    answer.write_text('<think>Hm.</think>{"q": "Why is it so?"}')
    command = ("preview", files[0], "--rows", files[1], "-n", "1", "--out", tmp_path / "run")
    _, out, _ = woolmill(capsys, *command, "--answer", answer)
    assert "── row\ntopic: topic 0\nquestion: Why is it so?\n" in out
    _, out, _ = woolmill(capsys, *command, "--answer", '{"q": "Why?"}')
    assert "── refused: too_short (question: 1 words)\ntopic: topic 0\nquestion: Why?\n" in out
    _, out, _ = woolmill(capsys, *command, "--answer", "\x1b]0;no")
    assert "── refused: bad_format (there is no { or [)" in out
    assert "\x1b" not in out


@pytest.mark.anyio
async def test_preview_asks_at_most_so_often(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many calls as requests; a failure is told, and the others are asked all the same."""

    def answer(prompt: Any) -> str:
        return json.dumps({"q": f"What of number {prompt.index}?"})

    backend = ScriptedBackend(answer)
    monkeypatch.setattr(generate_module, "make_backends", lambda config: [backend])
    settings = {"recipe": str(files[0]), "rows": files[1], "out": tmp_path, "backend": "scripted"}
    seen = await preview(RunConfig.model_validate(settings), 2)
    assert backend.calls == {0: 1, 1: 1}
    assert [each.decisions[0].record for each in seen] == [
        {"topic": f"topic {n}", "question": f"What of number {n}?"} for n in range(2)
    ]
    assert len(await preview(RunConfig.model_validate(settings), 50)) == 5


@pytest.mark.anyio
async def test_preview_tells_a_fault_of_one_request(tmp_path: Path) -> None:
    recipe, rows = tmp_path / "own.toml", tmp_path / "rows.jsonl"
    recipe.write_text(RECIPE)
    rows.write_text('{"topic": "rain"}\n{"topik": "rain"}\n')
    settings = {"recipe": str(recipe), "rows": rows, "out": tmp_path}
    first, second = await preview(RunConfig.model_validate(settings))
    assert first.prompt is not None
    assert second.prompt is None
    assert "there is no 'topic'; did you mean 'topik'" in second.fault or "need" in second.fault


def test_generate_takes_a_recipe_rows_samples_and_options(
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def answer(prompt: Any) -> str:
        asked.append(prompt.chat[0].content)
        return json.dumps({"q": f"What of number {prompt.index}?"})

    monkeypatch.setattr(generate_module, "make_backends", lambda config: [ScriptedBackend(answer)])
    flags = ("--rows", files[1], "--samples", "2", "--set", "kind=hard", "--no-progress")
    command = ("generate", "--recipe", files[0], "--backend", "scripted", "--out", tmp_path / "run")
    status, _, err = woolmill(capsys, *command, *flags)
    assert status == 0, err
    assert asked == ["Ask a hard question."] * 10
    status, _, err = woolmill(capsys, *command, "--rows", files[1], "--set", "knd=hard")
    assert status == 78
    assert "has no such option; did you mean 'kind'?" in err
