"""Faults of recipes that this package does not know: each costs its own row, or is said at the
start.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.cli.main import cli
from engine.errors import ConfigError
from engine.store import RunStore
from engine.upkeep.redecide import redecide_run
from engine.upkeep.verify import problems
from tests.engine.own_recipe import RECIPE, dump, input_rows, ran, recipe_file

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

ROOT = Path(__file__).parents[2]

FAULTS = {
    "raises": ("words = answer.text.split()", "words = 1 / 0", "ZeroDivisionError"),
    "sleeps": ("words = answer.text.split()", "import time; time.sleep(1e9)", "more than"),
    "never ends": ("words = answer.text.split()", "while True: pass", "more than"),
    "leaves": ("words = answer.text.split()", "raise SystemExit(3)", "SystemExit: 3"),
    "no row": ('"words": len(words),', '"other": len(words),', "the recipe's fields are"),
    "no JSON": ('"words": len(words),', '"words": object(),', "none that JSON has"),
    "nonsense": ('yield ("bad_format", "no words")', "yield 7", "a row or a refusal is meant"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_parser_s_fault_is_a_refusal(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never the end of a run, never a stall: the answers of the other rows are decided."""
    was, now, said = FAULTS[fault]
    text = RECIPE.replace(was, now)
    if fault == "nonsense":
        text = text.replace("if not words:", "if True:")
    # One row in eight goes wrong.
    text = text.replace(
        "    def parse(self, ask, answer):\n",
        "    def parse(self, ask, answer):\n"
        "        if ask.index % 8:\n"
        "            return [{'id': ask.row['id'], 'topic': '', 'answer': '', 'words': 2}]\n"
        "        return self.odd(ask, answer)\n\n"
        "    def odd(self, ask, answer):\n",
    ).replace(
        "return f\"{row['topic']} {row['answer']}\" if row[\"id\"] % 3 else None", "return None"
    )
    text = "from engine.recipes import guard\nguard.LIMIT_S = 0.3\n" + text
    recipe, rows = recipe_file(tmp_path, text), input_rows(tmp_path, 24)
    result = await ran(tmp_path / "run", recipe=recipe, rows=rows)
    assert result.stop.reached
    for index, _, reason, _, detail, _ in dump(tmp_path / "run"):
        assert reason == (None if index % 8 else "recipe_error"), detail
        assert index % 8 or said in detail
        assert index % 8 or fault != "raises" or "own.py:" in detail


HANGS = """
        if ask.index == 5:
            while True:
                try:
                    time.sleep(3600)
                except:
                    pass
        if ask.index == 9:
            sum(range(10**12))
"""


