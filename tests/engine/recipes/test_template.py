"""Recipes in TOML files: what they ask, and what they make of answers."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.prompts.fit import Prompts
from engine.recipes import guard
from engine.recipes.base import Ask, Part, Piece
from engine.recipes.guard import NotAsked, RecipeFault, parsed, parts_of
from engine.recipes.template import Template, load_template
from engine.records import Completion, Usage

HEAD = '[recipe]\nname = "own"\n'
JUDGED = """
[recipe]
name = "judged"
version = 2
compare = "{{ question }}"

[options]
least = 3

[rows]
path = "people.csv"

[vary]
tone = ["plain", "formal", "terse"]

[[stage]]
name = "ask"
system = "Write one question. Be {{ tone }}."
user = "A question that {{ persona }} would ask."
sampling = { max_tokens = 200, stop = "\\n\\n\\n" }
give = { id = "{{ row.id }}", question = "{{ question }}", score = "{{ score }}", tone = "{{ tone }}" }
refuse = [ { field = "question", words_below = 3 }, { field = "question", matches = "(?i)lawn", reason = "off_topic" } ]
keep = "score >= options.least"

[stage.answer]
format = "json"
schema = { type = "object", properties = { question = { type = "string" }, score = { type = "integer" } }, required = ["question", "score"] }
"""


def recipe(folder: Path, text: str, name: str = "own.toml", **options: Any) -> Template:
    path = folder / name
    path.write_text(text)
    made = load_template(str(path), options)
    assert isinstance(made, Template)
    return made


def stage(text: str, **more: str) -> str:
    tables = "".join(f"[{name}]\n{content}\n" for name, content in more.items())
    return f"{HEAD}{tables}[stage]\n{text}\n"


def completion(text: str, finish: str = "stop", **more: Any) -> Completion:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    return Completion(text=text, finish_reason=finish, usage=usage, **more)


def texts(parts: list[Part]) -> list[tuple[str, str, str]]:
    left = sum(part.gives_way == "drop" for part in parts)
    return [(part.role, part.gives_way, part.render(left)) for part in parts]


def pieces(made: Template, text: str, row: Any = None, **more: Any) -> list[Piece]:
    return parsed(made, Ask(index=0, row=row), completion(text, **more))


# What is asked


def test_turns_are_filled_from_the_row_draws_options_and_numbers(tmp_path: Path) -> None:
    text = stage(
        'system = "{{ options.who }}"\nuser = "{{ name }} {{ row.name }} {{ mood }} {{ sample }} {{ index }}"\n'
        'assistant = "So"\ngive = { a = "{{ text }}" }',
        options='who = "you"', vary='mood = ["sad"]',
    )  # fmt: skip
    made = recipe(tmp_path, text, who="we")
    ask = Ask(index=7, sample=1, row={"name": "Ada"})
    assert texts(made.prompt(ask)) == [
        ("system", "never", "we"), ("user", "never", "Ada Ada sad 1 7"), ("assistant", "never", "So")
    ]  # fmt: skip
    assert (made.asks, made.fields, made.needs_rows) == ("chat", ("a",), False)


def test_a_raw_text_is_for_the_completions_api(tmp_path: Path) -> None:
    made = recipe(tmp_path, stage('completion = "<|user|>"\ngive = { q = "{{ text }}" }'))
    assert made.asks == "completions"
    assert list(made.recurring()) == ["<|user|>"]
    with pytest.raises(ConfigError, match=r"user does not go with it"):
        recipe(tmp_path, stage('completion = "a"\nuser = "b"'))


def test_draws_follow_from_seed_and_index_alone(tmp_path: Path) -> None:
    made = recipe(
        tmp_path, stage('user = "{{ n }}"\ngive = { a = "{{ n }}" }', vary="n = [0, 1, 2]")
    )

    def drawn(seed: int) -> list[str]:
        return [made.prompt(Ask(index=i, seed=seed))[0].render(0) for i in range(300)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert {text: 70 < drawn(1).count(text) < 130 for text in "012"} == dict.fromkeys("012", True)
    assert [pieces(made, "x")[0].record] == [{"a": int(made.prompt(Ask(index=0))[0].render(0))}]


def test_values_are_never_templates_and_stand_as_json(tmp_path: Path) -> None:
    """A stranger's row cannot reach the sandbox; null is nothing, lists and objects are JSON."""
    made = recipe(
        tmp_path,
        stage(
            'user = "{{ a }}|{{ b }}|{{ c }}|{{ row.items }}|{{ t }}"\ngive = { a = "{{ text }}" }'
        ),
    )
    row = {
        "a": "{{ 7 * 7 }}{% raw %}",
        "b": None,
        "c": ["é", {"k": True}],
        "items": "mine",
        "t": True,
    }
    (part,) = made.prompt(Ask(index=0, row=row))
    assert part.render(0) == '{{ 7 * 7 }}{% raw %}||["é", {"k": true}]|mine|true'
    assert pieces(made, "{{ 1 + 1 }}")[0].record == {"a": "{{ 1 + 1 }}"}


