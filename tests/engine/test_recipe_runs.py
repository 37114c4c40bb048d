"""Whole runs of recipes that this package does not know: every row decided once, in plan order, the
same whatever the concurrency, a crash or a mended parser.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from click.testing import CliRunner

from engine.cli.main import cli
from engine.errors import ConfigError, InputError, StoppedError
from engine.report.analysis import analyse
from engine.run.display import SilentDisplay
from engine.run.generate import Result, generate
from engine.settings import RunConfig
from engine.store import RunStore
from engine.upkeep.merge import merge_runs
from engine.upkeep.redecide import redecide_run
from engine.upkeep.salvage import salvage_run
from engine.upkeep.verify import problems
from engine.view.metrics import metrics
from tests.engine.killed import run_with_kills

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

ROOT = Path(__file__).parents[2]
RECIPE = '''
"""Questions about rows, answered between tags; the scripted backend's words stand for a model's."""
from engine.recipes.base import Part, Recipe


class Tagged(Recipe):
    name = "tagged"
    fields = ("id", "topic", "answer", "words")
    asks = "any"
    needs_rows = True

    def prompt(self, ask):
        return [
            Part("Be brief.\\n", role="user"),
            Part(ask.row["topic"], "shorten"),
            Part(f"\\nVariant {ask.draw('variant') % 7}, sample {ask.sample}."),
        ]

    def parse(self, ask, answer):
        words = answer.text.split()
        if not words:
            yield ("bad_format", "no words")
            return
        yield {
            "id": ask.row["id"],
            "topic": ask.row["topic"],
            "answer": " ".join(words[:MOST]),
            "words": len(words),
        }

    def refuse(self, row):
        return ("odd", "an odd number of words") if row["words"] % 2 else None

    def compared(self, row):
        return f"{row['topic']} {row['answer']}" if row["id"] % 3 else None


MOST = 40
'''
COUNT = 120


def recipe_file(folder: Path, text: str = RECIPE) -> str:
    path = folder / "own.py"
    path.write_text(text)
    return f"{path}:Tagged"


def input_rows(folder: Path, count: int = COUNT) -> Path:
    path = folder / "rows.jsonl"
    topics = ("rain", "glass", "bees", "salt", "clocks", "harbours", "moss")
    path.write_text(
        "".join(
            json.dumps({"id": n, "topic": f"{topics[n % 7]} {n} of {topics[n % 5]}"}) + "\n"
            for n in range(count)
        )
    )
    return path


async def ran(folder: Path, **more: Any) -> Result:
    settings = {"backend": "scripted", "semantic": False, "out": folder, "seed": 3} | more
    return await generate(RunConfig.model_validate(settings), SilentDisplay())


def dump(folder: Path) -> list[Any]:
    """All decisions, as the store has them."""
    with RunStore.read(folder) as run:
        return [
            (d.index, d.position, d.reason, d.record, d.detail, d.nearest) for d in run.decisions()
        ]


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


def generated(folder: Path, recipe: str) -> str:
    """What a run over three rows says, of which two hold no question."""
    rows = folder / "questions.jsonl"
    rows.write_text('{"id": "a", "question": "Why?"}\n{"id": "b"}\n{"id": "c", "question": null}\n')
    words = ["generate", "--recipe", recipe, "--rows", rows, "--backend", "scripted"]
    words += ["--no-semantic", "--carry", "id", "--out", folder / "run"]
    done = CliRunner().invoke(cli, [str(word) for word in words])
    return f"{done.exit_code}\n{done.output}"


def refused_of(folder: Path) -> list[tuple[str, str]]:
    words = ["export", folder / "run", "--refused", "-o", folder / "why.jsonl"]
    assert CliRunner().invoke(cli, [str(word) for word in words]).exit_code == 0
    lines = map(json.loads, (folder / "why.jsonl").read_text().splitlines())
    return [(line["id"], line["reason"]) for line in lines]


def test_a_row_without_a_question_is_no_failed_request(tmp_path: Path) -> None:
    """The recipe has nothing to ask about it: nothing failed, and nothing is to be sent again."""
    said = generated(tmp_path, "respond")
    assert said.startswith("0\n")
    assert "refused  2 (not_asked 2)" in said
    assert not any(word in said for word in ("\nfailed ", "unsent ", "again "))
    assert refused_of(tmp_path) == [("b", "not_asked"), ("c", "not_asked")]


@pytest.mark.parametrize("user", ["{{ question }}", " {{ question }}\\n"])
@pytest.mark.parametrize("system", ["", 'system = "Be brief."\n'])
def test_a_blank_prompt_about_a_row_is_not_asked(tmp_path: Path, user: str, system: str) -> None:
    """Also where a template makes it: what a model says to nothing is paid, and no row."""
    path = tmp_path / "own.toml"
    path.write_text(
        f'[recipe]\nname = "own"\n[rows]\n[stage]\n{system}user = "{user}"\n'
        'give = { answer = "{{ text }}" }\n'
    )
    rows = tmp_path / "questions.jsonl"
    rows.write_text('{"id": "a", "question": "Why?"}\n{"id": "b", "question": " \\n "}\n')
    words = ["generate", "--recipe", path, "--rows", rows, "--backend", "scripted"]
    words += ["--no-semantic", "--carry", "id", "--out", tmp_path / "run"]
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == 0
    assert "not_asked 1" in done.output
    assert refused_of(tmp_path) == [("b", "not_asked")]


def test_requests_without_a_prompt_are_told_apart_from_failed_ones(tmp_path: Path) -> None:
    """A template needs what a row does not have."""
    path = tmp_path / "own.toml"
    path.write_text(
        '[recipe]\nname = "own"\n[rows]\n[stage]\nuser = "{{ question | upper }}"\n'
        'give = { question = "{{ question }}", answer = "{{ text }}" }\n'
    )
    said = generated(tmp_path, str(path))
    assert said.startswith("3\n")
    assert "unsent   1 request, with no prompt to send" in said
    assert "\nfailed " not in said
    assert "again    once mended: woolmill redecide" in said
    assert "\ndropped " not in said
    assert ("b", "recipe_error") in refused_of(tmp_path)
    with RunStore.read(tmp_path / "run") as run:
        told = metrics(run).splitlines()
    assert "woolmill_requests_sent_total 2" in told
    assert 'woolmill_answers_total{backend="scripted"} 2' in told
    assert "woolmill_unsent_requests_total 1" in told


@pytest.mark.parametrize(
    ("compare", "answer", "repeated"),
    [("{{ answer }}", "{{ text }}", 0), ("{{ question }}", "{{ question }}", 2)],
)
def test_an_answer_repeats_what_another_field_says(
    compare: str, answer: str, repeated: int, tmp_path: Path
) -> None:
    """Where rows are told by the answer itself, that is no answer that repeats them."""
    path, rows = tmp_path / "own.toml", tmp_path / "rows.jsonl"
    path.write_text(
        f'[recipe]\nname = "own"\ncompare = "{compare}"\n[rows]\n[stage]\n'
        f'user = "{{{{ question }}}}"\n'
        f'give = {{ question = "{{{{ question }}}}", answer = "{answer}" }}\n'
    )
    rows.write_text('{"question": "Why is grass green?"}\n{"question": "Who built boats?"}\n')
    words = ["generate", "--recipe", path, "--rows", rows, "--backend", "scripted"]
    words += ["--no-semantic", "--rouge-threshold", "1", "--out", tmp_path / "run"]
    assert CliRunner().invoke(cli, [str(word) for word in words]).exit_code == 0
    with RunStore.read(tmp_path / "run") as run:
        assert run.counts().accepted == 2
        assert analyse(run)["checks"].get("answer repeats the text", 0) == repeated