async def test_a_parser_that_nothing_interrupts_loses_its_own_answers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that it hangs in is ended, another says at which answer, and that is refused."""
    parse = "    def parse(self, ask, answer):"
    assert parse in RECIPE
    text = RECIPE.replace(parse, parse + HANGS)
    text = "import time\nfrom engine.recipes import guard\nguard.LIMIT_S = 0.3\n" + text
    monkeypatch.setattr("engine.decide.process.STUCK_S", 2.0)
    recipe, rows = recipe_file(tmp_path, text), input_rows(tmp_path, 16)
    result = await ran(tmp_path / "run", recipe=recipe, rows=rows)
    assert result.stop.reached
    lost = {
        i: detail
        for i, _, reason, _, detail, _ in dump(tmp_path / "run")
        if reason == "recipe_error"
    }
    said = "the recipe's code hung at it, or ended the process that decides"
    assert lost == {5: said, 9: said}
    assert {index for index, *_ in dump(tmp_path / "run")} == set(range(16))


async def test_a_prompt_s_fault_is_a_refusal_or_said_at_the_start(tmp_path: Path) -> None:
    """Where no first prompt can be made the run does not begin; one bad row is one refusal."""
    rows = input_rows(tmp_path, 20)
    recipe = recipe_file(tmp_path, RECIPE.replace('ask.row["topic"]', 'ask.row["theme"]'))
    with pytest.raises(ConfigError, match=r"makes no prompt: KeyError: 'theme' \(own.py:"):
        await ran(tmp_path / "none", recipe=recipe, rows=rows)
    assert not dump(tmp_path / "none")
    lines = rows.read_text().splitlines()
    lines[7] = json.dumps({"id": 7})
    rows.write_text("\n".join(lines) + "\n")
    folder = tmp_path / "second"
    folder.mkdir()
    result = await ran(tmp_path / "one", recipe=recipe_file(folder), rows=rows)
    assert result.stop.reached
    decided = dump(tmp_path / "one")
    assert [index for index, *_ in decided] == list(range(20))
    assert [index for index, _, reason, *_ in decided if reason == "recipe_error"] == [7]
    with RunStore.read(tmp_path / "one") as run:
        assert run.counts().sent == 19


async def test_a_prompt_that_leaves_the_program_is_one_refusal(tmp_path: Path) -> None:
    text = RECIPE.replace(
        "    def prompt(self, ask):\n",
        "    def prompt(self, ask):\n"
        "        if ask.row['id'] == 7:\n"
        "            raise SystemExit\n",
    )
    result = await ran(
        tmp_path / "run", recipe=recipe_file(tmp_path, text), rows=input_rows(tmp_path, 20)
    )
    assert result.stop.reached
    faults = [(d[0], d[4]) for d in dump(tmp_path / "run") if d[2] == "recipe_error"]
    assert [index for index, _ in faults] == [7]
    assert "SystemExit" in faults[0][1]


def test_a_text_of_all_prompts_that_cannot_be_made_is_a_fault_in_a_preview(tmp_path: Path) -> None:
    recipe = tmp_path / "endless.toml"
    user = "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}"
    recipe.write_text(
        f'[recipe]\nname = "e"\n[stage]\nuser = "{user}"\ngive = {{ a = "{{{{ text }}}}" }}\n'
    )
    result = CliRunner().invoke(cli, ["preview", str(recipe), "-n", "1"])
    assert result.exit_code == 0, result.output
    assert "Range too big" in result.output


async def test_a_row_that_utf_8_or_64_bits_cannot_hold_is_its_own_affair(tmp_path: Path) -> None:
    """A prompt with half of a surrogate pair is refused; what it does not show is no harm."""
    rows = input_rows(tmp_path, 20)
    lines = rows.read_text().splitlines()
    lines[3] = json.dumps({"id": 3, "topic": "glass \ud800"})
    lines[5] = json.dumps({"id": 5, "topic": "bees", "other": "\udc00"})
    lines[7] = json.dumps({"id": 7, "topic": "salt", "other": 10**30})
    rows.write_text("\n".join(lines) + "\n")
    recipe = recipe_file(tmp_path)
    for _ in range(2):
        result = await ran(tmp_path / "run", recipe=recipe, rows=rows)
        assert result.stop.reached
    decided = dump(tmp_path / "run")
    assert {d[0] for d in decided} == set(range(20))
    faults = [(d[0], d[4]) for d in decided if d[2] == "recipe_error"]
    assert [index for index, _ in faults] == [3]
    assert "half of a surrogate pair" in faults[0][1]
    assert list(problems(tmp_path / "run")) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def broken(:", "cannot be loaded: SyntaxError"),
        ("import no_such_module", "cannot be loaded: ModuleNotFoundError"),
        ("class Other: pass", "there is no Tagged"),
        ("class Tagged: pass", "is no Recipe"),
        (RECIPE.replace("    fields", "    gields"), "has no fields"),
        (RECIPE.replace('("id", "topic", "answer", "words")', '"answer"'), "has no fields"),
        (RECIPE.replace('"answer", "words")', '"answer", "answer")'), "names a field twice"),
        (RECIPE.replace("def parse", "def pasre"), "has no method parse"),
    ],
)
async def test_what_is_no_recipe_is_one_line_at_the_start(
    text: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        await ran(tmp_path / "run", recipe=recipe_file(tmp_path, text), rows=input_rows(tmp_path))


async def test_a_folder_alone_never_starts_the_code_that_it_names(tmp_path: Path) -> None:
    """A run's folder may come from anybody: its Python is run only where the person names it."""
    recipe = recipe_file(tmp_path)
    await ran(tmp_path / "run", recipe=recipe, rows=input_rows(tmp_path, 10))
    trap = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    for file in (tmp_path / "own.py", tmp_path / "run" / "recipe.py"):
        file.write_text(trap + file.read_text())
    sys.modules.pop(next(name for name in sys.modules if name.startswith("woolmill_recipe")), None)
    commands = ["report", "verify", "export"]
    for command in commands:
        more = ["-o", str(tmp_path / "out.jsonl")] if command == "export" else []
        done = CliRunner().invoke(cli, [command, str(tmp_path / "run"), *more])
        assert done.exit_code in (0, 65), done.output
    with pytest.raises(ConfigError, match=r"its recipe is code.*--recipe .*own.py:Tagged"):
        await redecide_run(tmp_path / "run", None, {})
    assert not (tmp_path / "ran").exists()
    named = [
        *("export", str(tmp_path / "run"), "-o", str(tmp_path / "2.jsonl")),
        "--recipe",
        recipe,
    ]
    assert CliRunner().invoke(cli, named).exit_code == 0
    assert (tmp_path / "ran").exists()