@pytest.mark.parametrize(
    "escape",
    [
        "{{ row.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ options.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ self._TemplateReference__context }}",
        "{{ range(10 ** 9) | list }}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%1000000000d' % 1 }}",
        "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% set _ = row.update({'a': 1}) %}",
        "{{ row.name.format(row) }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox_or_make_what_is_huge(
    escape: str, tmp_path: Path
) -> None:
    made = recipe(tmp_path, stage(f"user = '''{escape}'''\ngive = {{ a = \"b\" }}"))
    row = {"name": "{0.__class__}"}
    with suppress(RecipeFault):
        shown = parts_of(made, Ask(index=0, row=row))[0].render(0)
        assert "class" not in shown
        assert len(shown) < 100
    assert row == {"name": "{0.__class__}"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% include 'x' %}", "include is not allowed"),
        ("{% import 'x' as y %}", "import is not allowed"),
        ("{% extends 'x' %}", "extends is not allowed"),
        ("{{ a", "unexpected end of template"),
        ("{{ a | nosuch }}", "No filter named 'nosuch'"),
        ("{{ [1, 2] | random }}", "No filter named 'random'"),
        ("a\nb\n{% if %}", r"line 3"),
    ],
)
def test_what_is_no_template_is_one_line_that_names_the_key(
    text: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"own.toml: stage.user: .*{said}"):
        recipe(tmp_path, stage(f"user = '''{text}'''\ngive = {{ a = \"b\" }}"))


def test_an_absent_name_is_told_with_the_nearest(tmp_path: Path) -> None:
    made = recipe(tmp_path, stage('user = "{{ persna }}"\ngive = { a = "{{ text }}" }'))
    with pytest.raises(
        RecipeFault, match=r"stage.user: there is no 'persna'; did you mean 'persona'"
    ):
        parts_of(made, Ask(index=0, row={"persona": "x"}))
    field = stage("user = '{{ a if a is defined else row.b }}'\ngive = { a = \"b\" }")
    with pytest.raises(RecipeFault, match=r"stage\.user: the object has no attribute 'b'"):
        parts_of(recipe(tmp_path, field), Ask(index=0, row={}))


@pytest.mark.parametrize(
    ("user", "row", "asks"),
    [
        ("{{ q }}", {"q": " \n"}, False),
        ("{{ q }}", {"q": "x"}, True),
        ("About: {{ q }}", {"q": ""}, True),
        ("{{ '' }}", None, True),  # a base model may be asked to begin by itself
    ],
)
def test_a_blank_prompt_asks_nothing_about_a_row(
    tmp_path: Path, user: str, row: dict[str, Any] | None, asks: bool
) -> None:
    made = recipe(
        tmp_path, stage(f'system = "s"\nuser = "{user}"\ngive = {{ a = "{{{{ text }}}}" }}')
    )
    with nullcontext() if asks else pytest.raises(NotAsked, match="the prompt is blank"):
        assert parts_of(made, Ask(index=0, row=row))


def test_what_an_answer_s_templates_need_is_missed_before_anything_is_paid(tmp_path: Path) -> None:
    """A row without the column that ``give`` passes through costs nothing; ``default`` allows it."""
    made = recipe(tmp_path, stage('user = "q"\ngive = { a = "{{ text }}", id = "{{ idd }}" }'))
    with pytest.raises(
        RecipeFault, match=r"need 'idd', and the input row has none; did you mean 'id'"
    ):
        parts_of(made, Ask(index=0, row={"id": 3}))
    made = recipe(tmp_path, stage('user = "q"\ngive = { a = "{{ idd | default(\'none\') }}" }'))
    assert pieces(made, "x", row={})[0].record == {"a": "none"}


