"""TOML recipes of several stages: whole runs, what is checked at load, preview and check."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.backends.scripted import ScriptedBackend
from engine.cli.main import main
from engine.errors import ConfigError
from engine.recipes.base import Ask
from engine.recipes.guard import parts_of
from engine.recipes.template import TemplateChain, load_template
from engine.records import Prompt
from engine.run import generate as generate_module
from engine.run.display import SilentDisplay
from engine.run.generate import Result, generate
from engine.run.settle import settle, stages_of
from engine.settings import RunConfig, load_config
from engine.store import RunStore
from engine.upkeep.redecide import redecide_run
from engine.upkeep.verify import problems

pytestmark = pytest.mark.slow

QUIZ = """
[recipe]
name = "quiz"
compare = "{{ question }}"
[vary]
topic = ["rivers", "bread", "trains"]
[[stage]]
name = "ask"
user = "Write questions about {{ topic }}, as a list."
answer = { format = "list" }
give = { topic = "{{ topic }}", question = "{{ item }}", draft = "{{ index }}" }
refuse = [ { field = "question", matches = "7.$", reason = "odd" } ]
[[stage]]
name = "answer"
user = "{{ question }}"
give = { answer = "{{ text }}" }
drop = ["draft"]
[[stage]]
name = "judge"
user = "Score it. {{ question }} {{ answer }}"
keep = "score >= 3"
answer = { format = "json", schema = { type = "object", required = ["score"], properties = { score = { type = "integer" } } } }
"""
ROUNDS = """
[recipe]
name = "evolve"
[rows]
[[stage]]
name = "begin"
user = "Begin {{ text }}"
give = { id = "{{ id }}", text = "{{ row.text }}", first = "{{ text }}" }
[[stage]]
name = "evolve"
rounds = 3
on_refuse = "keep_parent"
user = "Round {{ round }}: {{ text }}"
give = { text = "{{ row.text }}+{{ round }}" }
refuse = [ { when = "'no' in row.first and round == 2", reason = "worse" } ]
"""
VOTES = """
[recipe]
name = "votes"
[rows]
[[stage]]
name = "solve"
user = "Solve {{ id }}"
samples = 3
reduce = "REDUCE"
answer = { format = "regex", pattern = "= (?P<result>[^ ]+)" }
give = { id = "{{ id }}", result = "{{ result }}", sample = "{{ sample }}" }
[[stage]]
name = "explain"
user = "Explain {{ result }}"
give = { why = "{{ text }}" }
"""


def load(folder: Path, text: str) -> TemplateChain:
    path = folder / "own.toml"
    path.write_text(text)
    made = load_template(str(path), {})
    assert isinstance(made, TemplateChain)
    return made


def quiz(prompt: Prompt) -> str:
    """Answers of each stage, told apart by what is asked; a function of the prompt alone."""
    asked = prompt.chat[-1].content
    number = sum(map(ord, asked)) + (prompt.index if asked.startswith("Write") else 0)
    if asked.startswith("Write"):
        words = [f"word{(number * 7919 + n * 104729) % 5000}" for n in range(9)]
        return "\n".join(f"{n}. Why is {' '.join(words[3 * n - 3 : 3 * n])}?" for n in (1, 2, 3))
    if asked.startswith("Score"):
        return "seven" if number % 11 == 0 else json.dumps({"score": number % 6})
    return "" if number % 13 == 0 else f"Since {number}."


def scripted(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Prompt], str]) -> None:
    def backends(_config: RunConfig) -> list[ScriptedBackend]:
        return [ScriptedBackend(answer, delay_s=lambda prompt: prompt.index % 5 / 500)]

    monkeypatch.setattr(generate_module, "make_backends", backends)


async def ran(folder: Path, text: str, **more: Any) -> Result:
    spec = folder.parent / "own.toml"
    spec.write_text(text)
    settings = {"backend": "scripted", "semantic": False, "out": folder, "recipe": str(spec)}
    return await generate(RunConfig.model_validate(settings | more), SilentDisplay())


def rows(folder: Path, count: int = 12) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": n, "text": f"t{n}"}) + "\n" for n in range(count)))
    return path


def decided(folder: Path) -> list[Any]:
    with RunStore.read(folder) as run:
        return [(d.index, d.reason, d.record, d.detail) for d in run.decisions()]


def accepted(folder: Path) -> list[Any]:
    return [record for _, reason, record, _ in decided(folder) if reason is None]


# Runs


@pytest.mark.anyio
async def test_a_row_goes_through_three_stages_to_an_exact_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """List, text, JSON score: the same dataset for 1 and for 32 in flight."""
    scripted(monkeypatch, quiz)
    for in_flight in (1, 32):
        result = await ran(tmp_path / str(in_flight), QUIZ, target=50, max_in_flight=in_flight)
        assert result.stop.reached
    assert decided(tmp_path / "1") == decided(tmp_path / "32")
    made = accepted(tmp_path / "32")
    assert len(made) == 50
    assert all(list(row) == ["topic", "question", "answer", "score"] for row in made)
    assert all(row["score"] >= 3 for row in made)
    folders = [tmp_path / "32" / "stages" / "1-ask", tmp_path / "32" / "stages" / "2-answer"]
    asked, answered = map(accepted, folders)
    assert list(asked[0]) == ["topic", "question", "draft"]
    # What is answered is what was asked, in its order, but for what was refused.
    questions = iter(row["question"] for row in asked)
    assert all(row["question"] in questions for row in answered)
    reasons = {
        reason for folder in (*folders, tmp_path / "32") for _, reason, *_ in decided(folder)
    }
    assert {"odd", "no_record", "not_kept", "bad_format"} <= reasons
    for folder in (*folders, tmp_path / "32"):
        assert list(problems(folder)) == []


@pytest.mark.anyio
async def test_a_higher_target_goes_on_where_the_stages_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, quiz)
    await ran(tmp_path / "run", QUIZ, target=20)
    await ran(tmp_path / "run", QUIZ, target=45)
    await ran(tmp_path / "whole", QUIZ, target=45)
    assert accepted(tmp_path / "run") == accepted(tmp_path / "whole")
    assert len(accepted(tmp_path / "run")) == 45


@pytest.mark.anyio
async def test_a_row_that_a_round_refuses_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda prompt: "no" if prompt.chat[-1].content[-1] in "37" else "yes")
    result = await ran(tmp_path / "run", ROUNDS, rows=rows(tmp_path))
    assert result.stop.reached
    made = accepted(tmp_path / "run")
    assert [row["id"] for row in made] == list(range(12))
    for row in made:
        grown = "+1+3" if row["id"] in (3, 7) else "+1+2+3"
        assert row["text"] == f"t{row['id']}{grown}"
    stages = tmp_path / "run" / "stages"
    assert sorted(each.name for each in stages.iterdir()) == ["1-begin", "2-evolve-1", "3-evolve-2"]
    unchanged = [
        index for index, _, _, detail in decided(stages / "3-evolve-2") if "worse" in detail
    ]
    assert unchanged == [3, 7]


@pytest.mark.anyio
async def test_a_first_stage_keeps_the_fields_of_its_input_that_rows_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows have the same fields whether an answer improves them or not."""
    text = ROUNDS.replace(ROUNDS[ROUNDS.index("[[stage]]") : ROUNDS.rindex("[[stage]]")], "")
    text = text.replace(" and round == 2", "").replace("row.first", "answer")
    text = text.replace(
        "give =", 'answer = { format = "regex", pattern = "(?P<answer>.+)" }\ngive ='
    )
    scripted(monkeypatch, lambda prompt: "no" if "t3" in prompt.chat[-1].content else "yes")
    await ran(tmp_path / "run", text, rows=rows(tmp_path, 5))
    made = accepted(tmp_path / "run")
    assert [row["text"] for row in made] == ["t0+1+2+3", "t1+1+2+3", "t2+1+2+3", "t3", "t4+1+2+3"]
    assert all(list(row) == ["text"] for row in made)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("how", "results"),
    [
        ("majority:result", ["5", "7", None, "1"]),
        ("best:result", ["5", "9", None, "3"]),
        ("all", [["4", "5", "5"], ["7", "9"], None, ["1", "2", "3"]]),
    ],
)
async def test_samples_become_one_row(
    how: str, results: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample that failed has no vote; a row without any is lost, with a reason."""
    samples = [["4", "5", "5"], ["7", "9", ""], ["", "", ""], ["1", "2", "3"]]

    def answer(prompt: Prompt) -> str:
        if prompt.chat[-1].content.startswith("Explain"):
            return "So it is."
        found = samples[prompt.index // 3][prompt.index % 3]
        return f"= {found}" if found else "I do not know"

    scripted(monkeypatch, answer)
    await ran(tmp_path / "run", VOTES.replace("REDUCE", how), rows=rows(tmp_path, 4))
    solved = {
        row["id"] if how != "all" else row["id"][0]: row for row in accepted(tmp_path / "run")
    }
    assert {n: row["result"] for n, row in solved.items()} == {
        n: result for n, result in enumerate(results) if result is not None
    }
    assert all(row["why"] == "So it is." for row in solved.values())
    first = decided(tmp_path / "run" / "stages" / "1-solve")
    assert [detail for _, reason, _, detail in first if reason == "no_sample"] == [
        "no sample gave a row"
    ]


@pytest.mark.anyio
@pytest.mark.parametrize("where", ["settings", "recipe"])
async def test_a_stage_may_ask_a_model_of_its_own(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who answers is told by the settings' table over the recipe's; both runs say so."""
    asked: dict[str | None, set[str]] = {}

    def backends(config: RunConfig) -> list[ScriptedBackend]:
        def answer(prompt: Prompt) -> str:
            kind = prompt.chat[-1].content.split()[0]
            asked.setdefault(config.model, set()).add(kind)
            if config.model == "strict":
                assert prompt.sampling.temperature == 0
            return quiz(prompt)

        return [ScriptedBackend(answer, model=config.model or "")]

    monkeypatch.setattr(generate_module, "make_backends", backends)
    text = QUIZ.replace('name = "judge"', 'name = "judge"\nmodel = "strict_one"')
    settings: dict[str, Any] = {"target": 10, "model": "many"}
    table = {"backend": "scripted", "model": "strict", "temperature": 0}
    if where == "settings":
        settings["models"] = {"strict_one": table}
    else:
        text += "[models.strict_one]\n"
        text += "".join(f"{name} = {json.dumps(value)}\n" for name, value in table.items())
    await ran(tmp_path / "run", text, **settings)
    assert asked["strict"] == {"Score"}
    assert asked["many"] == {"Write", "Why"}
    for folder, model in (("stages/1-ask", "many"), ("", "strict")):
        with RunStore.read(tmp_path / "run" / folder) as run:
            assert run.manifest.fixed["model"] == model


@pytest.mark.anyio
async def test_a_host_s_key_and_headers_never_go_to_another(tmp_path: Path) -> None:
    spec = tmp_path / "own.toml"
    spec.write_text(QUIZ.replace('name = "judge"', 'name = "judge"\nmodel = "j"'))
    settings: dict[str, Any] = {"recipe": str(spec), "base_url": ["http://127.0.0.1:1/v1"]}
    settings |= {"key_env": "FIRST_KEY", "header": ["X-Team=env:TEAM"], "query": ["a=b"]}
    settings["models"] = {"j": {"base_url": "http://127.0.0.1:2/v1"}}
    first, _, judge = stages_of(settle(RunConfig.model_validate(settings)))
    assert first.config.key_env == "FIRST_KEY"
    assert judge.config.base_url == ("http://127.0.0.1:2/v1",)
    assert (judge.config.header, judge.config.query) == ((), ())
    assert judge.config.key_env != "FIRST_KEY"


async def refused(tmp_path: Path, text: str, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        await ran(tmp_path / "run", text, **more)
    assert not (tmp_path / "run" / "run.sqlite").exists()
    return str(caught.value)


@pytest.mark.anyio
async def test_a_model_that_nobody_names_is_said_at_the_start(tmp_path: Path) -> None:
    text = QUIZ.replace('name = "judge"', 'name = "judge"\nmodel = "strict"')
    assert "add a table [models.strict]" in await refused(tmp_path, text)
    table = {"backend": "scripted"}
    said = await refused(tmp_path, text, models={"strict": table, "strikt": table})
    assert "[models.strikt]: recipe quiz does not ask it; its stages ask strict" in said


@pytest.mark.anyio
async def test_an_input_row_that_cannot_stay_as_it_is_is_said_at_the_start(tmp_path: Path) -> None:
    """A row that no answer improves must have the fields of the others."""
    text = ROUNDS.replace('name = "begin"', 'name = "begin"\non_refuse = "keep_parent"')
    with pytest.raises(ConfigError, match="need 'first', and the input row has none"):
        await ran(tmp_path / "run", text, rows=rows(tmp_path))


@pytest.mark.anyio
async def test_each_stage_is_decided_again_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last for nothing; after an early one the answers about rows that are gone are counted."""
    scripted(monkeypatch, quiz)
    await ran(tmp_path / "run", QUIZ, target=30)
    spec = tmp_path / "own.toml"
    spec.write_text(QUIZ.replace("score >= 3", "score >= 4"))
    await redecide_run(tmp_path / "run", None, {"recipe": str(spec)})
    scores = [row["score"] for row in accepted(tmp_path / "run")]
    assert set(scores) == {4, 5}
    edited = QUIZ.replace('matches = "7.$"', 'matches = "8.$"').replace("score >= 3", "score >= 4")
    spec.write_text(edited)
    first = tmp_path / "run" / "stages" / "1-ask"
    await redecide_run(first, None, {"recipe": str(spec)})
    with pytest.raises(ConfigError, match=r"\d+ of its answers are about rows"):
        await ran(tmp_path / "run", edited, target=40)


# What is checked when the file is read

WRONG = {
    ("{{ question }} {{ answer }}", "{{ question }} {{ anser }}"): (
        "stage.judge.user: no stage before gives 'anser'; did you mean 'answer'?"
    ),
    ("{{ question }} {{ answer }}", "{{ row.draft }}"): (
        "stage.judge.user: no stage before gives 'draft'; there are answer, question, topic"
    ),
    ('keep = "score >= 3"', 'keep = "scor >= 3"'): "stage.judge.keep: no stage before gives 'scor'",
    ('drop = ["draft"]', 'drop = ["daft"]'): "stage.answer.drop: no stage before gives 'daft'",
    ('answer = "{{ text }}"', 'answer = "{{ txt }}"'): "stage.answer.give.answer: no stage before",
    ('name = "judge"', 'name = "ask"'): "there are two called 'ask'",
    ('name = "judge"', 'name = "../x"'): "names a folder too",
    ('name = "judge"', 'name = "judge"\nreduce = "all"'): "stage.judge.reduce needs samples",
    ('name = "judge"', 'name = "judge"\nsamples = 3\nreduce = "mean:score"'): "stage.reduce",
    ('name = "judge"', 'name = "judge"\nsamples = 3\nreduce = "best:scor"'): (
        "stage.judge.reduce: a row has no field 'scor'; did you mean 'score'?"
    ),
    ('name = "judge"', 'name = "judge"\non_refuse = "keep_parent"'): (
        "stage.judge.give.score: on_refuse keeps the row before"
    ),
    ('name = "ask"', 'name = "ask"\nsamples = 3'): "stage.samples is about input rows",
    (
        'compare = "{{ question }}"',
        'compare = "{{ query }}"',
    ): "recipe.compare: a row has no 'query'",
    ('name = "judge"', 'name = "judge"\nmodle = "x"'): "did you mean 'model'?",
    ("[vary]", '[models.x]\nmodel = "m"\n[vary]'): "models.x: no stage asks it",
}


@pytest.mark.parametrize(("old", "new"), WRONG)
def test_what_no_stage_gives_is_one_line_at_the_start(old: str, new: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, QUIZ.replace(old, new))
    assert WRONG[old, new] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_are_compared_where_they_first_have_what_compare_names(tmp_path: Path) -> None:
    assert [stage.compares for stage in load(tmp_path, QUIZ).stages] == [True, False, False]
    later = QUIZ.replace('compare = "{{ question }}"', 'compare = "{{ question }} {{ answer }}"')
    assert [stage.compares for stage in load(tmp_path, later).stages] == [False, True, False]
    own = later.replace('name = "judge"', 'name = "judge"\ncompare = "{{ answer }}"')
    assert [stage.compares for stage in load(tmp_path, own).stages] == [False, True, True]


def test_a_change_of_one_stage_is_none_of_the_others(tmp_path: Path) -> None:
    """Prompts and decisions of each stage are told apart by themselves."""
    was = load(tmp_path, QUIZ).stages

    def changed(old: str, new: str) -> list[tuple[bool, bool]]:
        now = load(tmp_path, QUIZ.replace(old, new)).stages
        return [
            (a.asks_sha256 != b.asks_sha256, a.source_sha256 != b.source_sha256)
            for a, b in zip(was, now, strict=True)
        ]

    same = (False, False)
    assert changed("Score it.", "Score them.") == [same, same, (True, False)]
    assert changed("score >= 3", "score >= 4") == [same, same, (False, True)]
    assert changed('matches = "7.$"', 'matches = "8.$"') == [(False, True), same, same]


def test_what_a_row_need_not_have_is_no_fault(tmp_path: Path) -> None:
    """A default, a question whether it is there, and the methods of a row."""
    fine = "{{ row.draft | default('') }} {{ row.odd is defined }} {{ odd | d(1) }}"
    fine += "{% for name, value in row.items() %}{{ name }}={{ value }} {% endfor %}"
    judge = load(tmp_path, QUIZ.replace("{{ question }} {{ answer }}", fine)).stages[2]
    (part,) = parts_of(judge, Ask(index=0, row={"topic": "t", "question": "q", "answer": "a"}))
    assert part.render(0) == "Score it.  false 1topic=t question=q answer=a "


def test_each_stage_draws_anew(tmp_path: Path) -> None:
    """Else the rounds of a row would all draw the same."""
    text = ROUNDS.replace("[rows]", "[rows]\n[vary]\nway = ['a', 'b', 'c', 'd']")
    stages = load(tmp_path, text.replace("Round {{ round }}", "{{ way }}")).stages[1:]
    row = {"id": 1, "text": "t", "first": "f"}
    drawn = {
        tuple(parts_of(stage, Ask(index=index, row=row))[0].render(0)[0] for stage in stages)
        for index in range(40)
    }
    assert len(drawn) > 15


# The command line


def woolmill(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in argv])
    said = capsys.readouterr()
    return int(caught.value.code or 0), said.out, said.err


def test_a_preview_goes_through_the_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a backend there is the first, and it is said why; with one, what came of each."""
    load(tmp_path, QUIZ.replace("score >= 3", "true"))
    spec = tmp_path / "own.toml"
    status, out, _ = woolmill(capsys, "preview", spec, "-n", "1")
    assert status == 0
    assert out.count("━━") == 1
    assert "the stages behind ask ask about its rows: name a --backend" in out
    status, out, _ = woolmill(capsys, "preview", spec, "-n", "1", "--backend", "scripted")
    assert status == 0
    heads = [line for line in out.splitlines() if line.startswith("━━")]
    assert heads == ["━━ ask: request 0", "━━ answer: request 0", "━━ judge: request 0"]
    assert "score: " in out
    status, out, _ = woolmill(capsys, "preview", spec, "-n", "1", "--answer", "no list")
    assert status == 0
    assert out.count("━━") == 1
    assert "the stages behind ask ask about its rows: and none came of these requests" in out


def test_every_stage_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(tmp_path, QUIZ)
    status, out, err = woolmill(capsys, "recipe", "check", tmp_path / "own.toml")
    assert status == 0, out + err
    assert "3,000 damaged answers" in out
    load(tmp_path, QUIZ.replace('keep = "score >= 3"', 'keep = "question.nosuch.more > 1"'))
    status, out, _ = woolmill(capsys, "recipe", "check", tmp_path / "own.toml")
    assert status != 0
    assert "fault: stage judge: parse: stage.judge.keep: " in out


def test_settings_name_the_model_of_a_stage(tmp_path: Path) -> None:
    """A misspelt key of such a table is told with the nearest."""
    config = tmp_path / "run.toml"
    config.write_text('[models.judge]\nmodle = "big"\n')
    with pytest.raises(
        ConfigError, match=r"unknown setting 'models.judge.modle'; did you mean 'model'"
    ):
        load_config(config, {})