async def test_a_parser_that_ends_its_process_costs_its_own_answer(tmp_path: Path) -> None:
    """As a crash in a native library would: twice at one answer, and that is refused."""
    fatal = RECIPE.replace(
        "        words = answer.text.split()\n",
        "        import os\n        words = answer.text.split()\n"
        "        if ask.index == 5:\n            os._exit(0)\n",
    )
    recipe, rows = recipe_file(tmp_path, fatal), input_rows(tmp_path, 12)
    result = await ran(tmp_path / "run", recipe=recipe, rows=rows)
    assert result.stop.reached, result.stop.error
    decided = dump(tmp_path / "run")
    assert [index for index, *_ in decided] == list(range(12))
    assert [index for index, _, reason, *_ in decided if reason == "recipe_error"] == [5]


async def test_a_parser_that_never_ends_gives_no_row(tmp_path: Path) -> None:
    endless = RECIPE.replace(
        '        yield {\n            "id"',
        '        while ask.index == 3:\n            yield ("odd", "")\n'
        '        yield {\n            "id"',
    )
    recipe, rows = recipe_file(tmp_path, endless), input_rows(tmp_path, 6)
    result = await ran(tmp_path / "run", recipe=recipe, rows=rows)
    assert result.stop.reached
    decided = [(index, reason) for index, _, reason, *_ in dump(tmp_path / "run")]
    assert len(decided) == 6
    assert decided[3] == (3, "recipe_error")


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("def prompt(self", "async def prompt(self", "prompt() is asynchronous"),
        (
            "        return [\n            Part(",
            "        return 'text' or [\n            Part(",
            "a str where",
        ),
        ('role="user"', 'role="tool"', "a Part of role 'tool'"),
    ],
)
async def test_a_prompt_of_another_kind_is_said_at_the_start(
    was: str, now: str, said: str, tmp_path: Path
) -> None:
    assert was in RECIPE
    recipe = recipe_file(tmp_path, RECIPE.replace(was, now, 1))
    with pytest.raises(ConfigError, match="makes no prompt") as raised:
        await ran(tmp_path / "run", recipe=recipe, rows=input_rows(tmp_path, 5))
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("parse", "said"),
    [
        ("async def parse(self, ask, answer):\n        return []", "parse() is asynchronous"),
        ("def parse(self, ask, answer):\n        return {'id': 1}", "parse() gave a dict where"),
    ],
)
async def test_a_parser_of_another_kind_is_told_what_is_meant(
    parse: str, said: str, tmp_path: Path
) -> None:
    text = re.sub(r"def parse\([\s\S]*?(?=\n\n    def refuse)", lambda _: parse, RECIPE)
    recipe = recipe_file(tmp_path, text)
    await ran(tmp_path / "run", recipe=recipe, rows=input_rows(tmp_path, 3))
    decided = dump(tmp_path / "run")
    assert [reason for _, _, reason, *_ in decided] == ["recipe_error"] * 3
    assert all(said in detail for _, _, _, _, detail, _ in decided)