# What gives way


def test_a_marked_value_is_shortened_where_the_context_is_too_short(tmp_path: Path) -> None:
    made = recipe(
        tmp_path,
        stage(
            'user = "Sum up:\\n{{ document | shorten }}\\nIn {{ n }} words."\ngive = { a = "{{ text }}" }'
        ),
    )
    document = "word " * 4000
    row = {"document": document, "n": 5}
    assert texts(made.prompt(Ask(index=0, row=row))) == [
        ("user", "never", "Sum up:\n"), ("user", "shorten", document), ("user", "never", "\nIn 5 words.")
    ]  # fmt: skip

    class Rows:
        def row(self, number: int) -> Any:
            return row

    sampling = {"max_tokens": 100, "temperature": 1.0, "top_p": 1.0}
    prompts = Prompts(made, seed=0, api="chat", sampling=sampling, rows=Rows(), context_length=1000)
    prompt = prompts.prompt(0)
    assert prompt is not None
    assert prompt.truncated
    assert prompt.text.startswith("Sum up:\nword word")
    assert prompt.text.endswith("word …\nIn 5 words.")


def examples(folder: Path, count: int = 9) -> None:
    rows = [{"id": f"e{n}", "q": f"question {n}"} for n in range(count)]
    (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


SHOWN = stage(
    'system = "Go on."\nuser = """{% for s in shown %}{{ loop.index }}. {{ s.q }}\n{% endfor %}{{ shown | length + 1 }}."""\n'
    'give = { q = "{{ text }}", like = "{{ shown | map(attribute=\'id\') | list }}" }',
    vary='shown = { from = "examples.jsonl", count = 4 }',
)


def test_examples_are_drawn_from_a_file_beside_the_recipe_and_dropped_from_the_last(
    tmp_path: Path,
) -> None:
    examples(tmp_path)
    made = recipe(tmp_path, SHOWN)
    parts = made.prompt(Ask(index=3))
    sources = [part.source for part in parts if part.gives_way == "drop"]
    assert len(set(sources)) == 4
    lines = [f"{n}. question {source[-1]}" for n, source in enumerate(sources, 1)]
    assert parts[0].role == "system"
    assert parts[-1].render(4) == "\n".join([*lines, "5."])
    assert parts[-1].render(2) == "\n".join([*lines[:2], "3."])


def test_the_rows_know_which_examples_were_shown(tmp_path: Path) -> None:
    examples(tmp_path)
    made = recipe(tmp_path, SHOWN)
    sources = [p.source for p in made.prompt(Ask(index=3)) if p.source]
    ask = Ask(index=3, shown=tuple(sources[:2]))
    (piece,) = parsed(made, ask, completion("x"))
    assert piece.record == {
        "q": "x",
        "like": [source.removeprefix("seed:") for source in sources[:2]],
    }


def test_examples_and_shortened_values_give_way_together(tmp_path: Path) -> None:
    examples(tmp_path)
    text = SHOWN.replace("{% for", "{{ document | shorten }}{% for")
    parts = recipe(tmp_path, text).prompt(Ask(index=3, row={"document": "long"}))
    assert ("user", "shorten", "long") in texts(parts)
    assert parts[-1].render(1).endswith("2.")


def test_examples_that_are_gone_stop_prompts_but_not_decisions(tmp_path: Path) -> None:
    """A run's own copy of the recipe reads its answers without the files beside the original."""
    made = recipe(tmp_path, SHOWN)
    with pytest.raises(RecipeFault, match=r"vary.shown: .*examples.jsonl: cannot be read"):
        parts_of(made, Ask(index=0))
    assert pieces(made, "x")[0].record == {"q": "x", "like": []}


# What becomes of answers


def test_a_value_keeps_its_type_where_it_is_one_expression(tmp_path: Path) -> None:
    text = stage(
        'user = "q"\nanswer = { format = "json" }\n[stage.give]\nn = "{{ n }}"\nl = "{{ row.tags }}"\n'
        't = "{{ n }}!"\nu = "{{ names | map(\'upper\') }}"\nz = "{{ n > 3 }}"\nall = "{{ item }}"',
    )
    (piece,) = pieces(recipe(tmp_path, text), '{"n": 4, "names": ["a"]}', row={"tags": ["x"]})
    assert piece.record == {
        "n": 4, "l": ["x"], "t": "4!", "u": ["A"], "z": True, "all": {"n": 4, "names": ["a"]}
    }  # fmt: skip


def test_what_a_model_calls_a_field_changes_nothing_else(tmp_path: Path) -> None:
    """Without a schema an object may have any keys; the recipe's own names keep their meaning."""
    text = stage(
        'user = "q"\nanswer = { format = "json" }\ngive = { id = "{{ row.id }}", o = "{{ options.a }}", q = "{{ q }}" }',
        options="a = 1",
    )
    made = recipe(tmp_path, text)
    (piece,) = pieces(made, '{"row": {"id": 9}, "options": {"a": 9}, "q": "x"}', row={"id": 1})
    assert piece.record == {"id": 1, "o": 1, "q": "x"}
    (piece,) = pieces(made, '{"p": 1}', row={"id": 1})
    assert piece.refusal == ("bad_format", "the object has no 'q'")


def test_the_schema_s_fields_are_the_row_s_where_give_says_nothing(tmp_path: Path) -> None:
    made = recipe(
        tmp_path,
        stage('user = "q"\nanswer = { format = "tags", tags = ["q", "a"], optional = ["n"] }'),
    )
    assert made.fields == ("q", "a", "n")
    assert pieces(made, "<q>1</q><a>2</a>")[0].record == {"q": "1", "a": "2", "n": None}
    with pytest.raises(ConfigError, match=r"stage.give is missing"):
        recipe(tmp_path, stage('user = "q"'))


def test_a_prefill_is_part_of_what_is_read_but_not_of_the_text(tmp_path: Path) -> None:
    text = stage(
        'user = "q"\nassistant = "{"\nanswer = { format = "json" }\ngive = { a = "{{ a }}", t = "{{ text }}" }'
    )
    made = recipe(tmp_path, text)
    assert pieces(made, '"a": 1}')[0].record == {"a": 1, "t": '"a": 1}'}
    assert pieces(made, '{"a": 1}')[0].record == {"a": 1, "t": '{"a": 1}'}


RULES = {
    '{ field = "a", words_below = 2 }': ("too_short", "a: 1 words"),
    '{ field = "a", words_above = 0 }': ("too_long", "a: 1 words"),
    '{ field = "a", characters_below = 7 }': ("too_short", "a: 6 characters"),
    '{ field = "a", characters_above = 5 }': ("too_long", "a: 6 characters"),
    '{ field = "a", matches = "t.o" }': ("matches", "a: two"),
    '{ field = "a", not_matches = "^x" }': ("not_matching", "a: onetwo"),
    '{ field = "a", matches = "two", reason = "says_two" }': ("says_two", "a: two"),
    "{ when = \"a.startswith('one')\" }": ("refused", "a.startswith('one')"),
    '{ when = "index == 0", reason = "first" }': ("first", "index == 0"),
    '{ field = "a", words_below = 1, characters_below = 6, matches = "x" }': None,
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_refuses_what_it_says(rule: str, tmp_path: Path) -> None:
    made = recipe(
        tmp_path, stage(f'user = "q"\ngive = {{ a = "{{{{ text }}}}" }}\nrefuse = [ {rule} ]')
    )
    (piece,) = pieces(made, "onetwo")
    assert piece.refusal == RULES[rule]
    assert piece.record == {"a": "onetwo"}


def test_keep_says_what_it_saw(tmp_path: Path) -> None:
    made = recipe(
        tmp_path,
        stage(
            'user = "q"\nanswer = { format = "json" }\ngive = { n = "{{ n }}" }\nkeep = "n >= 4 and s"'
        ),
    )
    assert pieces(made, '{"n": 4, "s": true}')[0].refusal is None
    assert pieces(made, '{"n": 3, "s": true}')[0].refusal == (
        "not_kept",
        "n = 3, s = true: not n >= 4 and s",
    )
    (piece,) = pieces(made, '{"n": "4", "s": true}')
    assert piece.refusal is not None
    assert piece.refusal[0] == "recipe_error"
    assert "stage.keep: TypeError" in piece.refusal[1]


def test_a_fault_of_one_row_leaves_the_others(tmp_path: Path) -> None:
    text = stage('user = "q"\nanswer = { format = "json" }\ngive = { n = "{{ 6 // n }}" }')
    came = [
        p.record or p.refusal
        for p in pieces(recipe(tmp_path, text), '[{"n": 2}, {"n": 0}, {"n": 3}]')
    ]
    assert came[0] == {"n": 3}
    assert came[1] == (
        "recipe_error",
        "stage.give.n: ZeroDivisionError: integer division or modulo by zero",
    )
    assert came[2] == {"n": 2}


def test_compare_and_messages_are_templates_over_the_row(tmp_path: Path) -> None:
    text = '[recipe]\nname = "own"\ncompare = "{{ q }}"\n[stage]\nuser = "q"\ngive = { q = "{{ text }}", s = "" }\n'
    export = '[[export.messages]]\nrole = "system"\ncontent = "{{ s }}"\n[[export.messages]]\nrole = "user"\ncontent = "Q: {{ q }}"\n'
    made = recipe(tmp_path, text + export)
    assert made.compares
    assert made.compared({"q": " Why? ", "s": ""}) == "Why?"
    assert made.compared({"q": "  ", "s": ""}) is None
    assert made.messages({"q": "Why?", "s": ""}) == [{"role": "user", "content": "Q: Why?"}]
    with pytest.raises(ConfigError, match=r"recipe.compare: a row has no 'qq'; did you mean 'q'"):
        recipe(tmp_path, text.replace("{{ q }}", "{{ qq }}"))
    assert not recipe(tmp_path, stage('user = "q"\ngive = { q = "{{ text }}" }')).compares


def test_the_server_is_asked_to_keep_to_the_schema_unless_told_otherwise(tmp_path: Path) -> None:
    body = recipe(tmp_path, JUDGED).sampling(Ask(index=0))
    assert (body["max_tokens"], body["stop"]) == (200, ("\n\n\n",))
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["question", "score"]
    assert body["response_format"]["json_schema"]["strict"] is True
    body = recipe(
        tmp_path, JUDGED.replace('format = "json"', 'format = "json"\nconstrain = false')
    ).sampling(Ask(index=0))
    assert "response_format" not in body


# What a file may say


OPTIONS = stage('user = "q"\ngive = { a = "{{ options.s }}{{ options.n }}{{ options.b }}{{ options.k }}" }',
                options='s = "x"\nn = 1\nb = false\nk = { default = "one", choices = ["one", "two"] }')  # fmt: skip


def test_options_have_the_type_of_their_defaults(tmp_path: Path) -> None:
    made = recipe(tmp_path, OPTIONS, s="7", n="2", b="true", k="two")
    assert pieces(made, "x")[0].record == {"a": "72truetwo"}
    assert recipe(tmp_path, OPTIONS, n=3)._options["n"] == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"nn": 1}, "--set nn: .* has no such option; did you mean 'n'"),
        ({"n": "two"}, "--set n=two: write a whole number"),
        ({"b": "1"}, "--set b=1: write true or false"),
        ({"k": "three"}, "--set k=three: choose one of one, two"),
    ],
)
def test_a_wrong_option_is_one_line(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe(tmp_path, OPTIONS, **given)


WRONG = {
    "x =": "not TOML",
    HEAD + '[stage]\nuser = "a"\ngive = { 问 = "a" }': "letters beyond A to Z stand in quotes",
    stage('user = "a"\ngive = { "a-b" = "a" }'): "'a-b' cannot be a name in a template",
    HEAD: "stage is missing",
    '[stage]\nuser = "a"': "recipe is missing",
    stage('user = "a"\nuesr = "b"'): "unknown key 'stage.uesr'; did you mean 'user'",
    stage('user = "a"\nanswer = { formt = "json" }'): "'stage.answer.formt'; did you mean 'format'",
    stage('user = "a"\nanswer = { format = "text", tags = ["a"] }'): "tags goes with format tags, not text",
    stage('user = "a"\nanswer = { format = "tags" }'): "format tags needs tags",
    stage('user = "a"\nanswer = { format = "regex", pattern = "a" }'): "no named group",
    stage('user = "a"\nanswer = { format = "json", schema = { type = "x" } }'): "stage.answer.schema: it is no JSON schema",
    HEAD + '[[stage]]\nuser = "a"\n[[stage]]\nuser = "b"': "stage 1: give it a name",
    stage('system = "a"'): "it asks nothing",
    stage('user = "a"', vary="tone = []"): "vary.tone",
    stage('user = "a"', vary='tone = { frm = "x" }'): "'vary.tone.frm'; did you mean 'from'",
    stage('user = "a"', vary='row = ["x"]'): "'row' has a meaning in templates already",
    stage('user = "a"', options="x = { default = 1 }"): "options.x.choices is missing",
    stage('user = "a"\ngive = { a = "b" }\nrefuse = [ { field = "b", words_below = 2 } ]'): "a row has no field 'b'",
    stage('user = "a"\nrefuse = [ { words_below = 2 } ]'): "words_below needs a field",
    stage('user = "a"\nrefuse = [ { field = "a", matches = "(" } ]'): "it is no regular expression",
    stage('user = "a"\nsampling = { n = 3 }'): "n is filled by the engine itself",
    stage('user = "a"\nsampling = { api_key = "sk-123456789" }'): "looks like a secret",
    stage('user = "a"\nsampling = { temperature = 9 }'): "stage.sampling.temperature",
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_is_one_line_that_names_the_key(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"own.toml: ") as caught:
        recipe(tmp_path, text)
    assert WRONG[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_windows_begins_with_a_mark(tmp_path: Path) -> None:
    marked = "\ufeff" + stage('user = "a"\ngive = { b = "{{ text }}" }').replace("\n", "\r\n")
    assert recipe(tmp_path, marked).fields == ("b",)


def test_an_unknown_name_is_told_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no such recipe .*FILE.toml.*alpaca"):
        load_template("nosuch", {})
    with pytest.raises(ConfigError, match=r"cannot be read: No such file"):
        load_template(str(tmp_path / "no.toml"), {})


def test_what_prompts_follow_from_is_told_apart_from_what_decisions_do(tmp_path: Path) -> None:
    """So a mended parser needs no new answers, and a changed prompt does."""
    was = recipe(tmp_path, JUDGED)

    def changed(old: str, new: str) -> tuple[bool, bool]:
        now = recipe(tmp_path, JUDGED.replace(old, new))
        assert old in JUDGED
        return now.asks_sha256 != was.asks_sha256, now.source_sha256 != was.source_sha256

    assert changed("\n[rows]", "\n# A comment.\n[rows]") == (False, False)
    assert changed("words_below = 3", "words_below = 4") == (False, True)
    assert changed("score >= options.least", "score > 4") == (False, True)
    assert changed('compare = "{{ question }}"', 'compare = "{{ id }}"') == (False, True)
    assert changed("Write one question", "Write a question") == (True, False)
    assert changed("max_tokens = 200", "max_tokens = 300")[0]
    assert changed('"terse"', '"rude"') == (True, True)
    assert changed('required = ["question", "score"]', 'required = ["question"]') == (True, True)


# Time


def test_what_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template's loop, and a regular expression that backtracks for ever."""
    monkeypatch.setattr(guard, "LIMIT_S", 0.3)
    monkeypatch.setattr(guard, "PROMPT_LIMIT_S", 0.2)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    made = recipe(tmp_path, stage(f'user = "{loop}"\ngive = {{ a = "b" }}'))
    with pytest.raises(RecipeFault, match=r"it took more than 0\.2 s"):
        parts_of(made, Ask(index=0))
    made = recipe(
        tmp_path, stage('user = "q"\nanswer = { format = "regex", pattern = "(?P<x>(a+)+)$" }')
    )
    (piece,) = pieces(made, "a" * 40 + "b")
    assert piece.refusal == ("recipe_error", "it took more than 0.3 s")
    made = recipe(
        tmp_path,
        stage(
            'user = "q"\ngive = { a = "{{ text }}" }\nrefuse = [ { field = "a", matches = "(a+)+$" } ]'
        ),
    )
    (piece,) = pieces(made, "a" * 40 + "b")
    assert piece.refusal == ("recipe_error", "it took more than 0.3 s")
